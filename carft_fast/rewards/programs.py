"""Programs that a language model wrote, run for what their solution() returns. They are taken to be hostile.

This is the trainer's side. It sends texts to fork servers (`sandbox_server.py`), whose processes hold nothing of the
trainer, and reads a kind and some bytes back. docs/sandbox.md says what this guards against and what not.
"""

import contextlib
import json
import math
import multiprocessing.connection
import os
import platform
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from carft_fast.core import InputError, RewardError
from carft_fast.rewards.numerals import Number

PROGRAM_BYTES = 64 * 1024
MACHINES = ("x86_64", "aarch64")
LONGEST_ERROR = 300  # characters

_QUOTIENT = re.compile(rb"(-?[0-9]{1,2000})/([1-9][0-9]{0,1999})")
_SERVER = Path(__file__).with_name("sandbox_server.py")
_INTERPRETER_OPTIONS = ("-s", "-S", "-P", "-B")
# All of a server's environment: no user's, and the same order of sets, hence the same outcome, in every process.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONCOERCECLOCALE": "0", "TZ": "UTC0"}
_START_SECONDS = 60.0
_GRACE_SECONDS = 10.0  # a server that is that late with its own limit is gone
_MOST_LOSSES = 8  # servers lost in a row

# A pool asks these first: a kernel that does not hold programs back must not run any.
_INNOCENT = "def solution():\n    return 6 * 7"
_FORBIDDEN = "import os\n\ndef solution():\n    return os.getppid()"
_FORBIDDEN_ERROR = "killed: forbidden system call"


class Outcome(NamedTuple):
    value: float | str | bool | None
    """What solution() returned; numbers are floats, a `Number` where a double is not exact. None when there is nothing
    usable."""
    error: str | None
    """Why there is no value, on one line; a program can write anything here."""


class SandboxError(RewardError):
    """Programs cannot be run safely here, or their servers keep ending. The message says why."""


class ProgramPool(contextlib.AbstractContextManager["ProgramPool"]):
    """Runs programs on `workers` fork servers; a context manager. Threads may share it: they take turns.

    A program has `cpu_seconds` of processor time and `wall_seconds` in all, `memory_mb` MiB of address space (with the
    interpreter's own) and returns at most `output_bytes`. The same text gives the same outcome whatever else runs,
    limits and clocks apart: random is seeded, and every program starts from the same memory.

    Raises InputError for a platform or a limit that is not allowed, SandboxError where programs cannot be run safely.
    """

    def __init__(
        self,
        workers: int = 2,
        *,
        cpu_seconds: float = 2.0,
        wall_seconds: float = 10.0,
        memory_mb: int = 256,
        output_bytes: int = 64 * 1024,
    ) -> None:
        if sys.platform != "linux" or platform.machine() not in MACHINES:
            here = f"{sys.platform} on {platform.machine()}"
            raise InputError(f"programs are run on Linux on {' or '.join(MACHINES)} only; this is {here}")
        for name, value, low, high in (
            ("workers", workers, 1, 1024),
            ("cpu_seconds", cpu_seconds, 0.01, 3600),
            ("wall_seconds", wall_seconds, 0.01, 3600),
            ("memory_mb", memory_mb, 64, 1 << 20),
            ("output_bytes", output_bytes, 16, 128 * 1024),
        ):
            if not low <= value <= high:
                raise InputError(f"{name} = {value}: must be {low} to {high}")
        self._options = {
            "cpu_seconds": cpu_seconds,
            "wall_seconds": wall_seconds,
            "memory_bytes": memory_mb << 20,
            "output_bytes": output_bytes,
            "program_bytes": PROGRAM_BYTES,
        }
        self._lock = threading.Lock()
        self._losses = 0
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(_Worker(self._options))
        except BaseException:
            self.close()
            raise

    @property
    def defences(self) -> tuple[str, ...]:
        """The lines of defence that are up: "system calls" and "resource limits" always, "namespaces", "empty root" and
        "unprivileged user" where the kernel permits them."""
        return self._workers[0].defences

    def run(self, programs: Sequence[str]) -> list[Outcome]:
        """Outcomes in the order of the programs. A program's errors are its outcome; nothing it does raises here."""
        with self._lock:
            if not self._workers:
                raise SandboxError("the pool is closed")
            texts = [program.encode("utf-8", "replace") for program in programs]
            outcomes = {
                index: Outcome(None, f"a program of {len(text)} bytes, over {PROGRAM_BYTES}")
                for index, text in enumerate(texts)
                if len(text) > PROGRAM_BYTES
            }
            self._run(texts, outcomes)
            return [outcomes[index] for index in range(len(texts))]

    def _run(self, texts: Sequence[bytes], outcomes: dict[int, Outcome]) -> None:
        """Add the outcomes that are missing."""
        waiting = deque(index for index in range(len(texts)) if index not in outcomes)
        busy: dict[int, int] = {}  # worker -> program
        try:
            while waiting or busy:
                for slot in range(len(self._workers)):
                    if waiting and slot not in busy:
                        busy[slot] = waiting.popleft()
                        self._send(slot, texts[busy[slot]])
                for slot in self._ready(busy):
                    index = busy[slot]
                    try:
                        outcomes[index] = self._workers[slot].receive()
                        self._losses = 0
                    except OSError:
                        outcomes[index] = Outcome(None, "the server of this program ended")
                        self._replace(slot)
                    del busy[slot]
        except BaseException:
            for slot in busy:  # its answer would be taken for another program's
                self._workers[slot].kill()
            raise

    def _send(self, slot: int, text: bytes) -> None:
        try:
            self._workers[slot].send(text)
        except OSError:  # ended since its last program; this one has not been run
            self._replace(slot)
            self._workers[slot].send(text)

    def _ready(self, busy: Iterable[int]) -> list[int]:
        """Wait. Returns the workers that have answered, ended, or are overdue."""
        workers = {slot: self._workers[slot] for slot in busy}
        first = min(worker.deadline for worker in workers.values())
        channels = [worker.channel for worker in workers.values()]
        readable = set(multiprocessing.connection.wait(channels, max(0.0, first - time.monotonic())))
        now = time.monotonic()
        return [slot for slot, worker in workers.items() if worker.channel in readable or worker.deadline <= now]

    def _replace(self, slot: int) -> None:
        self._workers[slot].kill()
        self._losses += 1
        if self._losses > _MOST_LOSSES:
            raise SandboxError(f"{self._losses} sandbox servers in a row ended without an answer")
        self._workers[slot] = _Worker(self._options)

    def close(self) -> None:
        """End every process of the pool."""
        with self._lock:
            for worker in self._workers:
                worker.kill()
            self._workers = []

    def __exit__(self, *error: object) -> None:
        self.close()


class _Worker:
    """A fork server's process and our end of its channel, on which a program or an answer is one message."""

    def __init__(self, options: dict[str, float]) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            everything = {**options, "trainer": os.getpid(), "channel": theirs.fileno()}
            self._process = subprocess.Popen(
                [sys.executable, *_INTERPRETER_OPTIONS, str(_SERVER), json.dumps(everything)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=_ENVIRONMENT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._longest_answer = int(options["output_bytes"]) + 2
        self._patience = options["wall_seconds"] + _GRACE_SECONDS
        self.deadline = math.inf
        try:
            self.defences = self._greeting()
            self._check()
        except OSError as error:
            self.kill()
            raise SandboxError(f"the sandbox's server did not start: {error or 'it ended'}") from None
        except BaseException:
            self.kill()
            raise

    def _greeting(self) -> tuple[str, ...]:
        self.channel.settimeout(_START_SECONDS)
        greeting = self.channel.recv(64 * 1024)
        if greeting[:1] != b"+":
            raise SandboxError(f"the sandbox's server did not start: {greeting[1:].decode() or 'it ended'}")
        return tuple(greeting[1:].decode().split("\n"))

    def _check(self) -> None:
        for program, wanted in ((_INNOCENT, Outcome(42.0, None)), (_FORBIDDEN, Outcome(None, _FORBIDDEN_ERROR))):
            self.send(program.encode())
            found = self.receive()
            if found != wanted:
                raise SandboxError(
                    f"the sandbox failed its self-test on this machine: asked for {wanted}, got {found}"
                    " (is seccomp in the kernel, and is there memory enough?)"
                )

    def send(self, text: bytes) -> None:
        self.channel.send(b"P" + text)  # an empty message would read as the end of the channel
        self.deadline = time.monotonic() + self._patience

    def receive(self) -> Outcome:
        """Raises OSError when the server has ended or is overdue."""
        self.channel.settimeout(max(0.001, self.deadline - time.monotonic()))
        answer = self.channel.recv(self._longest_answer)
        if not answer:
            raise ConnectionResetError
        if answer[:1] == b"E":
            return Outcome(None, answer[1:].decode())
        return read_result(answer[1:])

    def kill(self) -> None:
        """Its server and programs end with it."""
        self.channel.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()


def read_result(payload: bytes) -> Outcome:
    """What a program's process wrote: anything at all. Nothing here calls, parses or unpickles."""
    kind, body = payload[:1], payload[1:]
    if kind == b"f" and len(body) == 8:
        (number,) = struct.unpack("<d", body)
        return Outcome(number, None) if math.isfinite(number) else Outcome(None, "not a finite number")
    if kind == b"q" and (quotient := _QUOTIENT.fullmatch(body)):
        with contextlib.suppress(OverflowError):
            return Outcome(Number(Fraction(int(quotient[1]), int(quotient[2]))), None)
    if kind == b"b" and body in (b"\0", b"\1"):
        return Outcome(body == b"\1", None)
    if kind == b"s":
        try:
            return Outcome(body.decode(), None)
        except UnicodeDecodeError:
            return Outcome(None, "a garbled result")
    if kind == b"e":
        text = body.decode("utf-8", "replace")[:LONGEST_ERROR]
        return Outcome(None, "".join(character if character.isprintable() else " " for character in text))
    return Outcome(None, "a garbled result" if payload else "ended without a result")
