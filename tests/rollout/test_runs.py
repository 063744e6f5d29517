"""Whole runs that sample with vLLM in the trainer's process."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

UNLIKE = {"seconds", "shares", "tokens_per_forward", "draft_accepted", "draft_wasted"}
VLLM = ["--set", "rollout.engine=vllm", "--set", "rollout.kv_cache_gib=0.25"]


def launch(folder: Path, options: list[str], *extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "carft_fast", "quickstart", "--output-dir", str(folder), *options, *extra]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in UNLIKE} for line in lines]


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.long
def test_one_step_ahead_with_truncated_sampling_and_correction(tmp_path: Path, tiny_run: list[str]) -> None:
    more = ["rollout.async_depth=1", "rollout.correction=truncated", "rollout.top_p=0.9", "rollout.probe_every=2"]
    options = [*tiny_run, *VLLM, *(word for option in more for word in ("--set", option))]
    output = finish(launch(tmp_path / "run", options))
    assert output.count("starting vLLM") == 1  # SFT's evaluation and RL share the engine
    assert output.count("trainer and sampler agree") == 3  # before the first step, after the second and the fourth
    train = [r for r in records(tmp_path / "run") if (r["stage"], r["kind"]) == ("rl", "train")]
    assert [record["staleness"] for record in train] == [0, 1, 1, 1]
    assert train[0]["sampler_diff_max"] < 1e-4  # on the sampler's support: top-p does not show
    assert all(record["sampler_diff_max"] > 1e-4 for record in train[1:])  # a version of difference does
    samples = [json.loads(line) for line in (tmp_path / "run/samples/rl-000004.jsonl").read_text().splitlines()]
    first = [json.loads(line) for line in (tmp_path / "run/samples/rl-000001.jsonl").read_text().splitlines()]
    assert {s["weight_version"] for s in samples} == {first[0]["weight_version"] + 2}


def tokens_per_forward(folder: Path) -> list[float]:
    """Of the RL steps."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["tokens_per_forward"] for line in lines if (line["stage"], line["kind"]) == ("rl", "train")]


@pytest.mark.long
def test_a_killed_and_resumed_run_ends_with_the_bits_of_one_without_drafts(tmp_path: Path, tiny_run: list[str]) -> None:
    """A step samples every question, nearly the same at a low temperature: so what was sampled last stands, and the
    annotations do not. The steps that have nothing but annotations are the first, and the first after the resume."""
    more = ["data.train_rows=12", "rollout.temperature=0.03", "rl.max_steps=8"]
    options = [*tiny_run, *VLLM, *(word for option in more for word in ("--set", option))]
    finish(launch(tmp_path / "whole", options, "--set", "rollout.drafts=off"))
    process = launch(tmp_path / "killed", options)
    deadline = time.monotonic() + 240
    while not (tmp_path / "killed" / "checkpoints" / "rl-000002").is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "summary.json").exists()
    before = tokens_per_forward(tmp_path / "killed")
    finish(launch(tmp_path / "killed", options, "--resume"))
    found = tokens_per_forward(tmp_path / "killed")
    assert len(found) == 8
    assert before[0] < 1.45 < max(before[1:]), found
    assert min(found[2:-1]) < 1.45 < found[-1], found
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
