"""Whole runs of what a config can choose: estimators, LoRA, and the plain path on the quickstart's own task."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from carft_fast.core.console import Console
from carft_fast.core.errors import InputError
from carft_fast.rollout.base import Rollout, RolloutEngine, SamplingParams
from carft_fast.rollout.engines import build_engine
from carft_fast.training.pipeline import prepare, train
from carft_fast.training.run import Run

from .runs import records, run_pipeline, tiny_config

GROUPS = ["rollout.samples_per_prompt=4", "rl.kl_coef=0.0", 'contrastive.mode="none"', 'reward.partial="constant"']


@pytest.mark.parametrize("estimator", ["dr_grpo", "grpo"])
def test_group_methods_run_without_a_value_head(tmp_path: Path, tiny_run: list[str], estimator: str) -> None:
    options = [*GROUPS, f"rl.estimator={estimator}", "rl.max_steps=2", "rl.share_prompts=true"]
    options += ["rl.kl_loss_coef=0.1"] * (estimator == "grpo")
    summary = run_pipeline(tmp_path / "run", tiny_config(tiny_run, *options))
    assert summary["method"] == estimator
    for record in records(tmp_path / "run", "rl", "train"):
        assert not {"value_loss", "explained_variance", "cosine", "contrastive_loss"} & set(record)
        assert record["sampler_diff_max"] < 1e-4
        assert record["completion_tokens"] >= 12
    heads = [(tmp_path / "run" / name / "carft_heads.safetensors").read_bytes() for name in ("sft", "model")]
    assert heads[0] == heads[1], "nobody trained the heads"
    weights = [(tmp_path / "run" / name / "model.safetensors").read_bytes() for name in ("sft", "model")]
    assert (weights[0] != weights[1]) == any(r["grad_norm"] > 0 for r in records(tmp_path / "run", "rl", "train"))


def test_rloo_with_ratios_of_sequences_runs(tmp_path: Path, tiny_run: list[str]) -> None:
    options = [*GROUPS, "rl.estimator=rloo", "rl.max_steps=2", "rl.ratio=sequence", "rl.dual_clip=3.0"]
    options += ["rl.kl_loss_coef=0.1", "rl.kl_estimate=k2", "rl.kl_clamp=10.0", "reward.ignore_think=true"]
    run_pipeline(tmp_path / "run", tiny_config(tiny_run, *options))
    for record in records(tmp_path / "run", "rl", "train"):
        assert math.isfinite(record["policy_loss"])
        assert record["sampler_ess"] == pytest.approx(1, abs=1e-6), "trainer and sampler agree"


class Replay:
    """Samples like the engine it wraps and keeps the result; with a record it answers from that instead."""

    def __init__(self, engine: RolloutEngine, record: list[list[Rollout]] | None) -> None:
        self._engine, self._record, self.kept = engine, record, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, **options: Any) -> list[Rollout]:
        if self._record is None:
            self.kept.append(self._engine.generate(prompts, sampling, **options))
            return self.kept[-1]
        return self._record.pop(0)


@pytest.mark.long
def test_the_quickstart_follows_the_same_curve_on_both_paths(
    tmp_path: Path, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFT to where some answers are right, then 20 CARFT steps on the fast path and on the plain one.

    The second run gets the first one's samples: sampled again, a rounding error would once in a while flip a token and
    the runs would part for a reason that is none.
    """
    from carft_fast.cli import QUICKSTART_CONFIG
    from carft_fast.config.toml import load_config

    size = ["rl.batch_size=32", "rl.mini_batch_size=16", "rl.max_steps=20", "data.eval_rows=20"]
    size += ["sft.max_steps=180", "sft.save_every=1000", "rl.eval_every=20", "rl.save_every=20"]
    config = load_config(str(QUICKSTART_CONFIG), size)
    run_pipeline(tmp_path / "start", config, ("sft",))
    engines: list[Replay] = []
    record: list[list[Rollout]] | None = None

    def sampler(self: Run, model: Any) -> RolloutEngine:
        if self._engine is None:
            engines.append(Replay(build_engine(self.config, model, self.tokenizer), record))
            self._engine = engines[-1]
        return self._engine

    monkeypatch.setattr(Run, "sampler", sampler)
    for impl in ("fast", "padded"):
        options = [*size, f"model.path={tmp_path / 'start' / 'sft'}", f"model.impl={impl}"]
        prepared = prepare(load_config(str(QUICKSTART_CONFIG), options), tmp_path / impl, Console(), stages=("rl",))
        train(prepared, ("rl",), resume=False)
        record = engines[0].kept
    ours, plain = (records(tmp_path / impl, "rl", "train") for impl in ("fast", "padded"))
    assert len(ours) == len(plain) == 20
    assert [r["train_accuracy"] for r in ours] == [r["train_accuracy"] for r in plain]
    assert sum(r["contrastive_loss"] > 0 for r in ours) >= 15, (
        "the task was too hard: most steps had no contrastive term"
    )
    for a, b in zip(ours, plain, strict=True):
        for name in ("loss", "policy_loss", "value_loss", "contrastive_loss", "kl", "entropy", "cosine", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-2, abs=1e-4), (a["step"], name)
    moved = [json.dumps(r["value_loss"]) for r in ours]
    assert len(set(moved)) == 20


def test_the_estimator_needs_what_it_compares(tiny_run: list[str]) -> None:
    def refused(*options: str) -> str:
        with pytest.raises(InputError) as error:
            tiny_config(tiny_run, *options)
        return str(error.value)

    assert "samples_per_prompt must be at least 2, this is 1" in refused("rl.estimator=grpo", "rl.kl_coef=0.0")
    assert "rl.kl_coef = 0.05 is a per-token reward" in refused("rl.estimator=grpo", "rollout.samples_per_prompt=4")
    assert 'rl.share_prompts = true needs model.attention = "packed"' in refused(
        "rl.share_prompts=true", "model.attention=sdpa"
    )
    assert "needs rollout.top_p = 1 and top_k = 0, these are 0.9 and 0" in refused(
        "rl.old_logprobs=sampled", "rollout.top_p=0.9"
    )
    assert 'model.impl = "padded" needs rollout.top_p = 1 and top_k = 0, these are 1 and 5' in refused(
        "model.impl=padded", "rollout.top_k=5"
    )
    assert 'rollout.correction = "masked" needs rl.old_logprobs = "recompute"' in refused(
        "rl.old_logprobs=sampled", "rollout.correction=masked"
    )
    assert "rl.micro_batch_tokens = 100 must be at least data.max_length = 160" in refused("rl.micro_batch_tokens=100")


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_lora_where_the_losses_would_not_see_it_is_refused(tmp_path: Path, tiny_run: list[str], module: str) -> None:
    """The quickstart's embedding is its LM head's weight."""
    config = tiny_config(tiny_run, "lora.rank=4", f'lora.target_modules=["q_proj", "{module}"]')
    with pytest.raises(InputError, match=r"lora\.target_modules = .* an adapter on the model's .*LM head"):
        run_pipeline(tmp_path / "run", config)


def test_kl_is_known_without_a_forward_for_it(
    tmp_path: Path, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one update a step nothing else reads old log-probs; a correction that corrects nothing has them computed."""
    (tmp_path / "vowels.py").write_text("def score(texts, examples):\n    return [text.count('e') for text in texts]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    size = [*GROUPS, "rl.estimator=grpo", "rl.kl_loss_coef=0.1", "rl.ppo_epochs=1", "rl.mini_batch_size=12"]
    size += ["rl.batch_size=12", "rl.max_steps=3", "rl.lr=1e-2", "reward.fn=vowels:score"]
    looked = ["rollout.correction=masked", "rollout.correction_floor=1e-6", "rollout.correction_cap=1e6"]
    found = []
    for name, options in (("plain", []), ("looked", looked)):
        run_pipeline(tmp_path / name, tiny_config(tiny_run, *size, *options))
        found.append([record["kl"] for record in records(tmp_path / name, "rl", "train")])
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-5)
    assert abs(found[0][2]) > 1e-3
    with pytest.raises(InputError, match=r"guard\.kl_max = 0\.5 needs a reference"):
        tiny_config(tiny_run, *GROUPS, "rl.estimator=dr_grpo", "guard.action=stop", "guard.kl_max=0.5")


def test_lora_modules_the_model_lacks_are_named(tmp_path: Path, tiny_run: list[str]) -> None:
    config = tiny_config(tiny_run, "lora.rank=4", 'lora.target_modules=["no_such_proj"]')
    with pytest.raises(InputError, match=r"lora\.target_modules = \['no_such_proj'\]"):
        run_pipeline(tmp_path / "run", config)
