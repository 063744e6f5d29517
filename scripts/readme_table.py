"""README's table, from the committed rows: `python scripts/readme_table.py` writes it, --check compares."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks is no installed package

from benchmarks.ops.cases import PLAIN  # noqa: E402
from benchmarks.rows import RESULTS, Row, read  # noqa: E402
from carft_fast.reports import number  # noqa: E402

BEGIN, END = "<!-- measured: begin, written by scripts/readme_table.py -->", "<!-- measured: end -->"
PUBLISHED = "padded, recomputing"
PEERS_MODEL = "SmolLM2-135M"
PEERS = {
    "CARFT": ("CARFT step", "published CARFT step", "the published CARFT trainer"),
    "ReFT": ("ReFT step", "published ReFT step", "the published ReFT trainer"),
    "given completions": ("Dr.GRPO step, given completions", "TRL, completion positions", "TRL"),
    "own samples by generate": ("Dr.GRPO step, sampled by `generate`", "TRL, completion positions", "TRL"),
    "own samples by vLLM": ("Dr.GRPO step, sampled by vLLM", "TRL, completion positions", "TRL, same vLLM engine"),
}
"""By case: what it is, and the side it is held against, in the rows' words and the table's."""
PROCESSOR_TIME = "processor time of a step"


def rows_of(name: str, folder: Path) -> list[Row]:
    return read(folder / f"{name}_cpu.json").rows


def only(rows: list[Row], **wanted: Any) -> Row:
    (row,) = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    return row


def table(folder: Path = RESULTS) -> str:
    lines = [
        "| what, on the CPU | this | against | ratio | on a GPU |",
        "| --- | --- | --- | --- | --- |",
    ]

    def add(what: str, this: str, against: str, ratio: float) -> None:
        lines.append(f"| {what} | {this} | {against} | {ratio:.1f} | not measured |")

    step = rows_of("step", folder)
    for case in dict.fromkeys(row["case"] for row in step if "size" not in row):
        published = only(step, case=case, path=PUBLISHED)
        for what, unit, path, figures in (
            ("log-probs and update", "s", "fast", ("logprobs_s", "update_s")),
            ("log-probs and update, compiled", "s", "fast, compiled", ("logprobs_s", "update_s")),
            ("memory of both, activations recomputed", "MiB", "fast, recomputing", ("update_peak_mb",)),
            ("the same beyond the gradients", "MiB", "fast, recomputing", ("beyond_gradients_mb",)),
        ):
            ours, theirs = (sum(row[f] for f in figures) for row in (only(step, case=case, path=path), published))
            against = f"{number(theirs)} {unit}, the published trainers' way"
            add(f"{what}, {case}", f"{number(ours)} {unit}", against, theirs / ours)
    peers = json.loads((folder / "peers_cpu.json").read_text(encoding="utf-8"))["rows"]
    for case, (what, side, whose) in PEERS.items():
        sides = [row for row in peers if row["case"] == f"{PEERS_MODEL}, {case}"]
        ours, theirs = (only(sides, side=name, measure=PROCESSOR_TIME)["value"] for name in (sides[0]["side"], side))
        ratio = only(sides, side=side, measure=f"processor time over {sides[0]['side']}'s")["value"]
        add(f"{what}, {PEERS_MODEL}", f"{number(ours)} s", f"{number(theirs)} s, {whose}", ratio)
    rollout = rows_of("rollout", folder)
    for model, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in rollout):
        if model == "quickstart":  # too small a model for an engine to matter
            continue
        hf, vllm = (only(rollout, model=model, dtype=dtype, engine=engine) for engine in ("hf", "vllm"))
        rates = [row["tokens_per_s"] for row in (vllm, hf)]
        against = f"{rates[1]:.0f} by transformers' generate"
        add(f"sampling, {model}, {dtype}", f"{rates[0]:.0f} tokens/s, vLLM", against, rates[0] / rates[1])
    ops = rows_of("ops", folder)
    for case in dict.fromkeys(row["case"] for row in ops):
        operator = case.split(",")[0]
        if operator not in ("linear_logprob", "linear_policy_loss") or "half" in case:
            continue
        ours, plain = only(ops, case=case, variant=operator), only(ops, case=case, variant=PLAIN)
        for figure, what, unit in (("p50_ms", "time", "ms"), ("peak_mb", "memory", "MiB")):
            this, against = f"{number(ours[figure])} {unit}", f"{number(plain[figure])} {unit}, plain torch"
            add(f"{what}, `{operator}`, {case.split(', ')[1]}", this, against, plain[figure] / ours[figure])
    pool, fresh = (only(rows_of("sandbox", folder), way=way) for way in ("pool", "fresh interpreter"))
    rates = [row["programs_per_s"] for row in (pool, fresh)]
    add(
        "programs in the sandbox",
        f"{rates[0]:.0f}/s",
        f"{rates[1]:.0f}/s, a fresh interpreter each",
        rates[0] / rates[1],
    )
    return "\n".join(lines)


def updated(readme: str, folder: Path = RESULTS) -> str:
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"README.md: the lines {BEGIN!r} and {END!r} have to be there, in this order")
    return f"{before}{BEGIN}\n{table(folder)}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if the table is not of the rows"
    )
    arguments = parser.parse_args()
    file = ROOT / "README.md"
    readme = file.read_text(encoding="utf-8")
    new = updated(readme)
    if arguments.check:
        sys.exit(0 if new == readme else "README.md: its table is not that of the rows; run scripts/readme_table.py")
    file.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
