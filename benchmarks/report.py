"""All committed rows on one page: `python -m benchmarks.report` writes benchmarks/results/report.html.

The rows are committed, the page is built. What has not been measured on a GPU says so in every table.
"""

import argparse
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.long_run import ENGINES, FIGURES, trend
from benchmarks.ops.cases import CASES, PLAIN
from benchmarks.peers.table import published_first
from benchmarks.predict import assumptions, predictions
from benchmarks.rows import COLUMNS, RESULTS, SCHEMAS, Results, Row, commits_of, newest, read, read_peers
from benchmarks.step_report import BASELINE
from carft_fast.reports import NOT_MEASURED, SERIES, Cell
from carft_fast.reports import page as page

ON_GPU = "on a GPU"
Draw = Callable[[Any], None]


class Measured(NamedTuple):
    """The files of one benchmark: those of CPUs and those of GPUs."""

    cpu: list[Results]
    gpu: list[Results]

    def rows(self) -> list[Row]:
        return [row for found in self.cpu for row in found.rows]

    def on_gpu(self, row: Row, figure: str) -> Cell:
        """The GPU's figure of the same row."""
        for found in self.gpu:
            for other in found.rows:
                if figure in other and all(other.get(part) == row.get(part) for part in found.key):
                    return other[figure]
        return None

    def only_on_gpu(self) -> list[Row]:
        """Rows that no CPU has."""
        key = next((found.key for found in self.gpu), ())
        known = {tuple(row.get(part) for part in key) for row in self.rows()}
        rows = [row for found in self.gpu for row in found.rows]
        return [row for row in rows if tuple(row.get(part) for part in key) not in known]


def load(folder: Path) -> dict[str, Measured]:
    found = {name: Measured([], []) for name in SCHEMAS}
    for file in sorted(folder.glob("*.json")):
        if file.name.startswith("peers"):
            continue
        results = read(file)
        on_gpu = any(machine.get("device", "cpu") != "cpu" for machine in results.machines())
        (found[results.benchmark].gpu if on_gpu else found[results.benchmark].cpu).append(results)
    return found


def with_range(row: Row, figure: str, low: float | None, high: float | None) -> Cell:
    if figure not in row:
        return None
    value = page.number(row[figure])
    return (
        row[figure],
        value if low is None or high is None else f"{value} ({page.number(low)} to {page.number(high)})",
    )


def bars(groups: dict[str, dict[str, float]], label: str, mark: float | None = None) -> Draw:
    """Group -> name -> value, as horizontal bars, a colour for each name."""

    def draw(axes: Any) -> None:
        names = list(dict.fromkeys(name for group in groups.values() for name in group))
        at, ticks = 0.0, []
        for group in groups.values():
            first = at
            for name, value in group.items():
                axes.barh(at, value, height=0.85, color=SERIES[names.index(name) % len(SERIES)])
                at += 1
            ticks.append((first + at - 1) / 2)
            at += 0.6
        axes.set_yticks(ticks, [_wrapped(group) for group in groups])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
        if mark is not None:
            axes.axvline(mark, color=page.INK, linewidth=0.8, linestyle="--")
        axes.figure.legend(
            [axes.barh(0, 0, color=SERIES[i % len(SERIES)]) for i in range(len(names))],
            names,
            loc="outside lower center",
            ncols=1 if max(map(len, names)) > 24 else 2,
        )

    return draw


def _wrapped(name: str) -> str:
    return "\n".join(line for part in name.split(", ") for line in textwrap.wrap(part, 22))


def bar_height(groups: dict[str, dict[str, float]]) -> float:
    names = {name for group in groups.values() for name in group}
    bars_high = 0.2 * sum(max(len(group), 2) for group in groups.values())
    return 0.9 + bars_high + 0.16 * len(groups) + 0.16 * len(names)


def bar_chart(title: str, groups: dict[str, dict[str, float]], label: str, mark: float | None = None) -> str:
    return page.chart(title, bars(groups, label, mark), height=bar_height(groups))


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """p of the least-squares fit y = c x^p."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def growth_chart(title: str, lines: dict[str, list[tuple[float, float]]], x_label: str, y_label: str) -> str:
    def draw(axes: Any) -> None:
        for name, points in lines.items():
            axes.loglog(*zip(*points, strict=True), marker="o", markersize=4, label=f"{name}: x^{exponent(points):.2f}")
        sizes = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(sizes, [f"{x:,.0f}" for x in sizes])
        axes.minorticks_off()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend()

    return page.chart(title, draw)


# --- sections ---------------------------------------------------------------------------------------------------------


def operators(found: Measured) -> list[str]:
    rows = found.rows()
    ratios: dict[str, dict[str, float]] = {}
    for row in rows:
        if "plain_over_this" in row and row["variant"] != PLAIN:
            own = row["variant"] == row["case"].split(",")[0]
            ratios.setdefault(row["case"], {})["carft_kernels" if own else row["variant"]] = row["plain_over_this"]
    known = {row["case"] for row in rows}
    # cases for GPUs only, and whatever this machine left out
    missing = [{"case": c.name, "variant": c.operator} for c in CASES if c.name not in known]
    table = []
    for row in [*rows, *missing]:
        figures = ("plain_over_this", "gb_per_s", "gflop_per_s", "ceiling_share", "peak_mb")
        times = with_range(row, "p50_ms", row.get("p20_ms"), row.get("p80_ms"))
        table.append(
            (
                row["case"],
                row["variant"],
                row.get("why", times),
                *(row.get(name, "" if "machine" in row else None) for name in figures),
                found.on_gpu(row, "p50_ms"),
            )
        )
    table += [
        (row["case"], row["variant"], *[None] * 6, row.get("why", row.get("p50_ms")))
        for row in found.only_on_gpu()
        if (row["case"], row["variant"]) not in {(known["case"], known["variant"]) for known in missing}
    ]
    heads = ("case", "variant", "median ms (p20 to p80)", "plain / this", "GB/s", "GFLOP/s", "share of the ceiling")
    fast = {case: group for case, group in ratios.items() if max(group.values()) > 20}
    rest = {case: group for case, group in ratios.items() if case not in fast}
    drawn = [
        bar_chart(title, groups, "times as fast as plain torch", 1.0)
        for title, groups in (("Against plain torch, a vectorised expression", rest), ("Against a Python loop", fast))
        if groups
    ]
    return [
        page.paragraph(
            "Forward and backward of one call, the variants of a case in turns. Each is compared with plain torch "
            "first, and not timed where it disagrees. On the CPU the operators run in torch, in float32; on a GPU in "
            "Triton, in bfloat16. Work is what the task needs: a variant that recomputes gets no credit for it."
        ),
        page.charts(*drawn),
        page.table((*heads, "peak MiB", f"median ms {ON_GPU}"), table, search="operators"),
    ]


def step(found: Measured) -> list[str]:
    rows = [row for row in found.rows() if "size" not in row]
    base = {row["case"]: row for row in rows if row["path"] == BASELINE}
    table = []
    for row in rows:
        padded = base.get(row["case"])
        table.append(
            (
                row["case"],
                row["path"],
                with_range(row, "logprobs_s", *row["logprobs_range"]),
                with_range(row, "update_s", *row["update_range"]),
                row["step_s"],
                padded["step_s"] / row["step_s"] if padded else None,
                row["samples_per_s"],
                (row["utilisation"], f"{row['utilisation']:.0%}"),
                row["update_peak_mb"],
                row["beyond_gradients_mb"],
                found.on_gpu(row, "step_s"),
            )
        )
    table += [(row["case"], row["path"], *[None] * 8, row["step_s"]) for row in found.only_on_gpu()]
    heads = (
        "case",
        "path",
        "log-probs, s",
        "update, s",
        "step, s",
        "our padded baseline / this",
        "samples/s",
        "utilisation",
    )
    drawn = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        groups = {row["path"]: {"log-probs": row["logprobs_s"], "update": row["update_s"]} for row in of_case}
        drawn.append(bar_chart(f"{case}: seconds of the two phases", groups, "seconds"))
        memory = {row["path"]: {"peak": row["update_peak_mb"]} for row in of_case}
        drawn.append(
            bar_chart(f"{case}: memory of log-probs and first epoch", memory, "MiB beyond model and optimizer state")
        )
    return [
        page.paragraph(
            f"CARFT on the same rollouts, two PPO epochs, float32 on the CPU. “{BASELINE}” is our padded baseline: a "
            "device's rows at once, padded to the longest prompt plus the longest completion. The published trainers' "
            "own steps are under “Peers”."
        ),
        page.charts(*drawn),
        page.table((*heads, "peak MiB", "beyond gradients, MiB", f"step, s, {ON_GPU}"), table),
    ]


def rollout(found: Measured) -> list[str]:
    rows = found.rows()
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        groups.setdefault(f"{row['model']}, {row['dtype']}", {})[row["engine"]] = row["tokens_per_s"]
    drawn = [
        bar_chart(f"{model}: completion tokens a second", of_model, "tokens/s")
        for model in dict.fromkeys(row["model"] for row in rows)
        if (of_model := {name: group for name, group in groups.items() if name.startswith(model)})
    ]
    table = [
        (
            *(row[name] for name in ("model", "dtype", "engine")),
            with_range(row, "tokens_per_s", *row["tokens_per_s_range"]),
            row["tokens_per_s"] / groups[f"{row['model']}, {row['dtype']}"]["hf"],
            row.get("sync_ms"),
            found.on_gpu(row, "tokens_per_s"),
        )
        for row in rows
    ]
    table += [
        (row["model"], row["dtype"], row["engine"], *[None] * 3, row["tokens_per_s"]) for row in found.only_on_gpu()
    ]
    heads = ("model", "dtype", "engine", "tokens/s (range)", "over hf", "weight sync, ms", f"tokens/s {ON_GPU}")
    return [
        page.paragraph(
            "64 prompts, up to 128 new tokens, temperature 1. “hf” is transformers' generate on one padded batch in "
            "the same dtype, “vllm” runs in the trainer's process, “vllm-server” in one of its own."
        ),
        page.charts(*drawn),
        page.table(heads, table),
    ]


def sandbox(found: Measured) -> list[str]:
    rows = found.rows()
    base = {row["way"]: row["programs_per_s"] for row in rows}.get("fresh interpreter")
    table = [
        (
            row["way"],
            with_range(row, "programs_per_s", *row["programs_per_s_range"]),
            row["programs_per_s"] / base if base else None,
            "CPU only",
        )
        for row in rows
    ]
    return [
        page.paragraph(
            "Annotated programs of SVAMP on two workers, against a fresh interpreter a program, unsandboxed."
        ),
        page.table(("way", "programs/s (range)", "over a fresh interpreter", ON_GPU), table),
    ]


def peers(folder: Path) -> list[str]:
    """The rows of benchmarks/results/peers_*.json, as they are named there."""
    blocks = [page.paragraph("Other trainers on the same task, machine and budget; see the notes of each row.")]
    files = sorted(folder.glob("peers*.json"))
    for file in files:
        rows = published_first(read_peers(file))
        names = list(dict.fromkeys(name for row in rows for name in row if name not in ("machine", "work")))
        table = [(*(_plain_cell(row.get(name)) for name in names), None) for row in rows]
        blocks += [f"<h3>{page.text(file.stem)}</h3>", page.table((*names, ON_GPU), table)]
    if not files:
        blocks.append(page.table(("peer", "CPU", ON_GPU), [("every peer", None, None)]))
    return blocks


def _plain_cell(value: Any) -> Cell:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return ", ".join(map(str, value)) if isinstance(value, list) else json.dumps(value)


def growth(found: Measured, steps: Measured) -> list[str]:
    """Lines by (what, against); the fits; and what nobody measured."""
    lines: dict[tuple[str, str, str], dict[str, list[tuple[float, float]]]] = {}
    for row in found.rows():
        for figure in ("p50_ms", "peak_mb"):
            line = lines.setdefault((row["operator"], row["against"], figure), {})
            line.setdefault(row["variant"], []).append((row["size"], row[figure]))
    for row in steps.rows():
        if "size" in row:
            figure = "seconds" if "seconds" in row else "memory_mb"
            against = row["case"].split()[-1]
            line = lines.setdefault(("training step", against, figure), {})
            line.setdefault(row["path"], []).append((row["size"], row[figure]))
    units = {"p50_ms": "ms", "peak_mb": "MiB", "seconds": "s", "memory_mb": "MiB"}
    what = {"p50_ms": "time", "peak_mb": "memory", "seconds": "time", "memory_mb": "memory"}
    drawn, table = [], []
    for (operator, against, figure), of_figure in lines.items():
        drawn.append(growth_chart(f"{operator}: {what[figure]} against {against}", of_figure, against, units[figure]))
        for name, points in of_figure.items():
            low, high = points[0], points[-1]
            span = f"{page.number(low[1])} to {page.number(high[1])} {units[figure]}"
            table.append(
                (operator, against, f"{low[0]:,} to {high[0]:,}", what[figure], name, span, exponent(points), None)
            )
    known = {against for _, against, _ in lines}
    table += [("training step", against, "", "", "", None, None, None) for against in AGAINST if against not in known]
    heads = ("what", "against", "from, to", "figure", "path", "measured", "exponent of the fit", ON_GPU)
    words = "Both axes logarithmic. The exponent p is that of the least-squares fit y = c x^p: 1 is linear."
    if cores := sorted({row["machine"]["cores"] for row in found.rows() if row["against"] == "ranks"}):
        words += (
            f" Ranks are processes of one thread on one machine, gloo between them; it has {' or '.join(cores)} cores, "
            "and more ranks than that share them."
        )
    return [
        page.paragraph(words),
        page.charts(*drawn),
        page.table(heads, table),
    ]


AGAINST = ("group size", "ranks", "rollouts")
"""What a step's cost may grow with: named in the table even without rows."""


def long_run(found: Measured) -> list[str]:
    """Memory and time against steps, a line an engine."""
    of_engine: dict[str, list[Row]] = {}
    for row in found.rows():
        of_engine.setdefault(row["engine"], []).append(row)

    def against_steps(figure: str) -> Draw:
        def draw(axes: Any) -> None:
            for engine, rows in of_engine.items():
                axes.plot([row["step"] for row in rows], [row[figure] for row in rows], label=engine)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("steps")
            axes.set_ylabel(COLUMNS[figure].unit)
            axes.legend()

        return draw

    table: list[Sequence[Cell]] = []
    for engine, rows in of_engine.items():
        for figure in FIGURES:
            t = trend([row[figure] for row in rows], rows[0]["step"])
            table.append((engine, rows[-1]["step"], COLUMNS[figure].what, COLUMNS[figure].unit, *t, None))
    table += [(engine, *[None] * 8) for engine in ENGINES if engine not in of_engine]
    heads = ("engine", "steps", "of the trainer's process", "unit", "first tenth", "last tenth", "highest")
    drawn = [
        page.chart(f"{COLUMNS[figure].what}, against steps", against_steps(figure))
        for figure in ("resident_mb", "cpu_ms_per_token")
        if of_engine
    ]
    return [
        page.paragraph(
            "RL steps of the quickstart's model in one run. Every point is a mean over a hundredth of the steps; the "
            "table is about the points after a warm-up of a tenth, its slope that of their least-squares line."
        ),
        page.charts(*drawn),
        page.table((*heads, "slope in 1,000 steps", ON_GPU), table),
    ]


def gpu(found: Measured) -> list[str]:
    """What `benchmarks.gpu` leaves beside the tables above."""
    rows = [row for results in found.gpu for row in results.rows]
    parts = ("right", "parity with vLLM", "tests", "ncu")
    done = {row["part"] for row in rows}
    table = [(row["part"], row["what"], str(row["result"])) for row in rows]
    return [
        page.paragraph("python -m benchmarks.gpu fills this table and the GPU columns of the others."),
        page.table(("part", "what", "result"), [*table, *((part, "", None) for part in parts if part not in done)]),
    ]


def static_evidence(found: Measured) -> list[str]:
    rows = found.rows()
    bounded = [row for row in rows if "bound_over_floor" in row]

    def draw(axes: Any) -> None:
        for i, chip in enumerate(dict.fromkeys(row["chip"] for row in bounded)):
            ratios = sorted(row["bound_over_floor"] for row in bounded if row["chip"] == chip)
            axes.plot([100 * j / len(ratios) for j in range(len(ratios))], ratios, label=chip, color=SERIES[i])
        axes.set_xlabel("percent of the configurations")
        axes.set_ylabel("bound / floor")
        axes.legend()

    crossed = sum(bool(row["failed"]) for row in rows)
    figures = ("registers", "stack_bytes", "shared_bytes", "spills_in_loops", "warps_per_sm")
    table = [
        (
            *(row[name] for name in ("kernel", "configuration", "chip", *figures)),
            row.get("floor_ms", ""),
            row.get("bound_over_floor", ""),
            None,
        )
        for row in rows
    ]
    heads = ("kernel", "configuration", "chip", *figures, "floor, ms", "bound / floor", f"time, ms, {ON_GPU}")
    return [
        page.paragraph(
            f"Machine code of {len(rows)} kernel configurations, compiled for sm_80, sm_90 and sm_100, read and not "
            f"run; {crossed} cross a line. A bound is the time of the busiest part of the chip if nothing ever waits."
        ),
        page.charts(page.chart("Bound over floor, all configurations sorted", draw)) if bounded else "",
        page.details("Every configuration", page.table(heads, table, search="kernels")),
    ]


def counted(found: Measured) -> list[str]:
    rows = found.rows()
    figures = ("loaded_bytes", "stored_bytes", "flops", "traffic_bytes")
    return [
        page.paragraph(
            "Global memory and FLOPs of the Triton kernels, access by access in Triton's interpreter, and of a step by "
            "the cost model. The same on every machine: a test counts again and compares. On a GPU a profiler counts."
        ),
        page.details(
            "Every count",
            page.table(
                ("what", "case", *(COLUMNS[name].what for name in figures), ON_GPU),
                [(row["what"], row["case"], *(row.get(name, "") for name in figures), None) for row in rows],
                search="counts",
            ),
        ),
    ]


def predicted() -> list[str]:
    table = []
    for p in predictions():
        fast, published = sum(p.fast.values()), sum(p.published.values())
        phases = [(p.fast[name], f"{p.fast[name]:.0f} / {p.published[name]:.0f}") for name in ("log-probs", "update")]
        totals = (fast, f"{fast:.0f} / {published:.0f}")
        table.append((p.model, p.data, p.gpu, p.fast["rollout"], *phases, totals, published / fast, None))
    heads = ("model", "data", "GPU", "rollout", "log-probs", "update", "step", "published / fast", f"step {ON_GPU}")
    return [
        page.paragraph(
            "Arithmetic, not measurement: milliseconds a step, fast / published, by the cost model and the assumptions "
            "below. None of this was run."
        ),
        page.table(heads, table),
        page.details("Assumptions", page.table(("quantity", "assumed"), assumptions())),
    ]


ANOTHER_COMMIT = "another commit than the newest"


def environment(found: dict[str, Measured], folder: Path) -> list[str]:
    files = {
        name: [row for results in (*measured.cpu, *measured.gpu) for row in results.rows]
        for name, measured in found.items()
    }
    files |= {file.stem: read_peers(file) for file in sorted(folder.glob("peers*.json"))}
    commits = list(dict.fromkeys(commit for rows in files.values() for commit in commits_of(rows)))
    last = newest(commits)
    table: list[Sequence[Cell]] = []
    for name, rows in files.items():
        machines: list[dict[str, str]] = []
        for row in rows:
            if row["machine"] not in machines:
                machines.append(row["machine"])
        for machine in machines:
            commit = machine.get("commit", "")
            table.append(
                (
                    name,
                    sum(row["machine"] == machine for row in rows),
                    ", ".join(f"{key} {value}" for key, value in machine.items()),
                    commit,
                    ANOTHER_COMMIT if last and commit not in ("", last) else "",
                )
            )
        if not rows:
            table.append((name, 0, NOT_MEASURED, "", ""))
    if last:
        words = f"The newest commit of the rows is {last}. Rows of another one are marked: the code may have changed."
    else:
        words = f"Git knows none of the commits, so that no row is marked: {', '.join(commits) or 'no row names one'}."
    heads = ("file", "rows", "measured on", "commit", "mark")
    return [page.paragraph(words), page.table(heads, table)]


def units() -> list[str]:
    rows = [(name, column.unit, column.what, column.better) for name, column in COLUMNS.items()]
    return [page.table(("column of the rows", "unit", "what it is", "better"), rows)]


def build(folder: Path = RESULTS) -> str:
    found = load(folder)
    measured_on = sum(bool(measured.gpu) for measured in found.values())
    status = (
        f"Measured on a GPU: {measured_on} of {len(found)} kinds of rows."
        if measured_on
        else ("Nothing here ran on a GPU: what that leaves open is called “not measured” in every table.")
    )
    lead = page.paragraph(f"{status} Made from the rows in benchmarks/results by python -m benchmarks.report.")
    sections = {
        "Peers": peers(folder),
        "Operators": operators(found["ops"]),
        "Training step": step(found["step"]),
        "Rollouts": rollout(found["rollout"]),
        "Sandbox": sandbox(found["sandbox"]),
        "Growth": growth(found["growth"], found["step"]),
        "Long runs": long_run(found["long_run"]),
        "On a GPU": gpu(found["gpu"]),
        "Static evidence": static_evidence(found["kernels_aot"]),
        "Counts": counted(found["counts"]),
        "Predicted, not measured": predicted(),
        "Environment": environment(found, folder),
        "Units": units(),
    }
    return page.page("carft_fast: benchmarks", lead, sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--output", type=Path, default=RESULTS / "report.html")
    arguments = parser.parse_args()
    arguments.output.write_text(build(arguments.results), encoding="utf-8")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
