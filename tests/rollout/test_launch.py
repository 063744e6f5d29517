"""A vLLM server as it is started: its environment, its command line, and who may reach it."""

from pathlib import Path

import pytest

from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config.toml import load_config
from carft_fast.core.errors import InputError
from carft_fast.rollout.vllm.launch import ServerProcess, is_loopback, serve, server_environment

PLANTED = "hf_PlantedSecret0123456789abcdefghij"
NAMES = ["HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "VLLM_NO_USAGE_STATS"]


def test_what_a_server_that_a_run_starts_gets(tmp_path: Path) -> None:
    """Read from the process itself: no telemetry, its token in the environment and not on the command line."""
    environment = server_environment(None, "127.0.0.1", PLANTED, "files")
    server = ServerProcess(["--model", "nowhere"], tmp_path / "log", environment)
    server.start()
    try:
        process = Path(f"/proc/{server.pid}")
        while not (text := process.joinpath("environ").read_text()):  # Popen returns just before the kernel fills it
            assert server.running
        lines = text.split("\0")
        got = dict(line.split("=", 1) for line in lines if "=" in line)
        command = process.joinpath("cmdline").read_text().split("\0")
    finally:
        server.stop()
    assert [got[name] for name in NAMES] == ["1"] * 4
    assert got["VLLM_API_KEY"] == PLANTED
    assert got["VLLM_HOST_IP"] == "127.0.0.1"
    assert not any(PLANTED in word for word in command)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert PLANTED not in server.url


def test_pickled_handles_are_allowed_only_where_they_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    allowed = {
        transfer: server_environment(None, "127.0.0.1", None, transfer).get("VLLM_ALLOW_INSECURE_SERIALIZATION")
        for transfer in ("files", "nccl", "ipc")
    }
    assert allowed == {"files": None, "nccl": None, "ipc": "1"}


def test_loopback() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.1.2.3", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "gpu2"]))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "gpu2"])
def test_serving_other_machines_needs_a_token(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CARFT_SERVER_TOKEN", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=rf"--host {host}: .*CARFT_SERVER_TOKEN"):
        serve(load_config(str(QUICKSTART_CONFIG), ["rollout.engine=vllm-server"]), host, 8000)
