"""The first and the last screen of a real tiny run, as a terminal shows them, against what the run left on disk."""

import io
import json
import platform
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console as RichConsole

from carft_fast.cli import app
from carft_fast.config.toml import replaced
from carft_fast.core.console import Console
from carft_fast.training.evaluation import paired_interval
from carft_fast.training.pipeline import prepare, train
from carft_fast.training.run import Run
from carft_fast.training.screens import broken, first_screen, last_screen, rough_time

from ..conftest import as_set_options
from .runs import tiny_config

WIDTHS = (80, 120)


class Screens(NamedTuple):
    run: Run
    summary: dict[str, Any]
    stream: str
    """What the run wrote to a terminal of 80 columns, frames of bars included."""


def run_on_a_terminal(folder: Path, options: list[str], stages: tuple[str, ...]) -> Screens:
    out = io.StringIO()
    rich = RichConsole(file=out, width=80, force_terminal=True, color_system=None, soft_wrap=True)
    run = prepare(tiny_config(options), folder, Console(rich), stages=stages)
    summary = train(run, stages, resume=False)
    return Screens(run, summary, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", out.getvalue()))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """A working folder, so that paths on the screens are short; an ETA is shown at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("screens"))
        patch.setattr("carft_fast.core.console.ETA_SECONDS", 0.0)
        yield patch


@pytest.fixture(scope="module")
def both(workplace: pytest.MonkeyPatch, tiny_run: list[str]) -> Screens:
    shorter = ["sft.max_steps=2", "rl.max_steps=3", "rl.eval_every=3", "rl.save_every=3"]
    return run_on_a_terminal(Path("runs/both"), [*tiny_run, *as_set_options(shorter)], ("sft", "rl"))


@pytest.fixture(scope="module")
def only_sft(workplace: pytest.MonkeyPatch, tiny_run: list[str]) -> Screens:
    return run_on_a_terminal(Path("runs/sft"), [*tiny_run, "--set", "sft.max_steps=2"], ("sft",))


def rendered(renderable: Any, width: int) -> list[str]:
    """Lines as a terminal of that width shows them: Console prints softly wrapped, so nothing cuts them."""
    out = io.StringIO()
    Console(RichConsole(file=out, width=width, force_terminal=True, color_system=None, soft_wrap=True)).show(renderable)
    assert out.getvalue().endswith("\n")
    return out.getvalue().splitlines()


def last(screens: Screens, width: int) -> list[str]:
    model = screens.run.folder / ("model" if screens.summary["start"]["stage"] == "rl" else "sft")
    return rendered(last_screen(screens.run, screens.summary, model, width=width), width)


def row(lines: list[str], name: str) -> list[str]:
    """The cells of a table's row, lines of a cell put together."""
    found: list[list[str]] = []
    for line in lines:
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if "│" not in line or (found and cells[0]):
            if found:
                break
            if "│" not in line:
                continue
        if found or cells[0] == name:
            found.append(cells)
    return [" ".join(filter(None, parts)) for parts in zip(*found, strict=True)]


def answers(folder: Path, name: str) -> list[bool]:
    lines = (folder / "samples" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line)["correct"] for line in lines]


@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_wider_than_the_screen(both: Screens, only_sft: Screens, width: int) -> None:
    for screens, stages in ((both, ("sft", "rl")), (only_sft, ("sft",))):
        first = rendered(first_screen(screens.run, stages, resume=False), width)
        for lines in (first, last(screens, width)):
            assert max(map(len, lines)) <= width


def test_what_a_terminal_of_80_columns_was_shown(both: Screens) -> None:
    """All of it, the frames of the bars and the lines of evaluations too."""
    frames = [line.rstrip() for line in both.stream.splitlines() if "[WARNING]" not in line]  # those of libraries
    assert max(map(len, frames)) <= 80
    bars = [line for line in frames if re.match(r"(sft|rl) +\d", line)]
    assert all(re.search(r" \d+/[23] .* ETA (--:--|\d+:\d\d:\d\d)", line) for line in bars), bars
    assert any(re.match(r"rl +[23]/3 .* ETA \d+:\d\d:\d\d +\d", line) for line in bars), bars
    text = "\n".join(frames)
    shown = [rendered(first_screen(both.run, ("sft", "rl"), resume=True), 80)[:8], last(both, 80)[1:]]
    for lines in shown:
        assert "\n".join(lines) in text


@pytest.mark.parametrize("width", WIDTHS)
def test_the_first_screen_says_what_will_be_done(both: Screens, width: int) -> None:
    lines = rendered(first_screen(both.run, ("sft", "rl"), resume=False), width)
    assert "quickstart: SFT, then carft, seed 0" in lines[0]
    # 2 layers of width 64, and a vocabulary of 97: the weights of the model on disk, without its heads
    from safetensors.torch import load_file

    weights = sum(tensor.numel() for tensor in load_file(both.run.folder / "model" / "model.safetensors").values())
    assert row(lines, "model")[1] == f"synthetic: {weights / 1000:.3g} thousand weights"
    assert row(lines, "training data")[1] == "synthetic: 300 of 300 rows used"
    assert row(lines, "held-out data")[1] == "synthetic: 20 of 20 rows used"
    assert row(lines, "SFT")[1].startswith("2 steps of 16 sequences, 0.11 epochs of 300 rows")
    assert row(lines, "RL")[1].startswith("carft: 3 steps of 12 sequences")
    assert re.match(r"cpu, \d+ threads?, float32$", row(lines, "device")[1])
    assert row(lines, "run folder")[1] == "runs/both"
    assert re.match(r"[\d.]+ s to [\d.]+ (s|min), a rough guess", row(lines, "expected time")[1])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flag below is of x86-64")
def test_the_first_screen_says_where_bfloat16_is_slow(both: Screens) -> None:
    """oneDNN multiplies in bfloat16 with AVX-512 at least; without, a product took 12 times the time of float32."""
    config = replaced(both.run.config, {"model.compute_dtype": "bfloat16"})
    device = row(rendered(first_screen(replace(both.run, config=config), ("sft",), resume=True), 120), "device")[1]
    fast = "avx512bw" in Path("/proc/cpuinfo").read_text()
    assert ("many times slower than float32" in device) != fast


@pytest.mark.parametrize("width", WIDTHS)
def test_the_last_screen_agrees_with_the_files(both: Screens, width: int) -> None:
    lines, folder = last(both, width), both.run.folder
    summary = json.loads((folder / "summary.json").read_text())
    before, after = answers(folder, "sft-eval-000002"), answers(folder, "rl-eval-000003")
    _, shown_before, shown_after, change = row(lines, "greedy accuracy")
    assert shown_before == f"{sum(before) / 20:.1%}" == f"{summary['sft_accuracy']:.1%}"
    assert shown_after == f"{sum(after) / 20:.1%}" == f"{summary['final_accuracy']:.1%}"
    gained = sum(new and not old for old, new in zip(before, after, strict=True))
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    low, high = paired_interval(gained, lost, sum(before), 20)
    assert row(lines, "95% interval")[3] == f"{100 * low:+.1f} to {100 * high:+.1f}"
    assert change == ("no change" if low <= 0 <= high else f"{100 * (gained - lost) / 20:+.1f}")
    text = " ".join(" ".join(lines).split())
    assert f"{gained} of 20 answers became right, {lost} became wrong" in text
    assert f"{summary['completion_tokens']:,} tokens sampled in RL" in text
    assert "Report: runs/both/report.html" in lines
    assert "Model: runs/both/model" in lines
    assert (folder / "report.html").is_file()


def test_a_run_of_sft_alone_says_nothing_of_rl(only_sft: Screens) -> None:
    folder = only_sft.run.folder
    start, end = answers(folder, "sft-eval-000000"), answers(folder, "sft-eval-000002")
    for lines in (last(only_sft, 80), (folder / "report.md").read_text().splitlines()):
        text = "\n".join(lines)
        assert "before SFT" in text
        assert "after SFT" in text
        assert not re.search(r"(before|after|in) RL", text, re.IGNORECASE)
    shown = row(last(only_sft, 80), "greedy accuracy")
    assert shown[1:3] == [f"{sum(start) / 20:.1%}", f"{sum(end) / 20:.1%}"]
    example = only_sft.summary["example"]
    assert example["before"] != example["after"], "answers of two evaluations"


def commands(lines: list[str]) -> list[list[str]]:
    """As a shell reads them."""
    block = "\n".join(lines).partition("What to type next:\n")[2].replace("\\\n", " ")
    return [shlex.split(line) for line in block.splitlines() if not line.startswith("#")]


def test_what_to_type_next_runs(both: Screens, only_sft: Screens, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands(last(both, 80)) == commands(last(both, 120))
    evaluate, *_ = commands(last(both, 80))
    app([*evaluate[1:], "--set", "data.eval_rows=8"], standalone_mode=False)
    right = sum(answers(both.run.folder, "rl-eval-000003")[:8])
    said = capsys.readouterr().out
    assert f"accuracy {right / 8:.1%}" in said
    assert "pass@8" in said
    _, reinforce, *_ = commands(last(only_sft, 80))
    assert reinforce[:2] == ["carft-fast", "rl"]
    app([*reinforce[1:], "--dry-run"], standalone_mode=False)
    assert "4 steps of 12 sequences" in capsys.readouterr().out
    for screens, count in ((both, 3), (only_sft, 4)):
        *_, check, train = found = commands(last(screens, 80))
        best = screens.run.folder / "checkpoints" / "best"
        assert len(found) == count + best.exists()
        assert check == ["carft-fast", "data", "check", "train.json"]
        assert train[:2] == ["carft-fast", "sft"]


@pytest.mark.parametrize("width", [10, 40, 80])
def test_a_command_is_broken_where_a_shell_joins_it(width: int) -> None:
    words = ["carft-fast", "rl", "--set", "model.path=/a/long path/of many words", "--resume", "--output-dir", "x"]
    text = broken(words, width)
    assert shlex.split(text.replace("\\\n", " ")) == words
    if width == 80:
        assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (90, "1.5 min"), (4000, "67 min"), (9e4, "25 h")]
)
def test_rough_times(seconds: float, text: str) -> None:
    assert rough_time(seconds) == text


@pytest.mark.parametrize(
    ("both_right", "lost", "gained", "both_wrong", "low", "high"),
    [
        (36, 2, 12, 0, 0.0569, 0.3404),
        (20, 2, 12, 16, 0.0562, 0.3292),
        (18, 2, 12, 18, 0.0562, 0.3290),
        (36, 0, 14, 0, 0.1528, 0.4167),
        (35, 0, 14, 1, 0.1461, 0.4175),
        (2, 1, 97, 0, 0.8721, 0.9854),
        (0, 0, 30, 0, 0.8395, 1.0),
        (54, 0, 0, 0, -0.0664, 0.0664),
        (30, 0, 0, 24, -0.0358, 0.0358),
    ],
)
def test_paired_interval_is_the_published_one(
    both_right: int, lost: int, gained: int, both_wrong: int, low: float, high: float
) -> None:
    """Newcombe 1998, table III, method 10, to the four digits that are printed there."""
    rows = both_right + lost + gained + both_wrong
    found = paired_interval(gained, lost, both_right + lost, rows)
    assert found == pytest.approx((low, high), abs=0.5e-4)
    turned = paired_interval(lost, gained, both_right + gained, rows)
    assert turned == pytest.approx((-high, -low), abs=0.5e-4)
