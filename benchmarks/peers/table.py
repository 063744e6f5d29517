"""Rows and report of a comparison from what its sides say they did. Pure."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.peers.work import Done

Row = dict[str, Any]
MEASURES: tuple[tuple[str, str, Callable[[Done], float]], ...] = (
    ("step", "s", lambda done: done.seconds),
    ("processor time of a step", "s", lambda done: done.cpu_seconds),
    ("completion tokens trained", "tokens/s", lambda done: done.completion_tokens / done.seconds),
    ("samples", "samples/s", lambda done: done.samples / done.seconds),
    ("positions through the model", "positions/step", lambda done: done.positions),
    ("memory of a step", "MiB", lambda done: done.peak_mb),
)
RATIOS: tuple[tuple[str, Callable[[Done], float]], ...] = (
    ("time", lambda done: done.seconds),
    ("processor time", lambda done: done.cpu_seconds),
)


def case_rows(case: str, done: Mapping[str, Sequence[Done]], notes: Mapping[str, str]) -> list[Row]:
    """The first side's step is compared with every other's, round by round. The first round is not timed.

    A ratio is the other side's time over the first side's for the same completion tokens, in the same round.
    """

    def row(side: str, what: str, unit: str, values: Sequence[float]) -> Row:
        spread = [round(min(values), 4), round(max(values), 4)]
        return {
            "name": f"{case}: {side}: {what}",
            "value": round(statistics.median(values), 4),
            "unit": unit,
            "notes": notes[side],
            "range": spread,
            "case": case,
            "side": side,
            "measure": what,
        }

    first, *_ = done
    rows = []
    for side, steps in done.items():
        timed = steps[1:]
        rows += [row(side, what, unit, [read(step) for step in timed]) for what, unit, read in MEASURES]
        if side != first:
            for what, read in RATIOS:
                pairs = zip(timed, done[first][1:], strict=True)
                ratios = [read(theirs) / read(ours) for theirs, ours in pairs]
                rows.append(row(side, f"{what} over {first}'s", "x", ratios))
    return rows


def published_first(rows: Sequence[Row]) -> list[Row]:
    """Cases with a published trainer before the others; else the order stays."""
    published = {row["case"] for row in rows if row["side"].startswith("published ")}
    return sorted(rows, key=lambda row: row["case"] not in published)


def report(rows: Sequence[Row], cases: Mapping[str, Mapping[str, str]]) -> str:
    """`cases`: of each case its `work`, the `checks` it passed and its `machine`."""
    lines = [
        "# Against peers on the CPU",
        "",
        "The same model, prompts, completions (or, where each side samples, their number and length), rewards, loss",
        "and optimizer on every side, in float32 with one thread; what each side is and how equal work is checked:",
        "[docs/peers.md](../../docs/peers.md). Medians over the rounds and their range; sides take turns. `x`: that",
        "side's time over the first side's in the same round, for as many completion tokens; above 1 the first is",
        "faster. Other work shared the two cores: processor time leaves it out, the time of a step does not. Nothing",
        "here ran on a GPU.",
    ]
    for case in dict.fromkeys(row["case"] for row in published_first(rows)):
        about = cases[case]
        lines += ["", f"## {case}", "", about["work"], ""]
        lines += [
            "| side | step, s | x | processor time, s | x | completion tokens/s | samples/s | positions "
            "| memory, MiB |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        found: dict[str, dict[str, Row]] = {}
        for row in rows:
            if row["case"] == case:
                found.setdefault(row["side"], {})[row["measure"]] = row
        first = next(iter(found))
        for side, measures in found.items():

            def cell(what: str, digits: int, measures: dict[str, Row] = measures, *, spread: bool = False) -> str:
                if what not in measures:
                    return "1"
                row = measures[what]
                low, high = row["range"]
                text = f"{row['value']:.{digits}f}"
                return f"{text} ({low:.{digits}f} to {high:.{digits}f})" if spread else text

            cells = [
                side,
                cell("step", 2, spread=True),
                cell(f"time over {first}'s", 2, spread=True),
                cell("processor time of a step", 2, spread=True),
                cell(f"processor time over {first}'s", 2, spread=True),
                cell("completion tokens trained", 1),
                cell("samples", 2),
                cell("positions through the model", 0),
                cell("memory of a step", 0),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", "Equal work: " + about["checks"], ""]
        lines += [f"- {side}: {next(iter(measures.values()))['notes']}" for side, measures in found.items()]
        lines += ["", about["machine"]]
    return "\n".join(lines) + "\n"
