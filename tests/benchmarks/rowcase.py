"""Rows that tests make, and the machine that they are from."""

from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, write

MACHINE = {"device": "cpu", "processor": "x86_64", "model": "Some CPU", "cores": "2", "threads": "1", "commit": "abc"}
ROOT = RESULTS.parents[1]


def ops_file(folder: Path, name: str, p50: float, *, machine: dict[str, str] | None = None, **more: Any) -> Path:
    row = {"case": "gae, T=8192 length=128", "variant": "gae", "p50_ms": p50, "peak_mb": 4.0} | more
    write(folder / name, "ops", machine or MACHINE, [row])
    return folder / name


def committed() -> list[Path]:
    return [file for file in sorted(RESULTS.glob("*.json")) if not file.name.startswith("peers")]
