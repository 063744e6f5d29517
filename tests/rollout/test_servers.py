"""Servers as they really fail: killed, interrupted, restarted behind the trainer's back, absent, not vLLM at all."""

import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.core.errors import EngineError, InputError
from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.sampler_weights import SamplerWeights
from carft_fast.rollout.base import SamplingParams
from carft_fast.rollout.vllm import adapter as vllm_adapter
from carft_fast.rollout.vllm import http as vllm_http
from carft_fast.rollout.vllm.http import ServerApi, ServerLost
from carft_fast.rollout.vllm.launch import ServerProcess, check_port, free_port
from carft_fast.rollout.vllm.servers import VLLMServerEngine
from carft_fast.rollout.vllm.token import TOKEN, bearer
from carft_fast.rollout.vllm.transfer import DeviceTransfer, FileTransfer

from ..conftest import FORKS
from .checks import EOS, PROMPTS, assert_samples_of, make_config, perturb

GREEDY = SamplingParams(20, temperature=0)
LONG = SamplingParams(80, temperature=1.0, samples_per_prompt=4, seed=2)


def fetch(url: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> str:
    """With the servers' token, unless told otherwise."""
    shown = bearer(os.environ[TOKEN]) if headers is None else headers
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"} | shown)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


def weight_version(url: str) -> str:
    return json.loads(fetch(f"{url}/weight_info"))["weight_version"]


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except OSError:
        return False


def urls(engine: VLLMServerEngine) -> list[str]:
    return [server.url for server in engine._servers]


def everybody_back(engine: VLLMServerEngine) -> None:
    """Servers that are dead are started again, and those that are starting join in, while prompts are sampled."""
    deadline = time.monotonic() + 240
    while not all(server.usable for server in engine._servers) and time.monotonic() < deadline:
        engine.generate(PROMPTS, GREEDY)
        time.sleep(3)  # a server that starts needs the cores
    assert all(server.usable for server in engine._servers)


def call(url: str, *names: str) -> None:
    """Phases of a weight update, by name, as a trainer calls them."""

    async def run() -> None:
        async with ServerApi.open(30, os.environ[TOKEN]) as api:
            for name in names:
                await getattr(api, name)(url)

    asyncio.run(run())


def test_both_servers_work_and_hold_the_version(server_engine: VLLMServerEngine, model: CarftModel) -> None:
    server_engine.sync(model)
    assert {weight_version(url) for url in urls(server_engine)} == {f"{server_engine._run}-{server_engine.version}"}

    def served(url: str) -> float:
        text = fetch(f"{url}/metrics")
        lines = [line for line in text.splitlines() if line.startswith("vllm:generation_tokens_total")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    before = [served(url) for url in urls(server_engine)]
    server_engine.generate(PROMPTS * 2, LONG)
    assert all(served(url) > old for url, old in zip(urls(server_engine), before, strict=True))


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


def processes(group: int) -> Iterator[Path]:
    """Of a process group, in /proc."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(process.name)) == group:
                yield process


def engine_of(server: int) -> int:
    return next(int(p.name) for p in processes(server) if b"EngineCore" in (p / "cmdline").read_bytes())


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


@pytest.mark.long
def test_a_server_killed_while_sampling_loses_and_doubles_nothing(
    server_engine: VLLMServerEngine, server_lines: list[str], model: CarftModel
) -> None:
    server_engine.sync(model)
    expected = server_engine.generate(PROMPTS, LONG)
    victim = server_engine.pids[0]
    said = len(server_lines)
    seen: list[int] = []

    def kill(finished: int) -> None:
        if not seen:
            os.kill(victim, signal.SIGKILL)
        seen.append(finished)

    drafts = [[rollout.completion_ids] for rollout in expected[:: LONG.samples_per_prompt]]
    rollouts = server_engine.generate(PROMPTS, dataclasses.replace(LONG, drafts=drafts), on_progress=kill)
    assert [r.completion_ids for r in rollouts] == [r.completion_ids for r in expected]
    assert sum(r.accepted for r in rollouts) > 0
    assert sum(seen) == len(expected)
    assert any("failed" in line and "wait for another" in line for line in server_lines[said:])
    # another takes its place, and has the weights of now, not those of its start, before it samples
    perturb(model, 1)
    server_engine.sync(model)
    everybody_back(server_engine)
    assert victim not in server_engine.pids
    assert {weight_version(url) for url in urls(server_engine)} == {f"{server_engine._run}-{server_engine.version}"}
    assert_samples_of(model.lm, server_engine.generate(PROMPTS, GREEDY), GREEDY)


@pytest.mark.long
def test_all_servers_killed_come_back_with_the_current_weights(
    server_engine: VLLMServerEngine, server_lines: list[str], model: CarftModel
) -> None:
    server_engine.sync(model)
    expected = server_engine.generate(PROMPTS, LONG)
    perturb(model, 2)  # the trainer's weights move on; the servers come back with those that were synced
    said = len(server_lines)
    killed: list[int] = []

    def kill(_: int) -> None:
        if not killed:
            killed.extend(server_engine.pids)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    rollouts = server_engine.generate(PROMPTS, LONG, on_progress=kill)
    assert [r.completion_ids for r in rollouts] == [r.completion_ids for r in expected]
    assert any("is back, with the current weights" in line for line in server_lines[said:])
    server_engine.sync(model)
    assert_samples_of(model.lm, server_engine.generate(PROMPTS, GREEDY), GREEDY)
    everybody_back(server_engine)  # one was enough for the prompts


@pytest.mark.long
def test_a_server_whose_engine_hangs_at_a_sync_is_replaced(
    server_engine: VLLMServerEngine, model: CarftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of it answers."""
    monkeypatch.setattr(vllm_http, "ENGINE_S", 10.0)
    server_engine.sync(model)
    victim = server_engine.pids[0]
    os.kill(engine_of(victim), signal.SIGSTOP)
    server_engine.sync(model)
    assert victim not in server_engine.pids
    assert_samples_of(model.lm, server_engine.generate(PROMPTS, GREEDY), GREEDY)
    everybody_back(server_engine)


@pytest.mark.long
def test_a_server_whose_engine_hangs_while_sampling_is_replaced(
    server_engine: VLLMServerEngine, server_lines: list[str], model: CarftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_http, "ENGINE_S", 10.0)
    server_engine.sync(model)
    expected = server_engine.generate(PROMPTS, LONG)
    victims = server_engine.pids
    engines = [engine_of(victim) for victim in victims]
    said = len(server_lines)

    def stop(_: int) -> None:
        while engines:
            os.kill(engines.pop(), signal.SIGSTOP)

    rollouts = server_engine.generate(PROMPTS, LONG, on_progress=stop)
    assert [r.completion_ids for r in rollouts] == [r.completion_ids for r in expected]
    assert any("is back, with the current weights" in line for line in server_lines[said:])
    everybody_back(server_engine)
    assert not set(victims) & set(server_engine.pids)


def test_weights_that_do_not_arrive_whole_are_never_served(
    server_engine: VLLMServerEngine, model: CarftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transfer breaks off in the middle of the servers' own loading."""
    server_engine.sync(model)
    perturb(model, 3)
    stage = FileTransfer.stage

    def lose_the_last_file(self: FileTransfer, weights: SamplerWeights, version: str, adapters: None) -> None:
        stage(self, weights, version, adapters)
        self._files[-1].write_bytes(self._files[-1].read_bytes()[:100])

    with monkeypatch.context() as patch:
        patch.setattr(FileTransfer, "stage", lose_the_last_file)
        with pytest.raises(EngineError, match="no vLLM server took the weights"):
            server_engine.sync(model)
    assert {weight_version(url) for url in urls(server_engine)} == {"incomplete"}
    with pytest.raises(EngineError, match="last weight sync did not finish"):
        server_engine.generate(PROMPTS, GREEDY)
    server_engine.sync(model)
    assert_samples_of(model.lm, server_engine.generate(PROMPTS, GREEDY), GREEDY)


@pytest.mark.parametrize("phases", [("open_update",), ("open_update", "start_update")])
def test_an_update_another_trainer_left_open_is_noticed_and_ended(
    server_engine: VLLMServerEngine, model: CarftModel, phases: tuple[str, ...]
) -> None:
    server_engine.sync(model)
    for url in urls(server_engine):
        call(url, *phases)
    # noticed while sampling, though this engine's own sync was whole: the servers get the weights again
    assert_samples_of(model.lm, server_engine.generate(PROMPTS, GREEDY), GREEDY)
    for url in urls(server_engine):
        call(url, *phases)
    perturb(model, 4)
    server_engine.sync(model)
    assert_samples_of(model.lm, server_engine.generate(PROMPTS, GREEDY), GREEDY)


@pytest.mark.long
def test_a_training_step_is_completed_though_a_server_is_killed_in_it(
    server_engine: VLLMServerEngine, model: CarftModel, tmp_path: Path, tiny_run: list[str]
) -> None:
    """A real run on servers it did not start, one of which dies for good while it samples the first step."""
    server_engine.sync(model)
    victim = server_engine.pids[1]
    victim_url = urls(server_engine)[1]

    def kill_when_sampling() -> None:
        while True:
            text = fetch(f"{victim_url}/metrics")
            running = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
            version = weight_version(victim_url)
            if any(float(line.rsplit(" ", 1)[1]) > 0 for line in running) and version != own_version:
                os.killpg(victim, signal.SIGKILL)
                return

    own_version = weight_version(victim_url)
    killer = threading.Thread(target=kill_when_sampling, daemon=True)
    killer.start()
    servers = json.dumps(urls(server_engine))
    options = [*tiny_run, "--set", "rl.max_steps=2", "--set", "rl.eval_every=1", "--set", "rollout.engine=vllm-server"]
    options += ["--set", "data.max_length=96", "--set", "rollout.batch_size=8", "--set", f"rollout.servers={servers}"]
    command = [sys.executable, "-m", "carft_fast", "rl", "--config", str(QUICKSTART_CONFIG), *options]
    result = subprocess.run(
        [*command, "--output-dir", str(tmp_path / "run")], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    killer.join(10)
    assert not killer.is_alive()
    assert re.search(rf"{victim_url} (failed|does not answer)", result.stdout)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in train] == [1, 2]
    for record in train:
        assert record["staleness"] == 0
        assert record["sampler_diff_max"] < 1e-4
    evaluated = [record["rows"] for record in records if record["kind"] == "eval"]
    assert evaluated == [20, 20, 20]
    server_engine.sync(model)
    everybody_back(server_engine)


@pytest.mark.long
def test_a_trainer_that_is_killed_leaves_no_server_and_no_weights(model: CarftModel, tmp_path: Path) -> None:
    """Its server ends by itself; the weights it staged go when the next trainer starts."""
    vllm_adapter.write_model_folder(model.lm.config, tmp_path / "model")
    options = vllm_adapter.engine_options(make_config("rollout.engine=vllm-server"), "cpu", dedicated=True)
    arguments = vllm_adapter.server_arguments(options, tmp_path / "model", "files")
    script = tmp_path / "trainer.py"
    script.write_text(
        "import os, time\n"
        "from pathlib import Path\n"
        "from carft_fast.rollout.vllm.transfer import FileTransfer\n"
        "from carft_fast.rollout.vllm.launch import ServerProcess\n"
        f"transfer = FileTransfer({str(tmp_path)!r})\n"
        f"server = ServerProcess({arguments!r}, Path({str(tmp_path / 'log')!r}), os.environ)\n"
        "server.start()\n"
        "print(server.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    trainer = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    server = int(trainer.stdout.readline())
    assert len(list(tmp_path.glob("carft-weights-*"))) == 1
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{server}").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not Path(f"/proc/{server}").exists()
    transfer = FileTransfer(str(tmp_path))
    assert len(list(tmp_path.glob("carft-weights-*"))) == 1
    transfer.close()
    assert not list(tmp_path.glob("carft-weights-*"))


def test_weights_of_another_machines_trainer_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that machines share: a name may end like another one's."""
    monkeypatch.setattr(platform, "node", lambda: "node1")
    gone = 2**22 + 1  # no process id
    theirs, own = (tmp_path / f"carft-weights-{gone}-{machine}-abcd_012" for machine in ("gpu-node1", "node1"))
    theirs.mkdir()
    own.mkdir()
    FileTransfer(str(tmp_path)).close()
    assert theirs.is_dir()
    assert not own.exists()


def test_a_full_disk_is_named_with_what_to_do(model: CarftModel, tmp_path: Path) -> None:
    transfer = FileTransfer(str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(EngineError, match=rf"could not be written to {tmp_path}.*set rollout\.transfer_dir"):
            transfer.stage(SamplerWeights(model.lm, torch.float32), "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        transfer.close()


def test_servers_that_come_back_together_are_sent_to_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a group of its own, which the next one's ends. The sender stands for vLLM's, which needs GPUs."""
    events: list[str] = []

    class Sender:
        def __init__(self, *_: Any, **__: Any) -> None:
            events.append("group")

        def send_weights(self) -> None:
            events.append("begin")
            time.sleep(0.3)
            events.append("end")

        def shutdown(self) -> None:
            events.append("shutdown")

    class Api:
        async def nothing(self, *_: Any) -> None:
            pass

        async def world_size(self, _: str) -> int:
            return 1

        open_update = close_update = nothing

    monkeypatch.setattr(vllm_adapter, "device_sender", Sender)
    monkeypatch.setattr(vllm_adapter, "transfer_source", lambda _: None)
    transfer = DeviceTransfer("nccl", 5.0, None)
    transfer.stage(cast(Any, ()), "1")

    async def both() -> None:
        api = cast(Any, Api())
        await asyncio.gather(*(transfer.send(api, [f"http://127.0.0.1:{port}"]) for port in (1, 2)))

    asyncio.run(both())
    assert events == ["group", "begin", "end", "shutdown", "group", "begin", "end"]


def test_a_server_that_dies_before_a_device_transfer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is paused, then does not say how many GPUs it has: the others get the weights."""
    gone, alive = (f"http://127.0.0.1:{port}" for port in (1, 2))
    groups: list[int] = []

    class Sender:
        def __init__(self, *_: Any, world_size: int, **__: Any) -> None:
            groups.append(world_size)

        def send_weights(self) -> None:
            pass

    class Api:
        async def nothing(self, *_: Any) -> None:
            pass

        async def world_size(self, url: str) -> int:
            if url == gone:
                raise ServerLost("no answer")
            return 4

        open_update = close_update = nothing

    monkeypatch.setattr(vllm_adapter, "device_sender", Sender)
    monkeypatch.setattr(vllm_adapter, "transfer_source", lambda _: None)
    transfer = DeviceTransfer("nccl", 5.0, None)
    transfer.stage(cast(Any, ()), "1")
    lost = asyncio.run(transfer.send(cast(Any, Api()), [gone, alive]))
    assert set(lost) == {gone}
    assert groups == [1 + 4]


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


def test_a_server_with_a_shorter_context_is_refused(server_engine: VLLMServerEngine, model: CarftModel) -> None:
    servers = json.dumps(urls(server_engine))
    config = make_config("rollout.engine=vllm-server", f"rollout.servers={servers}", "data.max_length=128")
    with pytest.raises(InputError, match=r"takes 96 tokens; data\.max_length is 128"):
        VLLMServerEngine(config, model, [EOS], folder=None, log=lambda _: None)


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
