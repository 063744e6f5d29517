"""The quickstart itself, at full length: what the README claims of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_reinforcement_lifts_accuracy_by_twenty_points(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "carft_fast", "quickstart", "--output-dir", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["eval_rows"] == 400
    assert 0.25 <= summary["sft_accuracy"] <= 0.60
    assert summary["final_accuracy"] >= summary["sft_accuracy"] + 0.20
    assert summary["step_by_step"]["final"] > 0.9 > summary["step_by_step"]["sft"]
    # the figures are recomputed from the answers on disk
    answers = [json.loads(line) for line in (folder / "samples" / "rl-eval-000040.jsonl").read_text().splitlines()]
    right = sum(answer["completion"].rsplit(": ", 1)[-1].strip() == answer["target"] for answer in answers)
    assert right / len(answers) == summary["final_accuracy"]
