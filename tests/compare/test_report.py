"""A comparison's two pages, in Markdown and in HTML."""

import re

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
