"""What is said is shown as it was written."""

import io
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
