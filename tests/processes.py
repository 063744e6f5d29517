"""Processes that tests work in: forks of one that has imported what all of them need, which takes each 10 s."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp

from tests.conftest import leave_out_drawing

multiprocessing.set_forkserver_preload(
    [
        *("torch.distributed.fsdp", "transformers", "peft", "deepspeed", "accelerate.tracking", "matplotlib.figure"),
        *("torch.utils.tensorboard", "carft_fast.cli", "carft_fast.training.pipeline"),
    ]
)
FORKS = multiprocessing.get_context("forkserver")


def spawn(work: Callable[..., None], arguments: tuple[Any, ...], processes: int) -> None:
    """`work(rank, *arguments)` in each, with this process's environment, as torch.multiprocessing.spawn does it."""
    given = (work, dict(os.environ), sys.path, arguments)
    mp.start_processes(_with_environment, given, processes, start_method="forkserver")


def _with_environment(
    rank: int, work: Callable[..., None], environment: dict[str, str], path: list[str], arguments: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path
    work(rank, *arguments)


class Command:
    """`carft-fast WORDS`, with what subprocess.Popen has; `rank`: of how many, and the port where they meet."""

    def __init__(self, words: Sequence[str], rank: tuple[int, int, int] | None = None) -> None:
        handle, log = tempfile.mkstemp()
        os.close(handle)
        environment = dict(os.environ)
        if rank is not None:
            own, size, port = map(str, rank)
            environment |= {"RANK": own, "LOCAL_RANK": own, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self._log = Path(log)
        weakref.finalize(self, self._log.unlink)
        self._process = FORKS.Process(
            target=_with_environment, args=(0, _command, environment, sys.path, (list(words), log))
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("carft-fast", timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self._log.read_text(errors="replace"), None

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _command(_: int, words: list[str], log: str) -> None:
    from carft_fast.cli import run_cli

    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.argv = ["carft-fast", *words]
    leave_out_drawing(pytest.MonkeyPatch())
    run_cli()


def on_ranks(processes: int, words: Sequence[str], timeout: float) -> tuple[int, str]:
    """`carft-fast WORDS` on so many processes: the first exit code that is not 0, and what all of them said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [Command(words, (rank, processes, port)) for rank in range(processes)]
    ended = [rank.communicate(timeout) for rank in ranks]
    codes = [rank.returncode or 0 for rank in ranks]
    return next((code for code in codes if code), 0), "".join(said for said, _ in ended)
