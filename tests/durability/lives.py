"""Runs of the command line that end when a test says so: each a fork of one process that has imported everything.

Reads a JSON object a line from standard input, answers with the exit status a line. "argv" is the command line, "log"
the file of its output; the rest, all optional, is what happens to it: see `prepare`.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate.tracking  # noqa: F401
import peft  # noqa: F401 - imported before the forks
import torch
import torch.utils.tensorboard
from matplotlib.figure import Figure  # noqa: F401

import carft_fast.compare.runs
import carft_fast.core.durable
import carft_fast.training.checkpoint
import carft_fast.training.export
import carft_fast.training.pipeline
from carft_fast.cli import run_cli
from carft_fast.reports.metrics import PhaseTimer
from carft_fast.training.checkpoint import CheckpointStore


def die(note: str, where: str) -> None:
    with open(note, "a") as file:
        file.write(where + "\n")
    os.kill(os.getpid(), signal.SIGKILL)


def prepare(plan: dict[str, Any]) -> None:
    """ "kill": {phase, entry, calls}: SIGKILL after so many function calls in the entry-th time of a phase, or at its
    end. "kill_in": {function of core.durable, call}: at its call-th call. "stop_in": {signal, save}: that signal
    while the save-th checkpoint is written, which does not end before the trainer waits for it. "fill": {phase, entry,
    path}: a file that takes the rest of the disk. "largest_file": bytes. "clock": seconds it is wrong by.
    """
    if "clock" in plan:
        true_time, wrong_by = time.time, plan["clock"]
        time.time = lambda: true_time() + wrong_by
    if "largest_file" in plan:
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan["largest_file"], resource.RLIM_INFINITY))
    if "kill_in" in plan:
        count_calls(plan["kill_in"], plan["note"])
    if "stop_in" in plan:
        stop_while_writing(plan["stop_in"], plan["note"])
    for kind in ("kill", "fill"):
        if kind in plan:
            in_phase(kind, plan[kind], plan["note"])


def count_calls(wanted: dict[str, Any], note: str) -> None:
    original, calls = getattr(carft_fast.core.durable, wanted["function"]), 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == wanted["call"]:
            die(note, wanted["function"])
        return original(*args)

    for module in (carft_fast.core.durable, carft_fast.training.checkpoint):
        if hasattr(module, wanted["function"]):
            setattr(module, wanted["function"], counted)


def stop_while_writing(wanted: dict[str, Any], note: str) -> None:
    """For asynchronous saves: the trainer has to meet the stop with the save under way, or it waits in vain."""
    write, wait, met, saves = carft_fast.training.checkpoint.publish, CheckpointStore.wait, threading.Event(), 0

    def interrupted(temporary: Path, target: Path) -> None:
        nonlocal saves
        saves += 1
        if saves == wanted["save"]:
            met.clear()
            os.kill(os.getpid(), wanted["signal"])
            in_time = met.wait(60)
            Path(note).write_text(f"{threading.current_thread().name} {target.name} {in_time}")
        write(temporary, target)

    def waits(store: CheckpointStore) -> None:
        met.set()
        wait(store)

    carft_fast.training.checkpoint.publish = interrupted
    CheckpointStore.wait = waits  # type: ignore[method-assign]


def in_phase(kind: str, wanted: dict[str, Any], note: str) -> None:
    original, entries, calls = PhaseTimer.__call__, 0, 0

    def profile(frame: Any, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")
        if calls > wanted["calls"]:
            die(note, f"{wanted['phase']} in {frame.f_code.co_name}")

    @contextmanager
    def phase_of(self: PhaseTimer, phase: str) -> Iterator[None]:
        nonlocal entries
        with original(self, phase):
            entries += phase == wanted["phase"]
            struck = phase == wanted["phase"] and entries == wanted["entry"]
            if struck and kind == "fill":
                fill(wanted["path"])
            if struck and kind == "kill":
                sys.setprofile(profile)
            yield
            if struck and kind == "kill":
                die(note, f"{wanted['phase']} at its end")

    PhaseTimer.__call__ = phase_of  # type: ignore[method-assign]


def fill(path: str) -> None:
    with open(path, "wb", buffering=0) as file:
        for size in (2**20, 2**12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


def live(plan: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    try:
        log = os.open(plan["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["carft-fast", *plan["argv"]]
        prepare(plan)
        run_cli()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(live(json.loads(line)), flush=True)
