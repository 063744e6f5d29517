"""A comparison's two pages, in Markdown and in HTML."""

import re
import subprocess
from pathlib import Path

import pytest

from carft_fast.compare import report
from carft_fast.compare.report import html, markdown
from carft_fast.compare.stats import Evaluation, Trajectory, summarise
from carft_fast.reports import page as html_report


def test_a_comparison_says_the_same_on_both_its_pages() -> None:
    def run(label: str, correct: list[int]) -> Trajectory:
        evaluations = [
            Evaluation(i, 64 * i, float(i), c, 100, extractable=1.0, completion_length=9.0, reward=0.5)
            for i, c in enumerate(correct)
        ]
        return Trajectory(label, label, 0, evaluations)

    runs = [run("sft", [10, 20, 31]), run("carft", [10, 44, 72])]
    summaries = summarise(runs)
    text, page = markdown(runs, summaries, ["reward.png"], ["A fact"]), html(runs, summaries, ["A fact"])
    cells = [cell.strip() for line in text.splitlines() if line.startswith("| ") for cell in line.strip("|").split("|")]
    assert "72.0% [62.5%, 79.9%]" in cells
    for cell in cells:
        if cell != "---":
            assert html_report.text(cell) in page
    assert "A fact" in page
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert len(captions) == 4  # no KL and no entropy was recorded


def test_the_commit_is_the_packages_own_and_not_of_a_tree_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed into an environment in a repository of somebody else, whose settings name a program for git to run."""
    ran, program = tmp_path / "ran", tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    name = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", f"core.fsmonitor={program}"]
    subprocess.run(["git", "-C", str(tmp_path), *name, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "config", "core.fsmonitor", str(program)], check=True)
    installed = tmp_path / "site-packages" / "carft_fast" / "compare" / "report.py"
    installed.parent.mkdir(parents=True)
    ran.unlink(missing_ok=True)
    monkeypatch.setattr(report, "__file__", str(installed))
    assert report.commit() == "not in a git tree"
    assert not ran.exists()
