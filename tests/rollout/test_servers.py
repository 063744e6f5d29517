"""Servers as they really fail while a trainer uses them: killed, hanging, with weights that did not arrive whole."""

import asyncio
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.core.errors import EngineError
from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.sampler_weights import SamplerWeights
from carft_fast.rollout.base import SamplingParams
from carft_fast.rollout.vllm import adapter as vllm_adapter
from carft_fast.rollout.vllm import http as vllm_http
from carft_fast.rollout.vllm.http import ServerApi
from carft_fast.rollout.vllm.servers import VLLMServerEngine
from carft_fast.rollout.vllm.token import TOKEN
from carft_fast.rollout.vllm.transfer import FileTransfer

from .checks import PROMPTS, assert_samples_of, make_config, perturb
from .probes import fetch, processes, urls

GREEDY = SamplingParams(20, temperature=0)
LONG = SamplingParams(80, temperature=1.0, samples_per_prompt=4, seed=2)


def weight_version(url: str) -> str:
    return json.loads(fetch(f"{url}/weight_info"))["weight_version"]


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


def engine_of(server: int) -> int:
    return next(int(p.name) for p in processes(server) if b"EngineCore" in (p / "cmdline").read_bytes())


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
