"""Ctrl-C and SIGTERM save first: the first one asks the run to stop at its next safe point, a second one kills it."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):  # noqa: N818 - an event, not an error
    """Raised after Ctrl-C or SIGTERM, where weights and step number agree. The run is saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class StopRequest:
    """Remembers the first SIGINT or SIGTERM; `check()` turns it into Stopped.

    Several processes have to stop at the same step: with them `check()` does nothing, `check_together()` does.
    """

    def __init__(self, *, several: bool = False) -> None:
        self._several = several
        self._signum: int | None = None
        self.deferred = False
        """Between a step's update and the count of it: a checkpoint of that moment would repeat the update."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals, and put the handlers from before back. Only a main thread may: others do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.signal(signum, self._handle) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def check(self) -> None:
        if not self.deferred:
            self.check_aside()

    def check_aside(self) -> None:
        """For work in another thread than the step's, whose result is not saved: a stop ends it at once."""
        if self._signum is not None and not self._several:
            raise Stopped(self._signum)

    def check_together(self) -> None:
        """For every process between two steps: raises Stopped on all where one was asked to stop."""
        signum = self._signum
        if self._several:
            from carft_fast.core.processes import global_max

            signum = global_max(signum or 0) or None  # one that comes while this process waits here counts next time
        if signum is not None:
            raise Stopped(signum)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        self._signum = signum
        if not self._several:  # launchers repeat what a terminal has sent to every process already
            # a session at a prompt, or a notebook, shall survive the second one
            signal.signal(signum, signal.default_int_handler if hasattr(sys, "ps1") else signal.SIG_DFL)
