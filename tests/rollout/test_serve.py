"""`carft-fast serve` as other users of the machine and web pages attack it, and what it leaves behind when it ends."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.models.causal_lm import CarftModel
from carft_fast.rollout.base import SamplingParams
from carft_fast.rollout.vllm.launch import free_port
from carft_fast.rollout.vllm.plugin import ROUTES
from carft_fast.rollout.vllm.servers import VLLMServerEngine
from carft_fast.rollout.vllm.token import TOKEN

from .checks import EOS, PROMPTS, assert_samples_of, make_config

GREEDY = SamplingParams(20, temperature=0)
OPTIONS = ["data.max_length=96", "rollout.batch_size=8", "rollout.kv_cache_gib=0.25"]


class Served(NamedTuple):
    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    """Its TMPDIR, where everything lies that it may leave behind."""
    log: Path

    @property
    def token(self) -> str:
        found = re.findall(rf"^{TOKEN}=(\S+)", self.log.read_text(), re.MULTILINE)
        assert len(found) == 1
        return found[0]

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """Status and answer; headers as they are given, and Host too where one is."""
        connection = http.client.HTTPConnection("::1", self.port, timeout=30)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                connection.putheader(name.replace("_", "-"), value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


def serve(folder: Path, *options: str, **environment: str) -> Served:
    """Without a token in its environment, where none is given."""
    port = free_port()
    temporary = Path(tempfile.mkdtemp())  # pytest's own are too long for sockets
    settings = [word for option in OPTIONS for word in ("--set", option)]
    command = [sys.executable, "-m", "carft_fast", "serve", "--config", str(QUICKSTART_CONFIG), *settings, *options]
    clean = {name: value for name, value in os.environ.items() if name not in (TOKEN, "VLLM_API_KEY")}
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=out,
            stderr=out,
            env=clean | {"TMPDIR": str(temporary)} | environment,
        )
    return Served(process, port, temporary, log)


def healthy(server: Served) -> bool:
    with contextlib.suppress(OSError):
        return server.ask("GET", "/health")[0] == 200
    return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """On the loopback address of IPv6, with no token of the user's."""
    served = serve(tmp_path_factory.mktemp("serve"), "--host", "::1", CARFT_SERVER_NAMES="llm.example.com, gpu7")
    try:
        deadline = time.monotonic() + 240
        while not healthy(served):
            assert served.process.poll() is None, served.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield served
    finally:
        served.process.kill()
        served.process.wait()
        shutil.rmtree(served.folder)


CROSS_SITE = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
"""A request that any page may send from a browser on this machine, without asking first."""


def test_it_makes_a_token_and_says_it_once(server: Served) -> None:
    assert re.fullmatch(r"[\w-]{43}", server.token)
    assert server.log.read_text().count(server.token) == 1
    assert server.ask("GET", "/v1/models", **server.bearer)[0] == 200


@pytest.mark.parametrize("path", sorted(ROUTES - {"/health"}))
def test_a_page_or_another_user_gets_nothing_without_the_token(server: Served, path: str) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        assert server.ask(method, path, b"{}", **CROSS_SITE)[0] == 401
    assert server.ask("GET", "/health")[0] == 200


def test_no_worker_method_is_called_even_with_the_token(server: Served, tmp_path: Path) -> None:
    """save_sharded_state writes files as the server's user, shutdown ends the workers."""
    for method, arguments in {"save_sharded_state": {"path": str(tmp_path / "written")}, "shutdown": {}}.items():
        body = json.dumps({"method": method, "kwargs": arguments}).encode()
        status, _ = server.ask("POST", "/collective_rpc", body, Content_Type="application/json", **server.bearer)
        assert status == 404
        assert server.ask("POST", "/collective_rpc", body, **CROSS_SITE)[0] == 401
    assert not (tmp_path / "written").exists()
    assert server.ask("GET", "/weight_info", **server.bearer)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil", "", "["]
)
def test_a_name_that_is_not_the_servers_is_refused(server: Served, host: str) -> None:
    """DNS rebinding: a page's own name, which its owner has pointed to this machine. Even with the token."""
    for path in ("/health", "/v1/models"):
        assert server.ask("GET", path, Host=host, **server.bearer)[0] in (400, 421)


@pytest.mark.parametrize(
    "host",
    ["localhost", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3", "llm.example.com:443", "GPU7", socket.gethostname()],
)
def test_the_servers_own_names_are_not(server: Served, host: str) -> None:
    assert server.ask("GET", "/v1/models", Host=host, **server.bearer)[0] == 200


def test_a_trainer_uses_it(server: Served, model: CarftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, server.token)
    config = make_config("rollout.engine=vllm-server", f'rollout.servers=["http://[::1]:{server.port}"]')
    engine = VLLMServerEngine(config, model, [EOS], folder=None, log=lambda _: None)
    engine.sync(model)
    assert_samples_of(model.lm, engine.generate(PROMPTS, GREEDY), GREEDY)
    engine.close()


def leftovers(server: Served) -> list[str]:
    """After as long as removing takes."""
    deadline = time.monotonic() + 20
    while (found := os.listdir(server.folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def test_a_server_that_is_told_to_end_says_one_line_and_leaves_nothing(server: Served) -> None:
    """The last test of this server. Its processes are in another session: a terminal's Ctrl-C does not reach them."""
    assert len(list(server.folder.glob("carft-model-*"))) == 1
    said = server.log.read_text()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 130
    assert server.log.read_text().removeprefix(said) == "stopped by SIGINT\n"
    assert leftovers(server) == []


@pytest.mark.long
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nor_one_that_is_ended_while_it_starts(
    tmp_path_factory: pytest.TempPathFactory, signum: signal.Signals
) -> None:
    starting = serve(tmp_path_factory.mktemp("serve"))
    try:
        while not list(starting.folder.glob("carft-model-*/model/config.json")):
            assert starting.process.poll() is None, starting.log.read_text()
            time.sleep(0.05)
        deadline = time.monotonic() + 120
        while starting.process.poll() is None and time.monotonic() < deadline:
            starting.process.send_signal(signum)  # more than once: a library that is being imported may swallow Ctrl-C
            with contextlib.suppress(subprocess.TimeoutExpired):
                starting.process.wait(5)
        assert starting.process.returncode is not None
    finally:
        starting.process.kill()
    assert leftovers(starting) == []
    starting.folder.rmdir()


def test_a_blank_token_is_refused_in_one_line() -> None:
    command = [sys.executable, "-m", "carft_fast", "serve", "--config", str(QUICKSTART_CONFIG)]
    result = subprocess.run(
        command, env=os.environ | {TOKEN: ""}, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 2
    assert re.fullmatch(rf"error: {TOKEN} has 0 characters: at least 16 .*\n", result.stderr), result.stderr
