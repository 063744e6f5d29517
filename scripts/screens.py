"""Write docs/screens.md: what a tiny run and a tiny comparison show on a terminal of 80 and of 120 columns.

    python scripts/screens.py

The runs are real, in a pseudo-terminal, and take about two minutes on one free CPU core.
"""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "screens.md"
BEGIN, END = "<!-- screens: begin, written by scripts/screens.py -->", "<!-- screens: end -->"
TINY = (
    *("sft.max_steps=120", "sft.batch_size=16", "sft.warmup_steps=10", "rl.max_steps=4", "rl.batch_size=32"),
    *("rl.eval_every=2", "rl.save_every=2", "sft.save_every=60", "data.eval_rows=50"),
)
METHODS = ("--methods", "sft,reft,carft")


def on_terminal(words: list[str], width: int, folder: Path) -> str:
    """What `carft-fast` with these words writes to a terminal of `width` columns, escape sequences included."""
    main_end, its_end = pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "carft_fast", *words]
    process = subprocess.Popen(command, stdin=its_end, stdout=its_end, env=environment, cwd=folder)
    os.close(its_end)
    parts = []
    while True:
        try:
            part = os.read(main_end, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(main_end)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed:\n{b''.join(parts).decode()[-2000:]}")
    return b"".join(parts).decode()


def lines_and_bars(stream: str) -> tuple[list[str], list[str]]:
    """What stays on the terminal, warnings of libraries left out, and the bars that were drawn on the way."""
    bar = re.compile(r"\d+/\d+ .* ETA ")
    stays, bars = [], []
    for line in re.split(r"\r?\n|\r|\x1b\[(?:1A|2K)", stream):
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip()
        if "[WARNING]" not in text:
            (bars if bar.search(text) else stays).append(text)
    joined = re.sub(r"\n{2,}(?!What)", "\n", "\n".join(stays)).strip("\n")
    return joined.splitlines(), bars


def screens(folder: Path) -> str:
    tiny = [word for value in TINY for word in ("--set", value)]
    blocks = []
    for width in (80, 120):
        stream = on_terminal(["quickstart", *tiny, "--output-dir", f"runs/quickstart-{width}"], width, folder)
        lines, bars = lines_and_bars(stream)
        middle = [last_with_eta(bars, f"{stage} ") for stage in ("sft", "rl")]
        blocks.append(f"## A run, {width} columns\n\n```text\n" + "\n".join(lines) + "\n```\n")
        blocks.append("Its bars, before the last step of each stage:\n\n```text\n" + "\n".join(middle) + "\n```\n")
    words = ["compare", *METHODS, *tiny, "--output-dir", "runs/compare"]
    lines, bars = lines_and_bars(on_terminal(words, 80, folder))
    blocks.append("## A comparison, 80 columns\n\n```text\n" + "\n".join(lines) + "\n```\n")
    blocks.append("Its one bar:\n\n```text\n" + last_with_eta(bars, "4/4 ") + "\n```\n")
    return "\n".join(blocks)


def last_with_eta(bars: list[str], beginning: str) -> str:
    return [line for line in bars if line.startswith(beginning) and not re.search("ETA (--:--|0:00:00)", line)][-1]


def main() -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(f"{before}{BEGIN}\n\n{screens(Path(folder))}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
