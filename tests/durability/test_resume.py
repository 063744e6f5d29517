"""Kill it, resume it: the weights and the records must come out bit for bit as if nothing had happened."""

import dataclasses
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from carft_fast.core.console import Console
from carft_fast.core.signals import Stopped
from carft_fast.models.causal_lm import CarftModel
from carft_fast.rollout.stream import RolloutStream
from carft_fast.training.checkpoint import CheckpointStore
from carft_fast.training.evaluation import EvalResult, evaluate
from carft_fast.training.pipeline import prepare, train

from ..processes import Command
from ..training.runs import run_pipeline, tiny_config

TIMEOUT_SECONDS = 180


def launch(folder: Path, options: list[str], *extra: str) -> Command:
    return Command(["quickstart", "--output-dir", str(folder), *options, *extra])


def finish(process: Command) -> tuple[int, str]:
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode is not None
    return process.returncode, output


def digests(folder: Path) -> dict[str, str]:
    names = (
        "sft/model.safetensors",
        "sft/carft_heads.safetensors",
        "model/model.safetensors",
        "model/carft_heads.safetensors",
    )
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def records(folder: Path) -> list[dict[str, object]]:
    """The metrics without their wall-clock seconds and their shares."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "shares")} for line in lines]


def wait_for(process: Command, folder: Path, name: str) -> None:
    """Until a file or folder of this name exists below the run folder; polls fast, to catch a write in the act."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if any(name in folders or name in files for _, folders, files in os.walk(folder)):
            return
        time.sleep(0.0005)
    pytest.fail(f"{name} never appeared: {finish(process)}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_run: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, output = finish(launch(folder, tiny_run))
    assert code == 0, output
    return folder


def assert_same_outcome(folder: Path, reference: Path) -> None:
    assert digests(folder) == digests(reference)
    assert records(folder) == records(reference)
    assert not list(folder.rglob(".writing-*"))


def test_two_processes_on_one_folder(tmp_path: Path, tiny_run: list[str]) -> None:
    """The second is refused, whether it resumes or starts; a kill lets go of the folder."""
    folder = tmp_path / "run"
    first = launch(folder, tiny_run)
    wait_for(first, folder, "sft-000002")
    first.send_signal(signal.SIGSTOP)
    try:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for extra in (["--resume"], [], ["--resume", "--dry-run"]):
            code, output = finish(launch(folder, tiny_run, *extra))
            assert (code, output.count("\n")) == (2, 1), output
            assert output.startswith(f"error: --output-dir: {folder} is in use by process {first.pid} on ")
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    finally:
        first.kill()
        first.communicate()
    code, output = finish(launch(folder, tiny_run, "--resume", "--dry-run"))
    assert code == 0, output


@pytest.mark.long
def test_sigkill_at_random_moments(uninterrupted: Path, tmp_path: Path, tiny_run: list[str]) -> None:
    folder = tmp_path / "run"
    rng = random.Random(0)
    kills = 0
    for attempt in range(12):
        process = launch(folder, tiny_run, *(["--resume"] if (folder / "config.toml").exists() else []))
        wait_for(process, folder, "config.toml")  # imports are over, work begins
        try:
            code, output = process.wait(timeout=rng.uniform(0.2, 3.0)), ""
        except subprocess.TimeoutExpired:
            if attempt < 8:
                process.kill()
                process.communicate()
                kills += 1
                continue
            code, output = finish(process)
        assert code == 0, output or process.communicate()[0]
        if (folder / "summary.json").exists():
            break
    assert kills >= 2, "the run was too quick to be killed: the test tests nothing"
    assert_same_outcome(folder, uninterrupted)


@pytest.mark.long
@pytest.mark.parametrize("name", [".writing-sft-000004", ".writing-rl-000002", ".writing-sft", ".writing-model"])
def test_sigkill_while_a_checkpoint_is_written(
    uninterrupted: Path, tmp_path: Path, tiny_run: list[str], name: str
) -> None:
    folder = tmp_path / "run"
    process = launch(folder, tiny_run)
    wait_for(process, folder, name)
    process.kill()
    process.communicate()
    code, output = finish(launch(folder, tiny_run, "--resume"))
    assert code == 0, output
    assert_same_outcome(folder, uninterrupted)


@pytest.mark.long
@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stop_request_saves_first(
    uninterrupted: Path, tmp_path: Path, tiny_run: list[str], signum: signal.Signals, exit_code: int
) -> None:
    folder = tmp_path / "run"
    options = [*tiny_run, "--set", "rl.save_every=100"]  # nothing but the stop request saves
    process = launch(folder, options)
    wait_for(process, folder, "rl-000001.jsonl")  # samples of the first RL step
    process.send_signal(signum)
    code, output = finish(process)
    assert code == exit_code, output
    assert "Traceback" not in output
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith("rl-"))
    assert saved, output
    assert saved[-1] != "rl-000004", "the run was over before the signal: the test tests nothing"
    code, output = finish(launch(folder, options, "--resume"))
    assert code == 0, output
    assert f"resumed at step {int(saved[-1].removeprefix('rl-'))}" in output
    assert_same_outcome(folder, uninterrupted)


def test_a_stop_between_update_and_the_count_of_it_waits(tmp_path: Path, tiny_run: list[str], monkeypatch: Any) -> None:
    """An engine's word at a weight sync is no safe point: saved there, the step's update would be made twice."""
    run_pipeline(tmp_path / "whole", tiny_config(tiny_run))
    config, folder = tiny_config(tiny_run), tmp_path / "cut"
    prepared = prepare(config, folder, Console(), stages=("sft", "rl"))
    sync, calls = RolloutStream.sync, itertools.count()

    def stopped(self: RolloutStream, model: CarftModel) -> None:
        sync(self, model)
        if next(calls) == 1:
            prepared.stop._signum = signal.SIGTERM
            prepared.stop.check()  # as Run.sampler's log does

    with monkeypatch.context() as patch:
        patch.setattr(RolloutStream, "sync", stopped)
        with pytest.raises(Stopped):
            train(prepared, ("sft", "rl"), resume=False)
    assert (folder / "checkpoints" / "rl-000002").is_dir()
    train(prepare(config, folder, Console(), stages=("sft", "rl"), resume=True), ("sft", "rl"), resume=True)
    for name in ("model.safetensors", "carft_heads.safetensors"):
        assert (folder / "model" / name).read_bytes() == (tmp_path / "whole" / "model" / name).read_bytes()


def test_a_kill_between_a_checkpoint_and_the_best_link(tmp_path: Path, tiny_run: list[str], monkeypatch: Any) -> None:
    """The evaluation is on record by then: the link is set when the run goes on."""
    config, folder = tiny_config(tiny_run, "rl.eval_every=1"), tmp_path / "run"
    accuracies = iter([0.0, 0.1, 0.2, 0.9, 0.3, 0.4])  # SFT's start and end, then every step

    def forced(*arguments: Any) -> EvalResult:
        result = evaluate(*arguments)
        return dataclasses.replace(result, metrics=result.metrics | {"accuracy": next(accuracies)})

    def killed(self: CheckpointStore, target: Path, best: bool) -> None:
        if target.name == "rl-000002":
            raise KeyboardInterrupt
        settle(self, target, best)

    settle = CheckpointStore._settle
    monkeypatch.setattr("carft_fast.training.run.evaluate", forced)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "_settle", killed)
        with pytest.raises(KeyboardInterrupt):
            train(prepare(config, folder, Console(), stages=("sft", "rl")), ("sft", "rl"), resume=False)
    assert (folder / "checkpoints" / "rl-000002").is_dir()
    train(prepare(config, folder, Console(), stages=("sft", "rl"), resume=True), ("sft", "rl"), resume=True)
    assert os.readlink(folder / "checkpoints" / "best") == "rl-000002"


def test_resume_of_a_finished_run_changes_nothing(uninterrupted: Path, tiny_run: list[str]) -> None:
    before = digests(uninterrupted)
    code, output = finish(launch(uninterrupted, tiny_run, "--resume"))
    assert code == 0, output
    assert "finished" in output
    assert digests(uninterrupted) == before


LORA = ["--set", "lora.rank=4", "--set", "sft.lr=1e-2", "--set", "rl.lr=1e-2"]


@pytest.mark.long
def test_lora_leaves_a_plain_model_and_resumes_to_the_bit(tmp_path: Path, tiny_run: list[str]) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, output = finish(launch(whole, [*tiny_run, *LORA]))
    assert code == 0, output
    process = launch(killed, [*tiny_run, *LORA])
    wait_for(process, killed, "rl-000002")
    process.kill()
    process.communicate()
    code, output = finish(launch(killed, [*tiny_run, *LORA], "--resume"))
    assert code == 0, output
    assert_same_outcome(killed, whole)
    # the checkpoint is what peft reads, on top of what the stage started from; the result needs no peft
    base = transformers.AutoModelForCausalLM.from_pretrained(whole / "sft")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        start = base(ids).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(whole / "model")(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, str(whole / "checkpoints" / "rl-000004"))(ids).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    assert (merged - start).abs().max() > 1e-2
    assert not (whole / "checkpoints" / "rl-000004" / "model.safetensors").exists()
