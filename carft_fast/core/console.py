"""What a run says while it works: bars with rate and ETA on a terminal or in a notebook, else lines; and a log file."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from carft_fast.core.durable import writing
from carft_fast.core.library_log import log_libraries_to
from carft_fast.core.processes import is_main
from carft_fast.core.redact import redact
from carft_fast.core.text import visible

PLAIN_LINE_SECONDS = 5.0


class Tracker:
    """One piece of work of `total` units. `advance` is cheap; it prints at most every few seconds off a terminal."""

    def __init__(self, console: "Console", description: str, total: int, unit: str, done: int) -> None:
        self._console, self._description, self._total, self._unit = console, description, total, unit
        self._done = self._done_before = done
        self._start = self._last_line = time.monotonic()
        self.task = console.progress.add_task(visible(description), total=total, completed=done, rate="", note="")

    def advance(self, n: int = 1, note: str = "") -> None:
        self._done += n
        now = time.monotonic()
        rate = (self._done - self._done_before) / max(now - self._start, 1e-9)
        # seconds per unit where that is the more readable
        shown = f"{1 / rate:.1f} s per {self._unit.removesuffix('s')}" if 0 < rate < 1 else f"{rate:.1f} {self._unit}/s"
        self._console.progress.update(self.task, completed=self._done, rate=shown, note=visible(note))
        if not self._console.is_terminal and now - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = now
            eta = f"{(self._total - self._done) / rate:.0f} s" if rate else "unknown"
            self._console.log(f"{self._description} {self._done}/{self._total}  {shown}  ETA {eta}  {note}".rstrip())


class Console:
    def __init__(self, rich: RichConsole | None = None) -> None:
        """Of several processes only the main one says anything."""
        self._rich = rich or RichConsole(highlight=False, soft_wrap=True, quiet=not is_main())
        self._log_path: Path | None = None
        # a notebook draws bars with ipywidgets
        draws = find_spec("ipywidgets") is not None if self._rich.is_jupyter else self._rich.is_terminal
        self.is_terminal = draws and is_main()
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._rich,
            transient=True,
        )

    def log_to(self, path: Path) -> None:
        self._log_path = path
        if is_main():
            log_libraries_to(path)

    def log(self, message: str) -> None:
        message = visible(redact(message))
        self._rich.print(message, markup=False, emoji=False)
        self._append(message)

    def show(self, renderable: RenderableType) -> None:
        """Print a table or the like, and its plain text to the log."""
        self._rich.print(renderable)
        with self._rich.capture() as capture:
            self._rich.print(renderable)
        self._append(redact(capture.get().rstrip()))

    @contextmanager
    def track(self, description: str, total: int, unit: str, *, done: int = 0) -> Iterator[Tracker]:
        """The bar of one piece of work. Units `done` before this run do not count for the rate."""
        tracker = Tracker(self, description, total, unit, done)
        if self.is_terminal:
            self.progress.start()  # nothing where it has started
        try:
            yield tracker
        finally:
            self.progress.remove_task(tracker.task)
            if self.is_terminal and not self.progress.tasks:
                self.progress.stop()

    def _append(self, message: str) -> None:
        if self._log_path is not None and is_main():
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            with writing(self._log_path), self._log_path.open("a", encoding="utf-8") as file:
                file.write(f"{stamp}  {message}\n")
