"""One process at a time writes to a folder, however the one before ended."""

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from carft_fast.core.durable import LOCK, is_empty, lock_holder, locked
from carft_fast.core.errors import InputError

HOLD = """
import os, sys, time
from pathlib import Path
from carft_fast.core.durable import locked
with locked(Path(sys.argv[1]), print):
    if len(sys.argv) > 2 and os.fork() == 0:
        print(os.getpid(), flush=True)  # a child that outlives it, with a copy of all its descriptors
        time.sleep(600)
    if len(sys.argv) == 2:
        print(os.getpid(), flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(folder: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *more], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def test_the_second_process_is_told_the_first_ones_id(tmp_path: Path) -> None:
    with holder(tmp_path) as (first, _):
        wanted = rf"{tmp_path} is in use by process {first.pid} on "
        with pytest.raises(InputError, match=wanted), locked(tmp_path, print):
            pass
        assert f"process {first.pid} on " in str(lock_holder(tmp_path))
        first.send_signal(signal.SIGKILL)
        first.wait()
        with locked(tmp_path, print):
            assert f"process {os.getpid()} on " in str(lock_holder(tmp_path))
    assert lock_holder(tmp_path) is None


def test_a_child_of_a_killed_process_does_not_hold_its_lock(tmp_path: Path) -> None:
    with holder(tmp_path, "fork") as (first, child):
        first.kill()
        first.wait()
        os.kill(child, 0)  # is alive
        with locked(tmp_path, print):
            pass
        os.kill(child, signal.SIGKILL)


def test_two_threads_of_one_process_are_two(tmp_path: Path) -> None:
    refused: list[str] = []

    def second() -> None:
        try:
            with locked(tmp_path, print):
                pass
        except InputError as error:
            refused.append(str(error))

    with locked(tmp_path, print):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert f"process {os.getpid()} on " in refused[0]


def test_one_that_only_asks_refuses_nobody(tmp_path: Path) -> None:
    """`lock_holder` holds the lock for an instant."""
    with locked(tmp_path, print):
        pass
    with (tmp_path / LOCK).open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(0.3, fcntl.flock, (asking, fcntl.LOCK_UN)).start()
        with locked(tmp_path, print):
            pass


def take_many(folder: str, count: int) -> int:
    """How often this process had the lock; beside it nobody else may have had it."""
    had, marker = 0, Path(folder) / "marker"
    for _ in range(count):
        try:
            with locked(Path(folder), print):
                marker.touch(exist_ok=False)
                had += 1
                marker.unlink()
        except InputError:
            pass
    return had


def test_never_two_at_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        had = pool.starmap(take_many, [(str(tmp_path), 100)] * 3)
    assert all(had)


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS without its lock service answers."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    told: list[str] = []
    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path, told.append):
        assert lock_holder(tmp_path) is None
    assert told == [
        f"{tmp_path}: its file system has no locks (No locks available): nothing keeps another run out of it"
    ]


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match=r"run\.lock: cannot be written: .*symbolic"), locked(tmp_path / "run", print):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_what_a_killed_process_leaves_before_its_first_file_is_nothing(tmp_path: Path) -> None:
    assert is_empty(tmp_path / "none")
    with locked(tmp_path, print):
        (tmp_path / ".writing-config.toml").touch()
    assert is_empty(tmp_path)
    (tmp_path / "config.toml").touch()
    assert not is_empty(tmp_path)
