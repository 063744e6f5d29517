"""What a run says while it works: bars with rate and ETA on a terminal or in a notebook, else lines; and a log file."""

import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress import Progress, ProgressColumn, Task
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

from carft_fast.core.durable import writing
from carft_fast.core.processes import is_main
from carft_fast.core.redact import redact
from carft_fast.core.text import visible

PLAIN_LINE_SECONDS = 30.0
"""Between two lines of progress where no bar can be drawn."""
ETA_SECONDS, ETA_UNITS = 3.0, 2
"""An ETA is shown once so much time has passed and so many units are done: the first unit warms caches and compiles."""
NO_ETA = "--:--"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: `0:07:40`."""
    return str(timedelta(seconds=round(seconds)))


def wrapped(text: str, width: int) -> str:
    """Lines that end between words; a word that is too long, such as a path, is left whole to be copied."""
    wrap = partial(textwrap.wrap, width=width, break_long_words=False, break_on_hyphens=False)
    lines = ((line, " " * (len(line) - len(line.lstrip()))) for line in text.splitlines())
    return "\n".join("\n".join(wrap(line, subsequent_indent=indent)) for line, indent in lines)


class Tracker:
    """One piece of work of `total` units. `advance` is cheap; off a terminal it prints at most every half minute."""

    def __init__(self, console: "Console", description: str, total: int, unit: str, done: int) -> None:
        self._console, self._total, self._unit = console, total, unit
        self._description = f"{console.name} {description}".lstrip()
        self._done = self._done_before = done
        self._start = time.monotonic()
        self._eta, self._metrics = NO_ETA, list[str]()
        self.task = console.progress.add_task(
            visible(self._description),
            total=total,
            completed=done,
            visible=not (console.name and console.trackers),
            count=f"{done}/{total}",
            eta=NO_ETA,
            metrics=[],
        )

    def advance(self, n: int = 1, note: str = "") -> None:
        """`note` holds metrics with two spaces between; where the line is too short, the last fall away first."""
        self._done += n
        done, passed = self._done - self._done_before, time.monotonic() - self._start
        rate = done / max(passed, 1e-9)
        # seconds per unit where that is the more readable
        shown = f"{1 / rate:.1f} s per {self._unit.removesuffix('s')}" if 0 < rate < 1 else f"{rate:.1f} {self._unit}/s"
        self._metrics = [*[shown] * bool(rate), *filter(None, visible(note).split("  "))]
        if done >= ETA_UNITS and passed >= ETA_SECONDS:
            self._eta = duration((self._total - self._done) / rate)
        self._console.progress.update(
            self.task,
            completed=self._done,
            count=f"{self._done}/{self._total}",
            eta=self._eta,
            metrics=self._metrics,
        )
        self._console.report_progress()

    def describe(self) -> str:
        eta = f"ETA {self._eta}"
        return "  ".join([f"{self._description} {self._done}/{self._total}", eta, *self._metrics])


class _Metrics:
    """Texts with two spaces between: those that fit, from the first."""

    def __init__(self, parts: list[str]) -> None:
        self._parts = parts

    def __rich_measure__(self, console: RichConsole, options: ConsoleOptions) -> Measurement:
        return Measurement(0, cell_len("  ".join(self._parts)))

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        parts = list(self._parts)
        while parts and cell_len("  ".join(parts)) > options.max_width:
            parts.pop()
        yield Text("  ".join(parts), no_wrap=True)


class _Column(ProgressColumn):
    """What `render` makes of a task; only a column that `gives_way` becomes narrower where the console is."""

    def __init__(self, render: Callable[[Task], RenderableType], *, gives_way: bool = False) -> None:
        super().__init__(Column(no_wrap=not gives_way))
        self._render = render

    def render(self, task: Task) -> RenderableType:
        return self._render(task)


class Console:
    def __init__(self, rich: RichConsole | None = None, *, name: str = "") -> None:
        """Of several processes only the main one says anything.

        With a `name` it is the console of one run of many: the screen shows the outermost bar alone, with that name,
        and everything else goes to the log file.
        """
        self._rich = rich or RichConsole(highlight=False, soft_wrap=True, quiet=not is_main())
        self._log_path: Path | None = None
        # a notebook draws bars with ipywidgets
        draws = find_spec("ipywidgets") is not None if self._rich.is_jupyter else self._rich.is_terminal
        self.is_terminal = draws and is_main()
        self.name = name
        self.trackers: list[Tracker] = []
        """Of the work that is under way, the outermost first."""
        self._last_line = time.monotonic()
        self.progress = Progress(
            _Column(self._name),
            _Column(lambda task: Text(f"{task.fields['count']}")),
            _Column(lambda task: ProgressBar(task.total, task.completed, width=self._rich.width // 8)),
            _Column(lambda task: Text(f"ETA {task.fields['eta']}")),
            _Column(lambda task: _Metrics(task.fields["metrics"]), gives_way=True),
            console=self._rich,
            transient=True,
        )

    @property
    def width(self) -> int:
        return self._rich.width

    def _name(self, task: Task) -> Text:
        """What is worked on, in at most a third of a line."""
        text = Text(task.description)
        text.truncate(self._rich.width // 3, overflow="ellipsis")
        return text

    def log_to(self, path: Path) -> None:
        self._log_path = path

    def log(self, message: str) -> None:
        message = visible(redact(message))
        if not self.name:
            shown = wrapped(message, self._rich.width) if self._rich.is_terminal else message
            self._rich.print(Text(shown), soft_wrap=True)
        self._append(message)

    def show(self, renderable: RenderableType) -> None:
        """Print a table or the like, and its plain text to the log."""
        if not self.name:
            self._rich.print(renderable)
        with self._rich.capture() as capture:
            self._rich.print(renderable)
        self._append(redact(capture.get().rstrip()))

    @contextmanager
    def track(self, description: str, total: int, unit: str, *, done: int = 0) -> Iterator[Tracker]:
        """The bar of one piece of work. Units `done` before this run do not count for the rate."""
        tracker = Tracker(self, description, total, unit, done)
        self.trackers.append(tracker)
        if self.is_terminal:
            self.progress.start()  # nothing where it has started
        try:
            yield tracker
        finally:
            self.trackers.remove(tracker)
            self.progress.remove_task(tracker.task)
            if self.is_terminal and not self.progress.tasks:
                self.progress.stop()

    def report_progress(self) -> None:
        """Where no bar can be drawn: one line for all work under way, if the last one is long enough ago."""
        now = time.monotonic()
        if self.is_terminal or now - self._last_line < PLAIN_LINE_SECONDS:
            return
        self._last_line = now
        line = " | ".join(tracker.describe() for tracker in self.trackers)
        self._rich.print(Text(visible(redact(line))), soft_wrap=True)
        self._append(visible(redact(line)))

    def _append(self, message: str) -> None:
        if self._log_path is not None and is_main():
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            with writing(self._log_path), self._log_path.open("a", encoding="utf-8") as file:
                file.write(f"{stamp}  {message}\n")
