"""Updates whose gradient is not finite: not applied, counted, their rows kept, and an end to it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config.toml import load_config
from carft_fast.core.console import Console
from carft_fast.core.errors import TrainingError
from carft_fast.objective.passes import PackedPasses
from carft_fast.training.pipeline import prepare, train

from ..conftest import TINY_RUN
from .stepcase import quick_config, random_case, take_apart


def optimised(*, poisoned: bool, minis: slice) -> tuple[dict[str, Tensor], Any, dict[str, Any]]:
    """Weights, result and moments' counts after one step whose second mini-batch may hold a NaN."""
    options = ["rl.mini_batch_size=6", "rl.ppo_epochs=1", 'contrastive.mode="none"', 'reward.partial="constant"']
    case = random_case(8, "mixed")
    parts = take_apart(quick_config(*options), case)
    experience = parts.experience._replace(plan=[parts.plan[0][minis]])
    advantages = parts.advantages
    if poisoned:
        lengths = case.samples.rollouts.lengths
        row = parts.plan[0][1].rows[2]
        advantages.advantage_C[sum(lengths[:row])] = math.nan
    optimizer = torch.optim.AdamW(parts.policy.parameters(), lr=1e-3, fused=True)
    correct = [g.correct for g in case.grades]
    parts.learner.optimizer = optimizer
    found = parts.step.update(experience, advantages, correct, 1e-3)
    weights = {name: p.detach().clone() for name, p in parts.policy.named_parameters()}
    return weights, (found, parts), optimizer.state


def test_the_poisoned_update_leaves_no_trace_and_the_others_count() -> None:
    weights, (found, parts), state = optimised(poisoned=True, minis=slice(None))
    expected, _, expected_state = optimised(poisoned=False, minis=slice(1))  # the first mini-batch alone
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for ours, theirs in zip(state.values(), expected_state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert found.metrics["skipped_updates"] == 1
    assert found.skipped_rows == sorted(parts.plan[0][1].rows)
    assert math.isnan(found.metrics["loss"])


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """SFT losses of these steps (from 0) become infinite."""
    calls = {"step": -1}
    micro_batches, cross_entropy = PackedPasses.micro_batches, PackedPasses.cross_entropy

    def count(self: Any, *arguments: Any) -> Any:
        calls["step"] += 1
        return micro_batches(self, *arguments)

    def infinite(self: Any, *arguments: Any, **named: Any) -> Tensor:
        return cross_entropy(self, *arguments, **named) * (math.inf if calls["step"] in steps else 1.0)

    monkeypatch.setattr(PackedPasses, "micro_batches", count)
    monkeypatch.setattr(PackedPasses, "cross_entropy", infinite)


def run(folder: Path) -> list[dict[str, Any]]:
    config = load_config(str(QUICKSTART_CONFIG), TINY_RUN)
    prepared = prepare(config, folder, Console(), stages=("sft",))
    train(prepared, ("sft",), resume=False)
    return prepared.metrics.find("sft", "train")


def test_a_run_goes_on_behind_a_bad_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {1, 2, 4})
    steps = run(tmp_path)
    assert [r["skipped_updates"] for r in steps] == [0, 1, 1, 0, 1, 0]
    assert math.isfinite(steps[-1]["loss"])
    rows = [json.loads(line) for line in (tmp_path / "samples" / "sft-nonfinite-000002.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert rows[0]["question"].endswith("have now?")
    assert "a loss or gradient was not finite" in (tmp_path / "console.log").read_text()


def test_three_bad_steps_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {1, 2, 3})
    with pytest.raises(TrainingError, match=r"in each of the last 3 steps \(sft\.max_skipped_steps\)"):
        run(tmp_path)
    assert (tmp_path / "checkpoints" / "sft-000002").is_dir(), "the last checkpoint stays"
    assert not (tmp_path / "summary.json").exists()
