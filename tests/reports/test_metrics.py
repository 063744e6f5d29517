"""The names of what is recorded."""

from pathlib import Path

from carft_fast.reports.metrics import METRICS, PHASES


def test_metrics_are_documented() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "runs.md").read_text()
    for name in (*METRICS, *PHASES):
        assert f"| `{name}` |" in text, name
