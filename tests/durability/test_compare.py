"""`carft-fast compare` end to end: two methods, killed on the way and gone on with."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from carft_fast.cli import QUICKSTART_CONFIG

from ..conftest import TINY_RUN, as_set_options

pytestmark = pytest.mark.draws

UNTIMED = ("label", "seed", "step", "samples", "accuracy", "extractable", "completion_length", "reward", "kl")


def command(folder: Path, *words: str) -> list[str]:
    options = as_set_options([*TINY_RUN, "rl.max_steps=2", "rl.eval_every=1"])
    return [
        *(sys.executable, "-m", "carft_fast", "compare", "--methods", "sft,carft_both,dr_grpo"),
        *(*options, "--output-dir", str(folder), *words),
    ]


def points(folder: Path) -> list[tuple[str, ...]]:
    with (folder / "compare.csv").open() as file:
        return [tuple(row[name] for name in UNTIMED) for row in csv.DictReader(file)]


def check_screen(folder: Path, shown: str) -> None:
    """A line for each run, then the table, with the figures that are in the files."""
    lines = [line for line in shown.splitlines() if "[WARNING]" not in line]  # those of libraries
    runs = [line for line in lines if re.match(r"\d/4 \S+-seed0: ", line)]
    names = ("start", "sft", "carft_both", "dr_grpo")
    for number, (name, line) in enumerate(zip(names, runs, strict=True), 1):
        summary = json.loads((folder / f"{name}-seed0" / "summary.json").read_text())
        first, final = summary["start"]["accuracy"], summary["final_accuracy"]
        assert line.startswith(f"{number}/4 {name}-seed0: accuracy {first:.1%} to {final:.1%}, ")
    assert "trainer and sampler agree" not in shown
    assert "trainer and sampler agree" in (folder / "dr_grpo-seed0" / "console.log").read_text()
    assert max(map(len, lines)) <= max(80, len(f"Report: {folder}/compare.html"))
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    with (folder / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = [row for row in cells if row[0]]
    for row, (label, *accuracies, seconds) in zip(rows, table, strict=True):
        expected = [float(row[f"{name}_accuracy_mean"]) for name in ("equal_samples", "equal_time", "final")]
        assert label == row["label"]
        assert [text.split()[0] for text in accuracies] == [f"{value:.1%}" for value in expected]
        assert seconds == f"{float(row['seconds_mean']):.1f}"
    assert shown.rstrip().endswith(f"Report: {folder}/compare.html")


@pytest.mark.long
def test_a_killed_comparison_goes_on(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    shown = subprocess.run(command(whole), check=True, capture_output=True, text=True, timeout=300).stdout
    check_screen(whole, shown)
    expected = points(whole)
    assert [row[0] for row in expected] == ["sft"] * 3 + ["carft_both"] * 3 + ["dr_grpo"] * 3

    process = subprocess.Popen(command(cut), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    marker = cut / "carft_both-seed0" / "checkpoints" / "rl-000001"
    deadline = time.monotonic() + 240
    while not marker.is_dir():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    refused = subprocess.run(command(cut), capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert "add --resume" in refused.stderr
    subprocess.run(command(cut, "--resume"), check=True, capture_output=True, timeout=300)
    assert points(cut) == expected

    report = (whole / "compare.md").read_text()
    for plot in re.findall(r"\]\(([a-z_]+\.png)\)", report):
        assert (whole / plot).stat().st_size > 5_000
    assert "cannot be told apart" in report
    assert "12 sequences" in report  # what was run


STUDY = """
config = "{config}"
seeds = [0, 1]
references = ["plain"]
reach = 0.5
[arms.plain]
method = "reft"
[arms.slow]
method = "reft"
set = {{"rl.lr" = 1e-6}}
"""


@pytest.mark.long
def test_two_processes_share_a_study(tmp_path: Path) -> None:
    """Each works on a seed of its own; the report has both, paired."""
    (tmp_path / "study.toml").write_text(STUDY.format(config=QUICKSTART_CONFIG))
    folder = tmp_path / "out"
    options = as_set_options([*TINY_RUN, "rl.max_steps=2", "rl.eval_every=1"])
    words = [sys.executable, "-m", "carft_fast", "compare", "--study", str(tmp_path / "study.toml"), *options]
    words += ["--output-dir", str(folder)]
    first = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (folder / ".seed0" / "run.lock").is_file():
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second = subprocess.run([*words, "--resume"], check=True, capture_output=True, text=True, timeout=300).stdout
    shown, _ = first.communicate(timeout=300)
    assert first.returncode == 0
    assert "seed 0 is left out: " in second
    runs = [re.findall(r"^\d/6 (\S+): ", text, re.MULTILINE) for text in (shown, second)]
    assert "start-seed0" in runs[0]
    assert "start-seed1" in runs[1]
    assert "start-seed0" not in runs[1]
    with (folder / "paired.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["reference"], row["label"], row["seeds"]) for row in rows] == [("plain", "slow", "2")] * 2
    with (folder / "compare.csv").open() as file:
        last = {(row["label"], row["seed"]): float(row["accuracy"]) for row in csv.DictReader(file)}
    differences = [last["slow", seed] - last["plain", seed] for seed in ("0", "1")]
    assert float(rows[0]["mean"]) == pytest.approx(100 * sum(differences) / 2)
    assert (folder / "paired_0_plain.png").stat().st_size > 5_000
    assert "against plain" in (folder / "compare.md").read_text()
