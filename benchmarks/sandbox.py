"""Programs a second that the sandbox runs: SVAMP's annotated ones, on two workers.

`python -m benchmarks.sandbox --data svamp_python_sdp.json`. The whole file is one batch, `--repeats` times after one
that is not counted. The baseline is a fresh interpreter for each program (`python -I -S`, two at a time, no sandbox at
all), on a part of them. Every value is compared with the row's answer.
Writes benchmarks/results/sandbox_cpu.{json,md}.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, commit
from carft_fast.rewards import ProgramPool

WORKERS, BASELINE_PROGRAMS, TOLERANCE = 2, 200, 1e-2


def agree(values: list[Any], rows: list[dict[str, Any]], tolerance: float = TOLERANCE) -> int:
    return sum(
        isinstance(value, float) and abs(value - float(row["answer_value"])) <= tolerance
        for value, row in zip(values, rows, strict=True)
    )


def in_the_pool(rows: list[dict[str, Any]], repeats: int) -> tuple[list[float], int, tuple[str, ...]]:
    programs = [row["answer_cot"] for row in rows]
    rates = []
    with ProgramPool(WORKERS) as pool:
        right = agree([outcome.value for outcome in pool.run(programs)], rows)
        for _ in range(repeats):
            start = time.perf_counter()
            outcomes = pool.run(programs)
            rates.append(len(programs) / (time.perf_counter() - start))
            if agree([outcome.value for outcome in outcomes], rows) != right:
                raise RuntimeError("the values of two runs differ")
            print(f"pool: {rates[-1]:.0f} programs/s", flush=True)
        return rates, right, pool.defences


def in_fresh_interpreters(rows: list[dict[str, Any]], repeats: int) -> list[float]:
    def run(row: dict[str, Any]) -> float:
        command = [sys.executable, "-I", "-S", "-c", row["answer_cot"] + "\n\nprint(float(solution()))"]
        return float(subprocess.run(command, capture_output=True, check=True).stdout)

    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        with ThreadPoolExecutor(WORKERS) as threads:
            values = list(threads.map(run, rows))
        rates.append(len(rows) / (time.perf_counter() - start))
        if agree(values, rows) != len(rows):
            raise RuntimeError("a baseline program's value is wrong")
        print(f"fresh interpreters: {rates[-1]:.0f} programs/s", flush=True)
    return rates


def report(result: dict[str, Any]) -> str:
    lines = [
        "# Sandboxed programs on the CPU",
        "",
        f"The annotated programs of SVAMP ({result['programs']}) on {WORKERS} workers, after one uncounted run;",
        f"median of the repeats and their range. {result['right']} return their row's answer within {TOLERANCE:g}.",
        f"`fresh interpreter`: `python -I -S` for each of {BASELINE_PROGRAMS} of them, two at a time, no sandbox.",
        f"Lines of defence: {', '.join(result['defences'])}.",
        "",
        "| | programs/s | range | over a fresh interpreter |",
        "| --- | --- | --- | --- |",
    ]
    base = statistics.median(result["fresh interpreter"])
    for name in ("pool", "fresh interpreter"):
        rates = result[name]
        rate = statistics.median(rates)
        lines.append(f"| {name} | {rate:.0f} | {min(rates):.0f} to {max(rates):.0f} | {rate / base:.1f} |")
    return "\n".join([*lines, "", result["machine"], ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="svamp_python_sdp.json")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = json.loads(Path(arguments.data).read_text())
    load = os.getloadavg()[0]
    rates, right, defences = in_the_pool(rows, arguments.repeats)
    result = {
        "benchmark": "sandbox",
        "schema": 1,
        "programs": len(rows),
        "right": right,
        "defences": defences,
        "pool": rates,
        "fresh interpreter": in_fresh_interpreters(rows[:BASELINE_PROGRAMS], arguments.repeats),
        "machine": (
            f"processor {platform.machine()}, cores {os.cpu_count()}, linux {platform.release().split('-')[0]}, "
            f"load before {load:.1f}, repeats {arguments.repeats}, python {platform.python_version()}, "
            f"commit {commit()}"
        ),
    }
    RESULTS.mkdir(exist_ok=True)
    results = RESULTS / "sandbox_cpu.json"
    results.write_text(json.dumps(result, indent=1) + "\n")
    results.with_suffix(".md").write_text(report(result))
    print(report(result))


if __name__ == "__main__":
    main()
