"""report.html of a run from its folder, finished or in the middle, and the page's own parts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config.toml import load_config, to_toml
from carft_fast.core.errors import InputError
from carft_fast.reports.run_report import rewrite_page


def record(stage: str, kind: str, step: int, **values: Any) -> dict[str, Any]:
    return {"stage": stage, "kind": kind, "step": step, "seconds": {"rollout": 0.5, "update": 1.5}} | values


RECORDS = [
    record("sft", "eval", 0, accuracy=0.1, completion_length=20.0),
    record("sft", "train", 1, loss=2.5),
    record("rl", "train", 1, loss=0.25, reward=0.125, kl=0.001, train_accuracy=0.3),
    record("rl", "train", 2, loss=0.2, reward=0.4375, kl=0.002, train_accuracy=0.4),
    record("rl", "eval", 2, accuracy=0.6, completion_length=21.0),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that goes on: its last record is being written."""
    (tmp_path / "config.toml").write_text(to_toml(load_config(str(QUICKSTART_CONFIG), ["output.name=trial"])))
    environment = {"command": ["carft-fast", "<quickstart>"], "seed": 0, "versions": {"torch": "9.8.7"}}
    (tmp_path / "run.json").write_text(json.dumps(environment))
    lines = [json.dumps(r) + "\n" for r in RECORDS]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"stage": "rl", "ki')
    return tmp_path


def test_a_run_that_goes_on_has_a_page(folder: Path) -> None:
    page = rewrite_page(folder).read_text(encoding="utf-8")
    assert "trial: carft, seed 0" in page
    assert "Not finished: 5 records so far" in page
    assert '<td class="number" data-sort="0.4375">0.4375</td>' in page  # the last step's reward
    assert "<td>versions.torch</td><td>9.8.7</td>" in page
    assert "&lt;quickstart&gt;" in page
    assert "<quickstart>" not in page
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert {"reward, RL", "accuracy, SFT", "accuracy, RL", "loss, SFT", "Seconds per phase of each RL step"} <= set(
        captions
    )
    assert "entropy, RL" not in captions  # nothing recorded it


def test_a_finished_run_shows_its_result(folder: Path) -> None:
    summary = {
        "method": "carft",
        "seed": 0,
        "eval_rows": 20,
        "completion_tokens": 12_345,
        "seconds_total": 61.0,
        "sft_accuracy": 0.1,
        "final_accuracy": 0.6,
        "accuracy_ci95": [0.4, 0.8],
        "sft_accuracy_ci95": [0.0, 0.3],
        "step_by_step": {"sft": 0.2, "final": 0.9},
        "completion_length": {"sft": 20.0, "final": 21.0},
        "seconds_by_phase": {"rollout": 1.0, "update": 3.0},
        "example": {"question": "1 + 1 < 3?", "target": "2", "before": "3", "after": "1 + 1 = 2"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    page = rewrite_page(folder).read_text(encoding="utf-8")
    for cell in ("10.0%", "60.0%", "40.0% to 80.0%", "90.0%"):
        assert f"<td>{cell}</td>" in page
    assert "1 + 1 &lt; 3? (target 2)" in page
    assert "12,345 tokens sampled in RL" in page
    assert "Not finished" not in page


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no metrics\.jsonl, so this is no run folder$"):
        rewrite_page(tmp_path)
    (tmp_path / "compare.csv").touch()
    with pytest.raises(InputError, match=r"a comparison, its page is .*compare\.html"):
        rewrite_page(tmp_path)
