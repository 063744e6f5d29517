"""A signal asks for a stop, whenever it arrives."""

import signal

import pytest

import carft_fast.core.processes
from carft_fast.core.signals import Stopped, StopRequest


def test_a_signal_while_processes_ask_each_other_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest(several=True)

    def another(mine: int) -> int:
        stop._handle(signal.SIGTERM, None)  # arrives while this process waits for the others
        return mine

    monkeypatch.setattr(carft_fast.core.processes, "global_max", another)
    stop.check_together()
    monkeypatch.setattr(carft_fast.core.processes, "global_max", lambda mine: mine)
    with pytest.raises(Stopped, match="SIGTERM"):
        stop.check_together()
