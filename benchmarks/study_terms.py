"""What each term of the loss did to the model in a study's runs (`rl.gradient_terms`), and to the two embeddings.

`python -m benchmarks.study_terms RUNS` reads the runs of `carft-fast compare --study`, writes RUNS/terms.csv and prints
it as a table. Means over seeds and steps, those left out whose policy term has no gradient; "first" and "last" are a
run's first and last five steps.
"""

import argparse
import csv
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from carft_fast.core import InputError
from carft_fast.reports import markdown_table

Records = list[dict[str, Any]]
TERMS = ("value", "kl", "contrastive")
ENDS = {"first": slice(None, 5), "last": slice(-5, None)}


def read_runs(folder: Path) -> dict[str, list[Records]]:
    """Arm -> the training records of each seed."""
    runs: dict[str, list[Records]] = defaultdict(list)
    for file in sorted(folder.glob("*-seed*/metrics.jsonl")):
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if steps := [r for r in records if r["kind"] == "train" and r.get("grad_norm_policy")]:
            runs[file.parent.name.rpartition("-seed")[0]].append(steps)
    if not runs:
        raise InputError(f"{folder}: no run in it has gradient terms (rl.gradient_terms = true)")
    return runs


def mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def row(arm: str, runs: list[Records]) -> dict[str, Any]:
    steps = [step for run in runs for step in run]
    found: dict[str, Any] = {"arm": arm, "seeds": len(runs), "policy": mean([s["grad_norm_policy"] for s in steps])}
    for term in TERMS:
        shares = [s[f"grad_norm_{term}"] / s["grad_norm_policy"] for s in steps if f"grad_norm_{term}" in s]
        found[f"{term} / policy"] = mean(shares)
        found[f"cosine, {term}"] = mean([s[f"grad_cosine_{term}"] for s in steps if f"grad_cosine_{term}" in s])
    for name in ("cosine", "cosine_correct", "contrastive_loss"):
        for end, part in ENDS.items():
            found[f"{name}, {end}"] = mean([s[name] for run in runs for s in run[part] if name in s])
    return found


def shown(value: float | str) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3g}"
    return str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the study's runs")
    folder = parser.parse_args().runs
    rows = [row(arm, runs) for arm, runs in read_runs(folder).items()]
    with (folder / "terms.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    cells = [[shown(value) for value in row.values()] for row in rows]
    print(markdown_table(list(rows[0]), cells))


if __name__ == "__main__":
    main()
