"""What is said is shown as it was written."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from carft_fast.core.console import Console
from carft_fast.core.durable import read_json_lines, write_text
from carft_fast.core.table import Table

TEXTS = ["[/INST] done", "[red]7[/red]", "[b", ":smile: and :b:", "[link=http://x]y[/link]", "a\\[b]", "[/]"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_never_markup(text: str, tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(RichConsole(file=out, width=200, force_terminal=True, color_system=None))
    console.log_to(tmp_path / "console.log")
    console.log(text)
    table = Table("", "", title=text)
    table.add_row(text, text)
    console.show(table)
    with console.track(text, 2, "rows") as tracker:
        tracker.advance(note=text)
        console.progress.refresh()
    RichConsole(file=out, width=200, color_system=None).print(table)
    shown = out.getvalue()
    assert shown.count(text) >= 1 + 3 + 2 + 3
    assert (tmp_path / "console.log").read_text().count(text) == 1 + 3


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\rb\x08", "a\\rb\\x08"),
        ("\x9b31m", "\\x9b31m"),
        ("a\u202eb\u2028c", "a\\u202eb\\u2028c"),
        ("a\ud800", "a\\ud800"),
        ("日本 é 👩\u200d🚀", "日本 é 👩\u200d🚀"),
    ],
)
def test_controls_of_a_text_do_not_act(text: str, shown: str, tmp_path: Path) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    console = Console(RichConsole(file=out, width=200, force_terminal=True, color_system=None))
    console.log_to(tmp_path / "console.log")
    console.log(text)
    table = Table("", "", title=text)
    table.add_row(text, "")
    console.show(table)
    with console.track(text, 2, "rows") as tracker:
        tracker.advance(note=text)
        console.progress.refresh()
    out.flush()
    written = out.buffer.getvalue().decode()
    log = (tmp_path / "console.log").read_text(encoding="utf-8")
    assert written.count(shown) >= 1 + 2 + 2
    assert log.count(shown) == 1 + 2
    if text != shown:
        assert text not in written + log


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"])
def test_only_a_newline_ends_a_line_of_json(separator: str, tmp_path: Path) -> None:
    write_text(tmp_path / "a.jsonl", f'{{"a": "one{separator}two"}}\n{{}}\n'.replace("\r", "\\r"))
    if ord(separator) < 32:  # JSON escapes them
        write_text(tmp_path / "a.jsonl", f'{{"a": "one\\u{ord(separator):04x}two"}}\n{{}}\n')
    assert read_json_lines(tmp_path / "a.jsonl") == [{"a": f"one{separator}two"}, {}]


def last_frame(console: Console, out: io.StringIO) -> list[str]:
    """The lines of the bars as they are drawn last."""
    out.truncate(0)
    out.seek(0)
    console.progress.refresh()
    frame = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    return [line.rstrip() for line in frame.replace("\r", "\n").splitlines() if line.strip()]


class Clock:
    """Stands in for `time` in the console: its seconds pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def strftime(self, format: str) -> str:
        return format


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("carft_fast.core.console.time", found)
    return found


METRICS = "loss -0.012  reward 0.345  train_accuracy 0.250"


@pytest.mark.parametrize(
    ("width", "metrics"),
    [
        (60, "10.0 s per step"),
        (80, "10.0 s per step  loss -0.012"),
        (120, "10.0 s per step  loss -0.012  reward 0.345  train_accuracy 0.250"),
    ],
)
def test_what_falls_away_on_a_narrow_console_is_metrics(width: int, metrics: str, clock: Clock) -> None:
    """200 steps of 10 s: after 50 of them 1,500 s are left."""
    out = io.StringIO()
    console = Console(RichConsole(file=out, width=width, force_terminal=True, color_system=None))
    with (
        console.track("rl", 200, "steps") as steps,
        console.track("rollout", 1024, "completions") as rollout,
    ):
        for _ in range(50):
            clock.now += 10
            steps.advance(note=METRICS)
        rollout.advance(12)
        lines = last_frame(console, out)
    assert len(lines) == 2
    assert all(len(line) <= width for line in lines)
    assert re.search(rf"^rl\s+50/200 .* ETA 0:25:00 +{re.escape(metrics)}$", lines[0])
    assert re.search(r"^rollout\s+12/1024 .* ETA 11:", lines[1])
    with console.track("tokenise " + "/a/long/folder" * 20, 1000, "rows"):
        (line,) = last_frame(console, out)
    assert len(line) <= width
    assert re.search(r"^tokenise /\S+…\s+0/1000 .* ETA --:--$", line)


def test_no_eta_before_it_means_something(clock: Clock) -> None:
    """Not after one unit, which may have compiled, and not in the first seconds."""
    out = io.StringIO()
    console = Console(RichConsole(file=out, width=80, force_terminal=True, color_system=None))
    with console.track("rl", 10, "steps", done=4) as steps, console.track("rollout", 1000, "rows") as rollout:
        clock.now += 2
        rollout.advance(300)
        clock.now += 58
        steps.advance()
        assert all("ETA --:--" in line for line in last_frame(console, out))
        clock.now += 20
        steps.advance()
        (line, _) = last_frame(console, out)
    assert " 6/10 " in line
    assert "ETA 0:02:40" in line, "two steps in 80 s, four are left"


def test_off_a_terminal_there_is_one_line_every_half_minute(clock: Clock, tmp_path: Path) -> None:
    """100 steps of 4 s, each with rollouts in 4 parts: 400 s, 13 lines in all."""
    out = io.StringIO()
    console = Console(RichConsole(file=out, width=80, color_system=None))
    console.log_to(tmp_path / "console.log")
    with console.track("rl", 100, "steps") as steps:
        for step in range(100):
            with console.track("rollout", 64, "completions") as rollout:
                for _ in range(4):
                    clock.now += 1
                    rollout.advance(16)
            steps.advance(note=f"loss {step}")
    lines = out.getvalue().splitlines()
    assert len(lines) == 400 // 30
    assert lines[0] == "rl 7/100  ETA 0:06:12  4.0 s per step  loss 6 | rollout 32/64  ETA --:--  16.0 completions/s"
    assert [line.split("  ", 1)[1] for line in (tmp_path / "console.log").read_text().splitlines()] == lines


def test_the_console_of_one_run_of_many_shows_one_bar_and_keeps_the_log(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(RichConsole(file=out, width=80, force_terminal=True, color_system=None), name="2/9 reft")
    console.log_to(tmp_path / "console.log")
    with console.track("rl", 3, "steps"), console.track("rollout", 64, "completions"):
        console.log("evaluated")
        assert [line.split()[:4] for line in last_frame(console, out)] == [["2/9", "reft", "rl", "0/3"]]
    assert "evaluated" not in out.getvalue()
    assert (tmp_path / "console.log").read_text().endswith("evaluated\n")


def test_on_a_terminal_lines_end_between_words_and_paths_stay_whole() -> None:
    out = io.StringIO()
    path = "/a/long/folder" * 8
    text = f"the model of this run, which anybody can load with transformers or vLLM, is in {path}"
    Console(RichConsole(file=out, width=80, force_terminal=True, color_system=None)).log(text)
    first, *_, last = out.getvalue().splitlines()
    assert len(first) <= 80
    assert last.strip() == path
    assert " ".join(out.getvalue().split()) == text
