"""Log lines of libraries that talk much: into the run's log file, where they break no progress bar."""

import contextlib
import logging
import time
from collections import deque
from pathlib import Path

from carft_fast.core.redact import redact
from carft_fast.core.text import visible


class _LibraryLog(logging.Handler):
    """Keeps the last lines until there is a file for them."""

    def __init__(self) -> None:
        super().__init__()
        self._path: Path | None = None
        self._held: deque[str] = deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        text = self.format(record).replace("\n", "\n    ")
        self._held.append(visible(redact(f"{stamp}  {record.name} {record.levelname}: {text}\n")))
        self._write()

    def write_to(self, path: Path) -> None:
        self._path = path
        self._write()

    def _write(self) -> None:
        # a disk that is full is told by the run's own lines, and not out of the middle of a library
        if self._path is not None and self._held:
            with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
                file.writelines(self._held)
            self._held.clear()


_log = _LibraryLog()
log_libraries_to = _log.write_to
"""From now on this file gets the lines of `keep_off_screen`, those so far included."""


def keep_off_screen(name: str, level: str) -> None:
    """What the logger `name` and those below it say from `level` on goes to the run's log file alone."""
    logger = logging.getLogger(name)
    logger.setLevel(level)
    logger.propagate = False
    logger.handlers = [_log]
