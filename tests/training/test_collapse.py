"""The collapse guard on runs that do collapse: a learning rate a hundred times too high."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config.toml import load_config
from carft_fast.core.console import Console
from carft_fast.core.signals import Stopped
from carft_fast.training.pipeline import prepare, train

COLLAPSING = [
    "sft.max_steps=150",
    "sft.warmup_steps=5",
    "sft.lr=3e-3",
    "rl.lr=3e-2",
    "rl.max_steps=8",
    "rl.batch_size=16",
    "rl.mini_batch_size=8",
    "rl.eval_every=1",
    "rl.save_every=1",
    "rollout.max_new_tokens=32",
    "data.eval_rows=20",
    "guard.window=1",
    "output.keep_last=20",
]


def run(folder: Path, *options: str, resume: bool = False) -> dict[str, Any]:
    config = load_config(str(QUICKSTART_CONFIG), [*COLLAPSING, *options])
    prepared = prepare(config, folder, Console(), stages=("sft", "rl"), resume=resume)
    return train(prepared, ("sft", "rl"), resume=resume)


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in found if r["stage"] == "rl" and r["kind"] == kind]


def test_without_the_guard_the_run_collapses(tmp_path: Path) -> None:
    run(tmp_path)
    extractable = [r["extractable"] for r in records(tmp_path, "train")]
    assert extractable[0] > 0.8
    # whether it recovers by the last step is up to the processor's rounding
    assert max(extractable[1:3]) < 0.5 * extractable[0]
    assert not records(tmp_path, "guard")


def test_stop_ends_the_stage_and_says_why(tmp_path: Path) -> None:
    run(tmp_path, "guard.action=stop")
    (event,) = records(tmp_path, "guard")
    steps = records(tmp_path, "train")
    assert event["action"] == "stop"
    assert "fell to" in event["cause"]
    assert steps[-1]["step"] == event["step"] < 8
    assert records(tmp_path, "eval")[-1]["step"] == event["step"], "the end is evaluated"
    assert (tmp_path / "model" / "config.json").is_file()
    assert event["cause"] in (tmp_path / "console.log").read_text()


@pytest.mark.long
def test_rollback_goes_on_from_the_best_with_a_lower_rate_and_resumes_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["guard.action=rollback", "guard.lr_factor=0.01", "rl.lr_schedule=constant"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, *options)
    event = records(whole, "guard")[0]
    assert event["action"] == "rollback"
    rates = {r["step"]: r["lr"] for r in records(whole, "train")}
    assert rates[event["step"]] == pytest.approx(3e-2)
    assert rates[event["step"] + 1] == pytest.approx(3e-4)
    extractable = {r["step"]: r["extractable"] for r in records(whole, "train")}
    assert extractable[event["step"]] < 0.1
    assert extractable[event["step"] + 1] > 0.8, "the sampler got the weights the run went back to"
    assert event["to"].endswith("sft"), "no evaluated step was better than the start"
    assert len(records(whole, "train")) == 8

    # stopped right after the rollback's step, and gone on with
    from carft_fast.training.loop import StageLoop

    guard = StageLoop.guard_against_collapse

    def then_stop(loop: StageLoop) -> bool:
        went_back = guard(loop)
        if went_back:
            loop._run.stop._signum = signal.SIGTERM
        return went_back

    with monkeypatch.context() as patch:
        patch.setattr(StageLoop, "guard_against_collapse", then_stop)
        with pytest.raises(Stopped):
            run(cut, *options)
    run(cut, *options, resume=True)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (cut, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert [r["cause"] for r in records(cut, "guard")] == [r["cause"] for r in records(whole, "guard")]


def test_rollbacks_run_out(tmp_path: Path) -> None:
    run(tmp_path, "guard.action=rollback", "guard.lr_factor=0.9", "guard.max_rollbacks=1")
    assert [event["action"] for event in records(tmp_path, "guard")] == ["rollback", "stop"]
