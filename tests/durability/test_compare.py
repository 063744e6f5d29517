"""`carft-fast compare` end to end: two methods, killed on the way and gone on with."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from ..conftest import TINY_RUN, as_set_options

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


def test_a_killed_comparison_goes_on(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command(whole), check=True, capture_output=True, timeout=300)
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
