"""A vLLM server as it is started: its environment, its command line, and who may reach it."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config.schema import Config
from carft_fast.config.toml import load_config
from carft_fast.core.errors import InputError
from carft_fast.models.load import load_lm_config
from carft_fast.rollout.vllm.adapter import check_engine
from carft_fast.rollout.vllm.launch import (
    ServerProcess,
    check_port,
    free_port,
    is_loopback,
    serve,
    server_environment,
)
from carft_fast.rollout.vllm.scratch import Scratch
from carft_fast.rollout.vllm.token import TOKEN

PLANTED = "hf_PlantedSecret0123456789abcdefghij"
NAMES = ["HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "VLLM_NO_USAGE_STATS"]


def test_what_a_server_that_a_run_starts_gets(tmp_path: Path) -> None:
    """Read from the process itself: no telemetry, its token in the environment and not on the command line."""
    environment = server_environment(None, "127.0.0.1", PLANTED, "files", tmp_path)
    server = ServerProcess(["--model", "nowhere"], tmp_path / "log", environment)
    server.start()
    try:
        process = Path(f"/proc/{server.pid}")
        while not (text := process.joinpath("environ").read_text()):  # Popen returns just before the kernel fills it
            assert server.running
        lines = text.split("\0")
        got = dict(line.split("=", 1) for line in lines if "=" in line)
        command = process.joinpath("cmdline").read_text().split("\0")
        mask = int(re.findall(r"Umask:\s*(\d+)", process.joinpath("status").read_text())[0], 8)
    finally:
        server.stop()
    assert [got[name] for name in NAMES] == ["1"] * 4
    assert got["VLLM_API_KEY"] == PLANTED
    assert got["VLLM_HOST_IP"] == "127.0.0.1"
    assert got["PYTHONSAFEPATH"] == "1"
    assert mask == 0o077
    assert not any(PLANTED in word for word in command)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert PLANTED not in server.url


def test_pickled_handles_are_allowed_only_where_they_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "VLLM_ALLOW_INSECURE_SERIALIZATION"
    monkeypatch.delenv(name, raising=False)
    allowed = {
        transfer: server_environment(None, "127.0.0.1", PLANTED, transfer, Path("/tmp")).get(name)
        for transfer in ("files", "nccl", "ipc")
    }
    assert allowed == {"files": None, "nccl": None, "ipc": "1"}


def test_loopback() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.1.2.3", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "gpu2"]))


def serve_config() -> Config:
    return load_config(str(QUICKSTART_CONFIG), ["rollout.engine=vllm-server"])


@pytest.mark.parametrize("name", [TOKEN, "VLLM_API_KEY"])
@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("", "has 0 characters"),
        ("x", "has 1 character"),
        ("fifteen-letters", "has 15 characters"),
        (" " * 20, "has a space"),
        ("seven words with spaces in between", "has a space"),
        ("a-token-with-a-line-end\n", "has a space"),
        ("pässword-of-many-letters", "has a space, or a character outside of ASCII"),
        ("x" * 40, "has only 1 different"),
    ],
)
def test_a_token_that_anybody_could_guess_is_refused(
    token: str, said: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    monkeypatch.setenv(name, token)
    with pytest.raises(InputError, match=rf"^{name} {said}.* at least 16 visible") as refused:
        serve(serve_config(), "127.0.0.1", free_port())
    assert len(token) < 2 or token not in str(refused.value)


def test_a_trainers_token_is_looked_at_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "short")
    with pytest.raises(InputError, match=rf"{TOKEN} has 5 characters"):
        check_engine(serve_config(), load_lm_config(serve_config().model), "cpu")


@pytest.mark.parametrize("host", ["", " ", "no-such-machine.invalid", "192.0.2.7"])
def test_a_host_that_is_not_here_is_named(host: str) -> None:
    """192.0.2.7 is an address for documents, which no machine has."""
    with pytest.raises(InputError, match=re.escape(f"--host {host}") if host.strip() else f"--host is {host!r}"):
        check_port(host, free_port())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0", "::"])
def test_a_free_port_of_this_machine_is_taken(host: str) -> None:
    check_port(host, free_port())


def test_a_port_of_another_users_process_is_not_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its start and its first answer a server has no port yet: who takes it would be sent the token."""
    server = ServerProcess([], tmp_path / "log", os.environ)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server.url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert server.listens
        own = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: own + 1)
        assert not server.listens
    monkeypatch.undo()
    assert not server.listens


KILLED = """
import os, signal
from carft_fast.rollout.vllm.scratch import Scratch
scratch = Scratch("carft-test-")
(scratch.path / "file").write_text("x")
print(scratch.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def short_path() -> Iterator[Path]:
    """pytest's own folders are too long for sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_a_scratch_folder_goes_with_a_killed_process(short_path: Path) -> None:
    command = [sys.executable, "-c", KILLED]
    result = subprocess.run(
        command, env=os.environ | {"TMPDIR": str(short_path)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == -signal.SIGKILL
    folder = Path(result.stdout.strip())
    assert folder.parent == short_path
    deadline = time.monotonic() + 20
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not folder.exists()


def test_a_scratch_folder_is_its_users_alone_and_closes(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(short_path))
    scratch = Scratch("carft-test-")
    assert scratch.path.parent == short_path
    assert stat.S_IMODE(scratch.path.stat().st_mode) == 0o700
    scratch.close()
    assert list(short_path.iterdir()) == []


def test_a_scratch_folder_is_where_sockets_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket's path has at most 107 bytes; a temporary folder may lie deep, as a batch system's does."""
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    scratch = Scratch("carft-test-")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(scratch.path / str(uuid.uuid4())))
    scratch.close()
    assert not scratch.path.exists()
    assert list(deep.iterdir()) == []


TALKS = """
import os, signal, sys, time
def farewell(signum, frame):
    print("shutting down" * 1000, flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, farewell)
print("up", flush=True)
os.fork()  # a worker, which says as much at its end
time.sleep({seconds})
sys.exit(3)
"""


@pytest.mark.long
@pytest.mark.parametrize(("seconds", "signum", "code"), [(60, 2, 130), (60, 15, 143), (0, None, 3)])
def test_serve_prints_what_its_server_says_until_it_is_told_to_end(seconds: int, signum: int | None, code: int) -> None:
    """A server of two processes that talk much when they end, and one that fails by itself."""
    relay = (
        "import os, sys; from carft_fast.rollout.vllm.launch import _relay;"
        f"sys.exit(_relay([sys.executable, '-c', {TALKS.format(seconds=seconds)!r}], os.environ))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", relay], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    said = [process.stdout.readline()]
    if signum is not None:
        process.send_signal(signum)
        said += process.stdout.readlines()
    assert process.wait(30) == code
    end = [] if signum is None else [f"stopped by {signal.Signals(signum).name}\n"]
    assert said == ["up\n", *end]
