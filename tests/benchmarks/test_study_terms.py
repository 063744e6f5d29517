"""What is said of a study's gradient terms, from records written by hand."""

import json
import math
from pathlib import Path

import pytest

from benchmarks.study_terms import read_runs, row
from carft_fast.core.errors import InputError


def write_run(folder: Path, arm: str, seed: int, steps: list[dict[str, float]]) -> None:
    (folder / f"{arm}-seed{seed}").mkdir()
    records = [{"kind": "eval"}, *({"kind": "train"} | step for step in steps)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / f"{arm}-seed{seed}" / "metrics.jsonl").write_text(text)


def test_shares_are_means_over_steps_and_seeds(tmp_path: Path) -> None:
    def step(policy: float, contrastive: float, cosine: float) -> dict[str, float]:
        return {"grad_norm_policy": policy, "grad_norm_contrastive": contrastive, "cosine": cosine}

    write_run(tmp_path, "carft", 0, [step(2.0, 1.0, i / 10) | {"grad_cosine_contrastive": 0.5} for i in range(7)])
    write_run(tmp_path, "carft", 1, [step(1.0, 0.25, 0.9) for _ in range(7)] + [step(0.0, 0.25, 0.0)])
    write_run(tmp_path, "sft", 0, [{"loss": 1.0}])
    runs = read_runs(tmp_path)
    assert list(runs) == ["carft"], "continued SFT has no terms"
    found = row("carft", runs["carft"])
    assert (found["seeds"], found["policy"], found["contrastive / policy"]) == (2, 1.5, pytest.approx(0.375))
    assert found["cosine, contrastive"] == 0.5, "of the steps that have one"
    assert found["cosine, first"] == pytest.approx((0.2 + 0.9) / 2)
    assert found["cosine, last"] == pytest.approx((0.4 + 0.9) / 2)
    assert math.isnan(found["kl / policy"])


def test_runs_without_terms_are_named(tmp_path: Path) -> None:
    write_run(tmp_path, "carft", 0, [{"loss": 1.0}])
    with pytest.raises(InputError, match="no run in it has gradient terms"):
        read_runs(tmp_path)
