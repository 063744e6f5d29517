"""The names of what is recorded, and the seconds of phases."""

import time
from pathlib import Path

import pytest
import torch

from carft_fast.reports.metrics import METRICS, PHASES, PhaseTimer


def test_metrics_are_documented() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "runs.md").read_text()
    for name in (*METRICS, *PHASES):
        assert f"| `{name}` |" in text, name


class Clock:
    """A host and a device with a queue, in seconds."""

    def __init__(self) -> None:
        self.now, self.done, self.waits = 100.0, 0.0, 0

    def work(self, host: float, queued: float = 0.0) -> None:
        """The host works and gives the device work at its end."""
        self.now += host
        self.done = max(self.done, self.now) + queued

    def read_back(self) -> None:
        self.now = max(self.now, self.done)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_phases_add_up_to_the_wall_time(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """By hand, with work that is still queued when its phase ends; `update` reads back, as a step does."""
    clock = Clock()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = max(clock.now, clock.done)

        def synchronize(self) -> None:
            clock.waits += 1
            clock.now = max(clock.now, self.at)

        def elapsed_time(self, end: "Event") -> float:
            assert end.at <= clock.now, "not done yet"
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    timer = PhaseTimer(torch.device(device))
    begin = clock.now
    with timer("rollout"):
        clock.work(1.0, queued=2.0)
        clock.read_back()
    with timer("reward"):
        clock.work(4.0)
    with timer("forward"):
        clock.work(0.5, queued=8.0)
    with timer("update"):
        clock.work(1.0, queued=16.0)
        clock.read_back()
    with timer("sync"):
        clock.work(0.25, queued=0.5)
    with timer("sync"):
        clock.work(0.25)
    seconds = timer.flush()
    # on the device: forward 0.5 until its work begins, then 8; update's work follows at once
    of_device = {"rollout": 3.0, "reward": 4.0, "forward": 8.5, "update": 16.0, "sync": 0.75}
    of_host = {"rollout": 3.0, "reward": 4.0, "forward": 0.5, "update": 24.0, "sync": 0.5}
    assert seconds == pytest.approx(of_device if device == "cuda" else of_host)
    assert sum(seconds.values()) == pytest.approx(clock.now - begin)
    assert clock.waits == (device == "cuda")
    assert timer.flush() == {}
