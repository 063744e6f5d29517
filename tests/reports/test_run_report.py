"""report.html of a run from its folder, finished or in the middle, and the page's own parts."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config.toml import load_config, to_toml
from carft_fast.core.errors import InputError
from carft_fast.reports.run_report import (
    _draw_curve,
    _markdown,
    change_in_words,
    code,
    markdown_table,
    result_table,
    rewrite_page,
)


def record(stage: str, kind: str, step: int, **values: Any) -> dict[str, Any]:
    return {"stage": stage, "kind": kind, "step": step, "seconds": {"rollout": 0.5, "update": 1.5}} | values


RECORDS = [
    record("sft", "eval", 0, accuracy=0.1, completion_length=20.0),
    record("sft", "train", 1, loss=2.5),
    record("rl", "train", 1, loss=0.25, reward=0.125, kl=0.001, train_accuracy=0.3),
    record("rl", "train", 2, loss=0.2, reward=0.4375, kl=0.002, train_accuracy=0.4),
    record("rl", "eval", 2, accuracy=0.6, completion_length=21.0),
]

SUMMARY: dict[str, Any] = {
    "method": "carft",
    "seed": 0,
    "eval_rows": 20,
    "completion_tokens": 12_345,
    "seconds_total": 61.0,
    "sft_accuracy": 0.1,
    "final_accuracy": 0.6,
    "accuracy_ci95": [0.4, 0.8],
    "sft_accuracy_ci95": [0.0, 0.3],
    "start": {
        "stage": "rl",
        "accuracy": 0.1,
        "accuracy_ci95": [0.0, 0.3],
        "step_by_step": 0.2,
        "completion_length": 20.0,
    },
    "change": {"accuracy": 0.5, "ci95": [0.2, 0.7], "gained": 11, "lost": 1},
    "step_by_step": {"sft": 0.2, "final": 0.9},
    "completion_length": {"sft": 20.0, "final": 21.0},
    "seconds_by_phase": {"rollout": 1.0, "update": 3.0},
    "example": {"question": "1 + 1 < 3?", "target": "2", "before": "3", "after": "1 + 1 = 2"},
}


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


def test_the_page_draws_tokens_per_forward(folder: Path) -> None:
    """A run with drafts, whose steps say it; others have no such chart."""
    caption = "sampled tokens per forward, RL"
    assert f"<figcaption>{caption}</figcaption>" not in rewrite_page(folder).read_text(encoding="utf-8")
    lines = [json.dumps(record("rl", "train", step, tokens_per_forward=1.0 + step)) + "\n" for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    page = rewrite_page(folder).read_text(encoding="utf-8")
    assert f"<figcaption>{caption}</figcaption>" in page
    axes = Figure().subplots()
    _draw_curve(axes, "tokens_per_forward", "rl", list(map(json.loads, lines)))
    assert [line.get_ydata().tolist() for line in axes.lines] == [[2.0, 3.0]]


def test_a_finished_run_shows_its_result(folder: Path) -> None:
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    page = rewrite_page(folder).read_text(encoding="utf-8")
    for cell in ("10.0%", "60.0%", "40.0% to 80.0%", "90.0%"):
        assert f"<td>{cell}</td>" in page
    assert "1 + 1 &lt; 3? (target 2)" in page
    assert "12,345 tokens sampled in RL" in page
    assert "Not finished" not in page


def test_the_pages_curves_have_one_colour_for_what_is_held_out() -> None:
    """Accuracy alone, beside the rollouts' and beside training: as matplotlib draws them."""
    colors = dict[str, set[str]]()
    for name, stage in (("accuracy", "sft"), ("accuracy", "rl"), ("completion_length", "rl")):
        axes = Figure().subplots()
        rows = [*RECORDS, record("rl", "train", 3, completion_length=22.0)]
        _draw_curve(axes, name, stage, rows)
        for line in axes.lines:
            colors.setdefault(str(line.get_label()), set()).add(to_hex(line.get_color()))
    assert colors.keys() == {"training", "rollouts", "held-out"}
    assert len(colors["held-out"]) == 1
    assert colors["training"] == colors["rollouts"]
    assert not colors["held-out"] & colors["training"]


def test_the_page_says_what_rl_steps_take_their_time_for(folder: Path) -> None:
    """By hand: two steps of half a second of rollouts and one and a half of updates."""
    page = rewrite_page(folder).read_text(encoding="utf-8")
    row = r"<tr><td>(\w+)</td><td>[^<]*</td><td class=\"number\" data-sort=\"[^\"]*\">([^<]*)</td></tr>"
    rows = re.findall(row, page)
    assert rows[:2] == [("update", "75.0%"), ("rollout", "25.0%")]


ATTACK = "3\x1b[2J\n```\n![](http://tracker/x.png)<script>alert(1)</script>\n# Heading\n````\n| a | b |\u202e"


def test_a_model_that_writes_markdown_shows_it(folder: Path) -> None:
    """Read by a parser of Markdown: all of an answer is text."""
    summary = SUMMARY | {"example": dict.fromkeys(("question", "target", "before", "after"), ATTACK)}
    text = _markdown(load_config(str(folder / "config.toml")), RECORDS, {**summary, "versions": {}}, [])
    assert "\x1b" not in text
    assert "\u202e" not in text
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    blocks = [token.content for token in tokens if token.type == "fence"]
    shown = ATTACK.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert blocks == [shown + "\n"] * 3
    inline = [child for token in tokens for child in token.children or []]
    assert [child.content for child in inline if child.type == "code_inline"][-1] == " ".join(shown.split())
    assert {child.type for child in inline} <= {"text", "code_inline", "softbreak"}
    assert "html_block" not in {token.type for token in tokens}
    headings = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
    assert "Heading" not in headings
    assert len(headings) == 4


@pytest.mark.parametrize("text", ["`", "``", "a`b``c", "`a", "a`", "a\nb", "", " ` "])
def test_code_spans(text: str) -> None:
    inline = [child for token in MarkdownIt().parse(f"x {code(text)} y") for child in token.children or []]
    found = [child.content for child in inline if child.type == "code_inline"]
    assert found == ([" ".join(text.split())] if text else [])


def test_a_cell_ends_where_it_ends() -> None:
    rows = MarkdownIt().enable("table").parse(markdown_table(("a", "b"), [("x|y\nz", "1")]))
    assert [token.content for token in rows if token.type == "inline"] == ["a", "b", "x|y z", "1"]


def test_a_page_shows_controls(folder: Path) -> None:
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"example": {**SUMMARY["example"], "after": ATTACK}}))
    page = rewrite_page(folder).read_text(encoding="utf-8")
    assert not set(page) & {"\x1b", "\u202e"}
    assert "3\\x1b[2J" in page


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("summary.json", "[]", "expected an object in JSON"),
        ("summary.json", "{}", "cannot be shown: KeyError"),
        ("summary.json", '{"example": 3', "not JSON"),
        (
            "metrics.jsonl",
            '{"stage": "rl", "kind": "train", "step": 1, "seconds": {}, "loss": {}}\n',
            "cannot be shown",
        ),
        ("metrics.jsonl", "garbage\n", "line 1: not JSON"),
        ("run.json", "", "not JSON"),
    ],
)
def test_garbage_is_refused(folder: Path, file: str, content: str, said: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(InputError, match=re.escape(said)):
        rewrite_page(folder)


def test_a_folder_without_run_json_is_refused(folder: Path) -> None:
    (folder / "run.json").unlink()
    with pytest.raises(InputError, match=r"run\.json: cannot be read: No such file"):
        rewrite_page(folder)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no metrics\.jsonl, so this is no run folder$"):
        rewrite_page(tmp_path)
    (tmp_path / "compare.csv").touch()
    with pytest.raises(InputError, match=r"a comparison, its page is .*compare\.html"):
        rewrite_page(tmp_path)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.2, 0.7, "Greedy accuracy: 10.0% before RL, 60.0% after, a change of +50.0 points (95% interval +20.0 to"),
        (-0.7, -0.2, "a change of +50.0 points (95% interval -70.0 to -20.0 points)"),
        (
            -0.02,
            0.7,
            "No change in greedy accuracy: 10.0% before RL, 60.0% after. The 95% interval of the difference, -2.0",
        ),
        (0.0, 0.0, "+0.0 to +0.0 points, holds zero. 11 of 20 answers became right, 1 became wrong."),
    ],
)
def test_a_change_whose_interval_holds_zero_is_none(low: float, high: float, said: str, folder: Path) -> None:
    summary = SUMMARY | {"change": {**SUMMARY["change"], "ci95": [low, high]}}
    assert said in change_in_words(summary)
    (folder / "summary.json").write_text(json.dumps(summary))
    assert said in rewrite_page(folder).read_text(encoding="utf-8")
    cell = result_table(summary)[1][0][3]
    assert cell == ("no change" if low <= 0 <= high else "+50.0")
