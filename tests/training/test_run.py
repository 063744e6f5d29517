"""A tiny run of the whole pipeline: what it leaves, and the invariants of its steps."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from carft_fast.config.toml import load_config, replaced
from carft_fast.core.console import Console
from carft_fast.training.pipeline import evaluate_only, prepare

from .runs import records, run_pipeline, tiny_config

pytestmark = pytest.mark.draws


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_run: list[str]) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run_pipeline(folder, tiny_config(tiny_run))


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
    assert [r["step"] for r in records(folder, "rl", "eval")] == [0, 2, 4]
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
    sample = json.loads(samples[0])
    assert {"question", "completion", "target", "reward"} <= set(sample)
    assert sample["prompt"] == f"Question:\n{sample['question']}\nAnswer reasoning:\n"


def test_rl_begins_with_the_accuracy_of_the_weights_it_begins_with(finished: tuple[Path, dict[str, Any]]) -> None:
    """Held against another evaluation of those weights, in float32 with the same sampler."""
    folder, summary = finished
    start = records(folder, "rl", "eval")[0]
    config = replaced(load_config(str(folder / "config.toml")), {"model.path": str(folder / "sft")})
    again = evaluate_only(prepare(config, folder.parent / "unused", Console(), stages=(), write=False))
    assert {name: start[name] for name in again.metrics} == again.metrics
    assert start["accuracy"] == summary["sft_accuracy"]
    lines = (folder / "samples" / "rl-eval-000000.jsonl").read_text().splitlines()
    assert [json.loads(line)["completion"] for line in lines] == [row["completion"] for row in again.samples]


def test_a_step_says_what_its_time_went_to(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    steps = [*records(folder, "sft", "train"), *records(folder, "rl", "train")]
    for r in steps:
        seconds = {k: v for k, v in r["seconds"].items() if k not in ("load", "evaluate", "checkpoint")}
        total = sum(seconds.values())
        assert r["shares"] == pytest.approx({k: v / total for k, v in seconds.items()}, abs=2e-3)
    assert {"rollout", "sync", "update"} <= set(steps[-1]["shares"])
    report = (folder / "report.md").read_text()
    update, whole = (
        sum(r["seconds"].get(phase, 0) for r in records(folder, "rl", "train") for phase in phases)
        for phases in (["update"], ["rollout", "reward", "forward", "update", "sync"])
    )
    row = next(line for line in report.splitlines() if line.startswith("| update |"))
    assert float(row.split("|")[-2].strip(" %")) == pytest.approx(100 * update / whole, abs=0.1)


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


def test_reft_is_the_same_loop(tmp_path: Path, tiny_run: list[str]) -> None:
    config = tiny_config(
        tiny_run, 'contrastive.mode="none"', 'reward.partial="constant"', "rl.max_steps=1", "sft.max_steps=2"
    )
    summary = run_pipeline(tmp_path / "run", config)
    assert summary["method"] == "reft"
    record = records(tmp_path / "run", "rl", "train")[0]
    assert not {"contrastive_loss", "cosine"} & set(record), "what ReFT does not read is not computed"
    assert {"kl", "value_loss", "explained_variance"} <= set(record)


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
