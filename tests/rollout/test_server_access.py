"""Whom a server serves: who shows its token, from this machine alone, with contexts no longer than its own."""

import contextlib
import json
import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from carft_fast.core.errors import EngineError, InputError
from carft_fast.models.causal_lm import CarftModel
from carft_fast.rollout.vllm.servers import VLLMServerEngine
from carft_fast.rollout.vllm.token import TOKEN, bearer

from .checks import EOS, make_config
from .probes import fetch, processes, urls


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except OSError:
        return False


GUARDED = {
    "/weight_info": None,
    "/v1/models": None,
    "/metrics": None,
    "/openapi.json": None,
    "/pause?mode=abort": b"",
    "/update_weights": b"{}",
    "/collective_rpc": b'{"method": "shutdown"}',
    "/inference/v1/generate": b"{}",
}


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize("headers", [{}, bearer("another-token-for-tests"), {"Authorization": "Bearer "}])
def test_no_route_answers_without_the_token(
    server_engine: VLLMServerEngine, path: str, headers: dict[str, str]
) -> None:
    """vLLM's own API key leaves those open that replace weights and call into the workers."""
    url = urls(server_engine)[0]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        fetch(url + path, headers, GUARDED[path])
    assert answers(url)


def test_servers_listen_on_this_machine_alone(server_engine: VLLMServerEngine) -> None:
    """Every listening socket of every process of the servers, the sockets between their own processes too."""
    found = [address for pid in server_engine.pids for address in listening(pid)]
    ports = {int(url.rsplit(":", 1)[1]) for url in urls(server_engine)}
    assert ports <= {port for _, port in found}
    assert {host for host, _ in found} <= {"0100007F", "00000000000000000000000001000000"}, found


def listening(group: int) -> list[tuple[str, int]]:
    """(address as the kernel writes it, port) of the TCP sockets on which a process group listens."""
    sockets = set()
    for process in processes(group):
        with contextlib.suppress(OSError):
            sockets |= {os.readlink(descriptor) for descriptor in (process / "fd").iterdir()}
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return [
        (line[1].partition(":")[0], int(line[1].partition(":")[2], 16))
        for line in lines
        if line[3] == "0A" and f"socket:[{line[9]}]" in sockets
    ]


@pytest.mark.parametrize(
    ("token", "message"), [(None, "wants the token"), ("another-token-for-tests", "with another token")]
)
def test_a_trainer_without_the_token_is_told(
    server_engine: VLLMServerEngine, model: CarftModel, monkeypatch: pytest.MonkeyPatch, token: str | None, message: str
) -> None:
    monkeypatch.delenv(TOKEN)
    if token:
        monkeypatch.setenv(TOKEN, token)
    config = make_config("rollout.engine=vllm-server", f"rollout.servers={json.dumps(urls(server_engine))}")
    with pytest.raises(EngineError, match=rf"{message}.*{TOKEN}"):
        VLLMServerEngine(config, model, [EOS], folder=None, log=lambda _: None)


def test_a_server_with_a_shorter_context_is_refused(server_engine: VLLMServerEngine, model: CarftModel) -> None:
    servers = json.dumps(urls(server_engine))
    config = make_config("rollout.engine=vllm-server", f"rollout.servers={servers}", "data.max_length=128")
    with pytest.raises(InputError, match=r"takes 96 tokens; data\.max_length is 128"):
        VLLMServerEngine(config, model, [EOS], folder=None, log=lambda _: None)
