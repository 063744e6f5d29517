"""Taking turns: every side is a process of its own, runs one step when it is told to, and is idle else."""

import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from benchmarks.peers.work import Done, Work


def resident_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


class Turns:
    """A side's end. What the side's libraries print goes to stderr: stdout carries the answers alone."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> None:
        if sys.stdin.readline().strip() != "step":
            sys.exit("the other end is gone")

    @contextmanager
    def timed(self, done: Done) -> Iterator[None]:
        """Fills in both times and memory."""
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again
        before = resident_kb("VmRSS")
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        done.seconds, done.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        done.peak_mb = (resident_kb("VmHWM") - before) / 1024

    def answer(self, done: Done) -> None:
        """Give back what the step held: this side waits now, and the others need the memory."""
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        print(json.dumps(dataclasses.asdict(done)), file=self._answers, flush=True)


class Steps(Protocol):
    """A side that is driven a step at a time."""

    gradient: dict[str, Tensor] | None
    """Of the first step, once it is done."""

    def step(self, done: Done) -> None:
        """Fills in all but times and memory."""
        ...

    def weights(self) -> dict[str, Tensor]: ...


def serve(side: Steps, work: Work, folder: Path, turns: Turns) -> None:
    """All steps of the case; the gradient of the first and the weights after the last are written for comparison."""
    for index in range(work.steps):
        turns.wait()
        done = Done()
        with turns.timed(done):
            side.step(done)
        if index == 0:
            assert side.gradient is not None
            save_file(side.gradient, folder / "gradient.safetensors")
            side.gradient.clear()
        turns.answer(done)
    save_file({name: p.detach().clone() for name, p in side.weights().items()}, folder / "weights.safetensors")


class Side:
    """The driver's end: one side's process. `setting` is the side's own."""

    def __init__(self, name: str, module: str, work_file: Path, folder: Path, setting: dict[str, Any]) -> None:
        self.name, self.folder = name, folder
        folder.mkdir(parents=True)
        self._log = folder / "log"
        words = ["--work", str(work_file), "--folder", str(folder), "--setting", json.dumps(setting)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"benchmarks.peers.{module}", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def step(self) -> Done:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print("step", file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._fail()
        return Done(**json.loads(answer))

    def finish(self) -> None:
        """After the last step: the side writes its weights and ends."""
        if self._process.wait() != 0:
            self._fail()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _fail(self) -> None:
        code = self._process.wait()
        raise RuntimeError(f"{self.name} ended with code {code}:\n{self._log.read_text()[-3000:]}")


def run_in_turns(sides: Sequence[Side], steps: int) -> dict[str, list[Done]]:
    """A B C A B C ...: `steps` steps of every side."""
    done: dict[str, list[Done]] = {side.name: [] for side in sides}
    try:
        for index in range(steps):
            for side in sides:
                done[side.name].append(side.step())
                last = done[side.name][-1]
                print(f"step {index} {side.name}: {last.seconds:.2f} s, processor {last.cpu_seconds:.2f} s", flush=True)
        for side in sides:
            side.finish()
    finally:
        for side in sides:
            side.stop()
    return done
