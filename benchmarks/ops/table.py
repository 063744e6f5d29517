"""One table of several runs of `pytest benchmarks/ops --benchmark-json`: `python -m benchmarks.ops.table FILE...`

The runs took place one after the other on one machine at one commit, so that the variants of a case took turns. Writes
benchmarks/results/ops_cpu.json and .md. The exit code is 1 where a variant disagreed with plain torch, or raised.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ops.cases import CASES, PLAIN
from benchmarks.ops.measure import bad_rows, ceiling_rows, report, row_of
from benchmarks.rows import RESULTS, Row, hardware, write
from carft_fast.core import InputError


def rows_of(runs: Sequence[dict[str, Any]]) -> list[Row]:
    """A row for each variant: its figures over all runs, or why it has none."""
    times: dict[str, dict[str, list[float]]] = {}
    peaks: dict[tuple[str, str], float] = {}
    for run in runs:
        for found in run["benchmarks"]:
            variant = found["params"]["variant"]
            times.setdefault(found["group"], {}).setdefault(variant, []).extend(found["stats"]["data"])
            if "peak_mb" in found["extra_info"]:
                peaks[found["group"], variant] = found["extra_info"]["peak_mb"]
    ceiling = {"device": "cpu"} | {kind: max(run["ceilings"][kind] for run in runs) for kind in ("bytes", "flops")}
    rows: list[Row] = []
    for case in CASES:
        if case.name not in times:
            continue
        left_out = {variant: why for run in runs for variant, why in run["left_out"].get(case.name, {}).items()}
        measured = {variant: data for variant, data in times[case.name].items() if variant not in left_out}
        plain = statistics.median(measured[PLAIN])
        for variant, data in measured.items():
            rows.append(row_of(case, variant, data, peaks.get((case.name, variant)), plain, ceiling))
        rows += [{"case": case.name, "variant": variant, "why": why} for variant, why in left_out.items()]
    return [*rows, *ceiling_rows(ceiling)]


def machine_of(runs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Raises InputError unless all runs are of one machine and commit."""
    machines = [run["machine_info"] for run in runs]
    for machine in machines[1:]:
        if (hardware(machine), machine["commit"]) != (hardware(machines[0]), machines[0]["commit"]):
            raise InputError(f"runs of two machines or commits: {machines[0]} and {machine}")
    return machines[0] | {"runs": str(len(runs))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    runs = [json.loads(file.read_text()) for file in parser.parse_args().files]
    try:
        machine = machine_of(runs)
    except InputError as error:
        sys.exit(f"error: {error}")
    rows = rows_of(runs)
    file = RESULTS / "ops_cpu.json"
    write(file, "ops", machine, rows)
    file.with_suffix(".md").write_text(report(rows, machine))
    print(f"wrote {file.with_suffix('.md')}")
    bad = bad_rows(rows)
    for row in bad:
        print(f"{row['case']}, {row['variant']}: {row['why']}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
