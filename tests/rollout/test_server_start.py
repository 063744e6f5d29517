"""Servers from their start to their end, and those that are absent, something else than vLLM, or sample otherwise."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.core.errors import EngineError, InputError
from carft_fast.models.causal_lm import CarftModel
from carft_fast.rollout.base import SamplingParams
from carft_fast.rollout.vllm import adapter as vllm_adapter
from carft_fast.rollout.vllm.launch import ServerProcess, check_port, free_port
from carft_fast.rollout.vllm.servers import VLLMServerEngine

from ..conftest import FORKS
from .checks import EOS, PROMPTS, assert_samples_of, make_config, perturb
from .probes import urls

GREEDY = SamplingParams(20, temperature=0)


def test_a_failure_is_not_taken_from_an_earlier_servers_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("ValueError: the KV cache of yesterday did not fit\n")
    server = ServerProcess(["--model", "nowhere"], log, os.environ)
    server.start()
    os.kill(server.pid or 0, signal.SIGKILL)
    server.stop()
    assert "yesterday" not in str(server.failure())
    assert "it printed no error" in str(server.failure())


@pytest.mark.long
def test_a_server_that_does_not_start_says_why(model: CarftModel, tmp_path: Path) -> None:
    config = make_config("rollout.engine=vllm-server", "rollout.kv_cache_gib=100000.0")
    with pytest.raises(EngineError, match=r"vLLM has not enough memory .*rollout\.kv_cache_gib.*vllm-server-0\.log"):
        VLLMServerEngine(config, model, [EOS], folder=tmp_path, log=lambda _: None)
    assert (
        "KV cache" in (tmp_path / "vllm-server-0.log").read_text()
        or "kv cache" in (tmp_path / "vllm-server-0.log").read_text()
    )


def test_an_engine_that_cannot_start_its_servers_leaves_nothing(
    model: CarftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second server does not start: the first one is stopped, the folder for weights is gone."""
    started: list[ServerProcess] = []
    start = ServerProcess.start

    def start_one(self: ServerProcess) -> None:
        if started:
            raise OSError("no more processes")
        started.append(self)
        start(self)

    monkeypatch.setattr(ServerProcess, "start", start_one)
    (tmp_path / "weights").mkdir()
    devices = 'rollout.server_devices=["0", "1"]'
    config = make_config("rollout.engine=vllm-server", devices, f"rollout.transfer_dir={tmp_path / 'weights'}")
    with pytest.raises(OSError, match="no more processes"):
        VLLMServerEngine(config, model, [EOS], folder=tmp_path, log=lambda _: None)
    assert not started[0].running
    assert list((tmp_path / "weights").iterdir()) == []


def test_a_server_that_never_answers_is_named_after_the_timeout(model: CarftModel) -> None:
    lines: list[str] = []
    url = f"http://127.0.0.1:{free_port()}"
    config = make_config("rollout.engine=vllm-server", f'rollout.servers=["{url}"]', "rollout.server_timeout_s=6.0")
    with pytest.raises(EngineError, match=rf"{url} did not answer in 6 s .*is it running\?"):
        VLLMServerEngine(config, model, [EOS], folder=None, log=lines.append)
    assert any("waiting for the vLLM server" in line and "of at most 6 s" in line for line in lines)


def test_the_command_line_says_it_in_one_line_and_exits_with_1(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    options = ["rollout.engine=vllm-server", f'rollout.servers=["{url}"]', "rollout.server_timeout_s=1.0"]
    command = [sys.executable, "-m", "carft_fast", "eval", "--config", str(QUICKSTART_CONFIG)]
    command += [word for option in options for word in ("--set", option)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert re.fullmatch(rf"error: the vLLM server at {url} did not answer in 1 s .*\n", result.stderr)
    plan = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=False)
    assert plan.returncode == 0
    assert "vllm-server, 1 server(s), at most 56 tokens" in plan.stdout


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"/health": ""}, "has no /weight_info"),
        ({"/health": "<html>"}, "answered /health with '<html>'"),
        ({"/health": "", "/weight_info": "{}"}, "answered /weight_info without weight_version"),
        (
            {"/health": "", "/weight_info": '{"weight_version": 1}', "/v1/models": '{"data": [{"id": "gpt"}]}'},
            "answered /v1/models without max_model_len",
        ),
    ],
)
def test_something_else_than_vllm_is_told_apart(model: CarftModel, answers: dict[str, str], message: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in answers else 404)
            self.end_headers()
            self.wfile.write(answers.get(self.path, "").encode())

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        config = make_config("rollout.engine=vllm-server", f'rollout.servers=["{url}"]')
        with pytest.raises(EngineError, match=rf"the server at {url} {re.escape(message)}.*carft-fast serve"):
            VLLMServerEngine(config, model, [EOS], folder=None, log=lambda _: None)
        server.shutdown()


@pytest.mark.long
def test_a_server_that_samples_by_its_own_rule_is_refused(
    model: CarftModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = vllm_adapter.engine_options

    def plain(*arguments: Any, **options: Any) -> dict[str, Any]:
        return {name: value for name, value in own(*arguments, **options).items() if name != "worker_cls"}

    with monkeypatch.context() as patch:
        patch.setattr(vllm_adapter, "engine_options", plain)
        config = make_config("rollout.engine=vllm-server", "rollout.drafts=off")
        started = VLLMServerEngine(config, model, [EOS], folder=tmp_path, log=lambda _: None)
    try:
        started.sync(model)  # the run's own is not asked
        config = make_config("rollout.engine=vllm-server", f"rollout.servers={json.dumps(urls(started))}")
        engine = VLLMServerEngine(config, model, [EOS], folder=None, log=lambda _: None)
        with pytest.raises(InputError, match=r"samples by vLLM's own rule.*carft-fast serve"):
            engine.sync(model)
    finally:
        started.close()


def test_a_port_in_use_is_named() -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as busy:
        with pytest.raises(InputError, match=rf"port {busy.server_port} on 127.0.0.1: Address already in use"):
            check_port("127.0.0.1", busy.server_port)
        command = [sys.executable, "-m", "carft_fast", "serve", "--config", str(QUICKSTART_CONFIG)]
        result = subprocess.run(
            [*command, "--port", str(busy.server_port)], capture_output=True, text=True, check=False
        )
    assert result.returncode == 2
    assert f"port {busy.server_port}" in result.stderr


def test_served_by_the_command_line_and_used_by_two_trainers(model: CarftModel, tmp_path: Path) -> None:
    """`carft-fast serve`, then two trainers one after the other: each syncs before it samples.

    Its processes begin as a user's do, none of them a fork.
    """
    port = free_port()
    arguments = ["data.max_length=96", "rollout.batch_size=8", "rollout.kv_cache_gib=0.25"]
    options = [word for argument in arguments for word in ("--set", argument)]
    command = [sys.executable, "-m", "carft_fast", "serve", "--config", str(QUICKSTART_CONFIG), *options]
    with (tmp_path / "serve.log").open("wb") as log:
        path = os.pathsep.join(set(os.environ["PYTHONPATH"].split(os.pathsep)) - {FORKS})
        environment = os.environ | {"PYTHONPATH": path}
        server = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log, env=environment)
    url = f"http://127.0.0.1:{port}"
    config = make_config("rollout.engine=vllm-server", f'rollout.servers=["{url}"]')
    try:
        for seed in (7, 8):
            perturb(model, seed)
            engine = VLLMServerEngine(config, model, [EOS], folder=None, log=lambda _: None)
            with pytest.raises(EngineError, match="sync"):
                engine.generate(PROMPTS, GREEDY)
            engine.sync(model)
            assert_samples_of(model.lm, engine.generate(PROMPTS, GREEDY), GREEDY)
            engine.close()
            assert server.poll() is None  # it is not the trainer's to end
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) is not None


def test_stop_ends_the_whole_group(tmp_path: Path) -> None:
    server = ServerProcess(["--model", "nowhere"], tmp_path / "log", os.environ)
    server.start()
    pid = server.pid
    assert server.running
    server.stop()
    assert not server.running
    assert pid is not None
    assert not Path(f"/proc/{pid}").exists()
