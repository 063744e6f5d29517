"""The names of what is recorded, and the seconds of phases."""

import importlib.util
import re
import time
from pathlib import Path

import pytest
import torch

from carft_fast.reports.metrics import METRICS, PHASES, PhaseTimer


def test_the_page_has_every_metric_and_phase() -> None:
    root = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location("metric_table", root / "scripts" / "metric_table.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (root / "docs" / "runs.md").read_text(encoding="utf-8")
    assert script.updated(page) == page, "run scripts/metric_table.py"
    first = next(iter(METRICS))
    assert script.updated(page.replace(f"| `{first}` |", "| `other` |")) == page
    with pytest.raises(SystemExit, match="metrics: begin"):
        script.updated("no markers")


def test_a_meaning_fits_into_a_table_and_has_a_unit() -> None:
    """`|` and a line's end would break the table."""
    for name, meaning in (METRICS | PHASES).items():
        assert not set("|\n") & set(meaning), name
    units = r"\((SFT: )?(nats|-?\d to |at most 1|no unit|score|as |tokens|rows|updates|optimizer steps)"
    without = {name for name, meaning in METRICS.items() if not re.search(units, meaning)}
    assert without == {"action", "cause", "to"}


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
