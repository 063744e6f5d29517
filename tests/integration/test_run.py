"""A tiny run of the whole pipeline: what it leaves, and the invariants of its steps."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from carft_fast.advantage import ppo_advantages
from carft_fast.config import Config, RlConfig, load_config
from carft_fast.console import Console
from carft_fast.losses import contrastive_loss
from carft_fast.metrics import METRICS, PHASES
from carft_fast.model import load_model
from carft_fast.pipeline import prepare, train
from carft_fast.prompts import EncodedExample, PromptFormat
from carft_fast.rollout import Rollout
from carft_fast.synthetic import build_tokenizer, make_task
from carft_fast.train_rl import Update, collect_experience, grade_all, plan_epoch, score_rollouts

CPU = torch.device("cpu")


def tiny_config(tiny_run: list[str], *overrides: str) -> Config:
    from carft_fast.cli import QUICKSTART_CONFIG

    return load_config(str(QUICKSTART_CONFIG), [*tiny_run[1::2], *overrides])


def run_pipeline(folder: Path, config: Config, stages: tuple[str, ...] = ("sft", "rl")) -> dict[str, Any]:
    prepared = prepare(config, folder, Console(), stages=stages)
    return train(prepared, stages, resume=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_run: list[str]) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run_pipeline(folder, tiny_config(tiny_run))


def records(folder: Path, stage: str, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if (r["stage"], r["kind"]) == (stage, kind)]


def test_what_a_run_leaves(finished: tuple[Path, dict[str, Any]], tiny_run: list[str]) -> None:
    folder, summary = finished
    assert load_config(str(folder / "config.toml")) == tiny_config(tiny_run)
    run = json.loads((folder / "run.json").read_text())
    assert run["seed"] == 0
    assert run["versions"]["torch"] == torch.__version__
    assert json.loads((folder / "summary.json").read_text()) == summary
    wanted = "method seed sft_accuracy final_accuracy eval_rows accuracy_ci95 seconds_total seconds_by_phase"
    assert set(wanted.split()) | {"completion_tokens", "versions"} <= set(summary)
    assert (summary["method"], summary["eval_rows"]) == ("carft", 20)
    assert [r["step"] for r in records(folder, "sft", "train")] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records(folder, "rl", "train")] == [1, 2, 3, 4]
    assert [r["step"] for r in records(folder, "sft", "eval")] == [0, 6]
    assert [r["step"] for r in records(folder, "rl", "eval")] == [2, 4]
    assert sum(r["completion_tokens"] for r in records(folder, "rl", "train")) == summary["completion_tokens"]
    for path in (folder / "console.log", folder / "report.md", *folder.glob("plots/*.png")):
        assert path.stat().st_size > 100
    curves = {
        "reward",
        "accuracy",
        "kl",
        "entropy",
        "completion_length",
        "contrastive_loss",
        "cosine",
        "seconds_per_phase",
    }
    assert curves <= {path.stem for path in (folder / "plots").iterdir()}
    report = (folder / "report.md").read_text()
    for target in re.findall(r"\]\((\S+?)\)", report):
        assert (folder / target).is_file(), target
    samples = (folder / "samples" / "rl-000004.jsonl").read_text().splitlines()
    assert len(samples) == 8
    assert {"question", "completion", "target", "reward"} <= set(json.loads(samples[0]))


def test_tensorboard_holds_the_records(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    events = EventAccumulator(str(folder / "tensorboard" / "rl"))
    events.Reload()
    logged = {e.step: e.value for e in events.Scalars("train/reward")}
    assert logged == pytest.approx({r["step"]: r["reward"] for r in records(folder, "rl", "train")}, rel=1e-6)


def test_checkpoints_are_plain_models_and_old_ones_go(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir() if not path.is_symlink())
    best = (folder / "checkpoints" / "best").resolve().name
    assert {"rl-000003", "rl-000004", best} == set(kept)
    for path in (folder / "model", folder / "sft", folder / "checkpoints" / "rl-000004"):
        transformers.AutoModelForCausalLM.from_pretrained(path)
        transformers.AutoTokenizer.from_pretrained(path)
        assert (path / "carft_heads.safetensors").is_file()
        assert not list(path.glob("*.bin"))
        assert not list(path.glob("*.pt"))


def test_every_step_keeps_the_invariants(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    steps = records(folder, "rl", "train")
    for r in steps:
        assert r["first_ratio_error"] == 0.0, "the first forward of an update must repeat the old log-probs bit for bit"
        assert r["sampler_diff_max"] < 1e-4
        assert all(math.isfinite(v) for v in r.values() if isinstance(v, float))
        assert abs(r["cosine"]) <= 1 + 1e-6
        if r["train_accuracy"] == 0:
            assert r["contrastive_loss"] == 0.0
            assert "cosine_correct" not in r
    assert any(r["train_accuracy"] == 0 for r in steps), "no step without a correct rollout: that check ran on nothing"
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-6), "policy and reference start as one"
    assert {"rollout", "reward", "forward", "update", "sync"} <= set(steps[0]["seconds"])


def test_metrics_are_documented() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "runs.md").read_text()
    for name in (*METRICS, *PHASES):
        assert f"| `{name}` |" in text, name


def test_reft_is_the_same_loop(tmp_path: Path, tiny_run: list[str]) -> None:
    config = tiny_config(
        tiny_run, 'contrastive.mode="none"', 'reward.partial="constant"', "rl.max_steps=1", "sft.max_steps=2"
    )
    summary = run_pipeline(tmp_path / "run", config)
    assert summary["method"] == "reft"
    assert records(tmp_path / "run", "rl", "train")[0]["contrastive_loss"] == 0.0


def test_stages_run_apart(tmp_path: Path, tiny_run: list[str], finished: tuple[Path, dict[str, Any]]) -> None:
    """sft, then rl from its folder, gives what the one command gives."""
    run_pipeline(tmp_path / "one", tiny_config(tiny_run), ("sft",))
    run_pipeline(tmp_path / "two", tiny_config(tiny_run, f"model.path={tmp_path / 'one' / 'sft'}"), ("rl",))
    together, _ = finished
    ours = (tmp_path / "two" / "model" / "model.safetensors").read_bytes()
    assert ours == (together / "model" / "model.safetensors").read_bytes()


def test_eval_command_repeats_the_last_evaluation(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, summary = finished
    command = [sys.executable, "-m", "carft_fast", "eval", "--config", str(folder / "config.toml")]
    command += ["--set", f"model.path={folder / 'model'}", "--output-dir", str(tmp_path / "eval")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"accuracy {summary['final_accuracy']:.1%}" in result.stdout
    ours = (tmp_path / "eval" / "samples" / "eval.jsonl").read_text()
    assert ours == (folder / "samples" / "rl-eval-000004.jsonl").read_text()
    assert json.loads((tmp_path / "eval" / "summary.json").read_text())["accuracy"] == summary["final_accuracy"]


# --- one step taken apart ---------------------------------------------------------------------------------------------


def written_rollouts(rows: list[EncodedExample]) -> list[Rollout]:
    """Half of the rollouts are the annotation itself (correct), half of them wrong, one of them cut short."""
    tokenizer = build_tokenizer()
    format = PromptFormat(tokenizer)
    rollouts = []
    for i, row in enumerate(rows):
        answer = row.example.answer if i % 2 == 0 else str((int(row.example.answer) + 1) % 21)
        ids = format.completion_ids(row.example.cot, answer)
        if i == 2:
            ids = ids[:-1]  # the limit fell just before EOS: the answer is complete
        rollouts.append(Rollout(ids, [0.0] * len(ids), "length" if i == 2 else "stop", 1))
    return rollouts


@pytest.fixture
def step_parts(tiny_run: list[str]) -> Callable[..., Any]:
    tokenizer = build_tokenizer()
    format = PromptFormat(tokenizer)
    rows = [
        EncodedExample(e, format.prompt_ids(e.question), format.completion_ids(e.cot, e.answer))
        for e in make_task(0)[0][:12]
    ]
    rollouts = written_rollouts(rows)

    def parts(*overrides: str) -> Any:
        config = tiny_config(tiny_run, *overrides)
        policy = load_model(config, "synthetic", CPU, heads=True)
        reference = load_model(config, "synthetic", CPU, heads=False)
        plan = plan_epoch(rows, rollouts, config, seed=0)
        experience = collect_experience(policy, reference, rows, rollouts, plan, config.rollout)
        completions = [format.decode(rollout.completion_ids) for rollout in rollouts]
        grades = grade_all(completions, rows, config)
        return config, policy, rows, rollouts, plan, experience, grades

    return parts


def test_truncated_completions_are_graded_and_their_last_token_carries_the_reward(
    step_parts: Callable[..., Any],
) -> None:
    config, _, _, rollouts, _, experience, grades = step_parts()
    assert [g.correct for g in grades] == [i % 2 == 0 for i in range(12)]
    score = score_rollouts(grades, experience.cosine_N, config)
    assert rollouts[2].finish_reason == "length"
    assert score[2] == 1.0
    wrong = [i for i in range(12) if i % 2]
    torch.testing.assert_close(score[wrong], (0.2 + 0.1 * experience.cosine_N)[wrong])
    # gamma = 1, lambda = 1 and no values: every token's return is what its rollout earns from there on
    plain = RlConfig(lam=1.0, kl_coef=0.0, whiten_advantages=False)
    zeros = torch.zeros_like(experience.old_value_C)
    advantages = ppo_advantages(score, zeros, zeros, zeros, experience.completion_cu, plain)
    lengths = experience.completion_cu.diff()
    torch.testing.assert_close(advantages.return_C, score.repeat_interleave(lengths))
    kl = RlConfig(lam=0.0, gamma=0.0, kl_coef=0.5, whiten_advantages=False)
    advantages = ppo_advantages(score, zeros + 2.0, zeros, zeros, experience.completion_cu, kl)
    expected = torch.full_like(zeros, -1.0)
    expected[experience.completion_cu[1:] - 1] += score
    torch.testing.assert_close(advantages.advantage_C, expected)


def updated_parameters(
    step_parts: Callable[..., Any], *overrides: str
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients of one mini-batch of twelve, by whatever micro-batches the config asks for."""
    config, policy, rows, rollouts, plan, experience, grades = step_parts("rl.mini_batch_size=12", *overrides)
    score = score_rollouts(grades, experience.cosine_N, config)
    advantages = ppo_advantages(
        score,
        experience.old_logprob_C,
        experience.ref_logprob_C,
        experience.old_value_C,
        experience.completion_cu,
        config.rl,
    )
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    correct = torch.tensor([g.correct for g in grades])
    update = Update(policy, optimizer, 1.0, rows, rollouts, experience, advantages, correct, config)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    metrics = update.run([plan])
    return {name: p.detach() - before[name] for name, p in policy.named_parameters()}, metrics


def test_micro_batches_change_nothing(step_parts: Callable[..., Any]) -> None:
    """Gradient and metrics of one forward, and of three or five: the contrastive candidates stay the mini-batch's."""
    overrides = ("contrastive.coef=0.5", "rl.max_grad_norm=1000.0")
    whole, whole_metrics = updated_parameters(step_parts, *overrides, "rl.micro_batch_size=12")
    assert whole_metrics["contrastive_loss"] > 0
    assert len([p for p in whole.values() if p.any()]) > 10
    for size in (5, 4):
        parts, metrics = updated_parameters(step_parts, *overrides, f"rl.micro_batch_size={size}")
        for name, change in whole.items():
            torch.testing.assert_close(parts[name], change, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert metrics == pytest.approx(whole_metrics, rel=1e-4, abs=1e-6)


def test_gradient_checkpointing_changes_nothing(step_parts: Callable[..., Any]) -> None:
    plain, _ = updated_parameters(step_parts)
    recomputed, _ = updated_parameters(step_parts, "model.gradient_checkpointing=true")
    for name, change in plain.items():
        torch.testing.assert_close(recomputed[name], change, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_the_contrastive_term_reaches_model_and_heads(step_parts: Callable[..., Any]) -> None:
    with_term, _ = updated_parameters(step_parts, "contrastive.coef=0.5", "rl.max_grad_norm=1000.0")
    without, metrics = updated_parameters(step_parts, 'contrastive.mode="none"', "rl.max_grad_norm=1000.0")
    assert metrics["contrastive_loss"] == 0.0
    for name in ("heads.proj.weight", "heads.summary.weight", "lm.model.layers.0.mlp.up_proj.weight"):
        assert not torch.allclose(with_term[name], without[name], atol=1e-7), name


def test_descending_the_contrastive_loss_draws_correct_rollouts_to_their_annotation(tiny_run: list[str]) -> None:
    config = tiny_config(tiny_run).contrastive
    generator = torch.Generator().manual_seed(0)
    z_1 = torch.randn(8, 16, generator=generator)
    z_2 = torch.randn(8, 16, generator=generator, requires_grad=True)
    correct = torch.arange(8) < 5
    before = torch.cosine_similarity(z_1, z_2).detach()
    optimizer = torch.optim.SGD([z_2], lr=5.0)
    for _ in range(30):
        optimizer.zero_grad()
        contrastive_loss(z_1, z_2, correct, config).backward()
        optimizer.step()
    after = torch.cosine_similarity(z_1, z_2).detach()
    assert (after[correct] > before[correct] + 0.2).all()
    assert after[correct].mean() > after[~correct].mean() + 0.3
