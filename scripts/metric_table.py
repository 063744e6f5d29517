"""The tables of docs/runs.md: `python scripts/metric_table.py` writes them from METRICS and PHASES."""

import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks is no installed package

from benchmarks.pages import with_part  # noqa: E402
from carft_fast.reports.metrics import METRICS, PHASES  # noqa: E402

PAGE = ROOT / "docs" / "runs.md"
TABLES: dict[str, Mapping[str, str]] = {"metrics": METRICS, "phases": PHASES}


def table(meanings: Mapping[str, str]) -> str:
    rows = (f"| `{name}` | {meaning} |" for name, meaning in meanings.items())
    return "\n".join(["| name | meaning |", "| --- | --- |", *rows])


def updated(page: str) -> str:
    for name, meanings in TABLES.items():
        begin, end = f"<!-- {name}: begin, written by scripts/metric_table.py -->", f"<!-- {name}: end -->"
        page = with_part(page, begin, end, f"\n{table(meanings)}\n", PAGE.name)
    return page


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
