"""What a comparison leaves: compare.csv, summary.csv, curves, compare.md and compare.html."""

import csv
import io
import os
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Group
from rich.text import Text

from carft_fast import core
from carft_fast.compare.stats import (
    SFT,
    SFT_TIME,
    Accuracy,
    MethodSummary,
    Outcome,
    Paired,
    Spread,
    Trajectory,
    summarise,
    verdict,
)
from carft_fast.config import Config
from carft_fast.reports import code, markdown_table, tidy
from carft_fast.reports import page as page
from carft_fast.training import versions

CSV_FIELDS = (
    *("label", "method", "seed", "step", "samples", "seconds", "accuracy", "correct", "rows", "extractable"),
    *("completion_length", "reward", "kl", "entropy"),
)
NEVER = "never"
CURVES: dict[str, tuple[str, str, str]] = {
    "accuracy_samples": ("accuracy", "samples", "greedy accuracy on held-out rows"),
    "accuracy_seconds": ("accuracy", "seconds", "greedy accuracy on held-out rows"),
    "reward": ("reward", "samples", "mean reward of the rollouts since the evaluation before"),
    "kl": ("kl", "samples", "KL to the checkpoint, nats per token"),
    "entropy": ("entropy", "samples", "entropy, nats per token"),
    "completion_length": ("completion_length", "samples", "tokens per held-out answer"),
}
"""File -> what is drawn, against what, title."""
Curve = dict[str, list[tuple[float, list[float]]]]
"""Label -> points: the mean x over seeds, and the y of each seed."""


def write_comparison(
    folder: Path,
    runs: Sequence[Trajectory],
    config: Config,
    ran: Sequence[str],
    device: torch.device,
    judged: Sequence[Outcome] = (),
) -> None:
    """`ran` has a line for each run of a seed: what was run. `judged`: the outcomes of a study."""
    summaries = summarise(runs)
    core.write_text(folder / "compare.csv", evaluations_csv(runs))
    core.write_text(folder / "summary.csv", summary_csv(summaries))
    if pairs := list(paired_rows(judged)):
        core.write_text(folder / "paired.csv", _csv(pairs))
    plots = draw_curves(folder, runs, judged)
    facts = [*describe(config, runs, device), *ran]
    core.write_text(folder / "compare.md", markdown(runs, summaries, plots, facts, judged))
    core.write_text(folder / "compare.html", html(runs, summaries, facts, judged))


def paired_rows(judged: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """A line for each outcome, reference and other arm."""
    for outcome in judged:
        for reference, pairs in outcome.differences.items():
            for pair in pairs:
                yield {"outcome": outcome.name, "unit": outcome.unit, "reference": reference, **pair._asdict()}


def evaluations_csv(runs: Sequence[Trajectory]) -> str:
    """A line for each method, seed and evaluation."""
    return _csv(
        {name: getattr(e if hasattr(e, name) else run, name) for name in CSV_FIELDS} | {"seconds": round(e.seconds, 4)}
        for run in runs
        for e in run.evaluations
    )


def summary_csv(summaries: Sequence[MethodSummary]) -> str:
    """A line for each method; accuracies as shares."""
    return _csv(map(_summary_row, summaries))


def _summary_row(s: MethodSummary) -> dict[str, Any]:
    def spread(name: str, found: Spread) -> dict[str, Any]:
        return {f"{name}_mean": found.mean, f"{name}_sd": found.sd, f"{name}_min": found.low, f"{name}_max": found.high}

    def accuracy(name: str, found: Accuracy) -> dict[str, Any]:
        return spread(name, found.spread) | {f"{name}_ci95_low": found.ci95[0], f"{name}_ci95_high": found.ci95[1]}

    def reach(value: float | None) -> float | str | None:
        return None if s.reached is None else NEVER if value is None else value

    return {
        **{name: getattr(s, name) for name in ("label", "method", "seeds")},
        **accuracy("final_accuracy", s.final),
        **spread("best_accuracy", s.best),
        **accuracy("equal_samples_accuracy", s.equal_samples),
        **accuracy("equal_time_accuracy", s.equal_time),
        **{name: getattr(s, name) for name in ("worst_drop", "collapsed", "samples_to_collapse", "extractable")},
        **{name: getattr(s, name) for name in ("reward", "kl", "entropy", "completion_length")},
        "reached_sft": s.reached,
        "samples_to_reach_sft": reach(s.samples_to_reach),
        "seconds_to_reach_sft": reach(s.seconds_to_reach),
        "samples": s.samples,
        "seconds_mean": s.seconds.mean,
        "seconds_sd": s.seconds.sd,
        "samples_per_second": s.samples_per_second,
    }


def _csv(rows: Iterable[dict[str, Any]]) -> str:
    """CSV of rows that all have the same columns."""
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def draw_curves(folder: Path, runs: Sequence[Trajectory], judged: Sequence[Outcome] = ()) -> list[str]:
    """Write the curves as pictures. Returns their file names."""
    written = []
    for file, title, draw in (*_curves(runs), *_forests(judged)):
        figure = page.new_figure(7, 3.6)
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title, fontsize=9)
        figure.savefig(folder / f"{file}.png", dpi=110)
        written.append(f"{file}.png")
    return written


def _curves(runs: Sequence[Trajectory]) -> Iterator[tuple[str, str, Callable[[Any], None]]]:
    """File, title and what draws, of each curve that has a point."""
    for file, (name, against, title) in CURVES.items():
        if lines := _points(runs, name, against):
            yield file, title, partial(_draw_curve, lines=lines, against=against)


def _forests(judged: Sequence[Outcome]) -> Iterator[tuple[str, str, Callable[[Any], None]]]:
    """The same of the paired differences of each outcome and reference."""
    for number, outcome in enumerate(judged):
        for reference, pairs in outcome.differences.items():
            title = f"{outcome.name}: minus that of {reference}, 95% intervals over seeds"
            draw = partial(_draw_forest, pairs=pairs, unit=outcome.unit)
            yield f"paired_{number}_{re.sub(r'[^A-Za-z0-9]+', '_', reference)}", title, draw


def _draw_forest(axes: Any, pairs: Sequence[Paired], unit: str) -> None:
    """A row for each arm: its mean difference, and the interval."""
    for row, pair in enumerate(pairs):
        axes.plot([pair.low, pair.high], [row, row], linewidth=1.2, color=page.SERIES[0])
        axes.plot([pair.mean], [row], marker="o", markersize=4, color=page.SERIES[0])
    axes.axvline(0, linewidth=0.8, color=page.SERIES[1])
    axes.set_yticks(range(len(pairs)), [pair.label for pair in pairs])
    axes.invert_yaxis()
    tidy(axes, unit)


def _points(runs: Sequence[Trajectory], name: str, against: str) -> Curve:
    """A point for each evaluation that recorded `name`; no label without a point."""
    lines: Curve = {}
    for label in dict.fromkeys(run.label for run in runs):
        for evaluations in zip(*(run.evaluations for run in runs if run.label == label), strict=False):
            if known := [e for e in evaluations if getattr(e, name) is not None]:
                x = statistics.fmean(getattr(e, against) for e in known)
                lines.setdefault(label, []).append((x, [getattr(e, name) for e in known]))
    return lines


def _draw_curve(axes: Any, lines: Curve, against: str) -> None:
    """A line per method through the means over seeds; the band is from the lowest seed to the highest."""
    for label, points in lines.items():
        x, values = zip(*points, strict=True)
        means = [statistics.fmean(of_seeds) for of_seeds in values]
        (line,) = axes.plot(x, means, marker="o", markersize=3, linewidth=1.2, label=label)
        low, high = list(map(min, values)), list(map(max, values))
        axes.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    tidy(axes, "training seconds" if against == "seconds" else "rollouts (SFT: annotated rows)")
    axes.legend(frameon=False, fontsize=8)


def describe(config: Config, runs: Sequence[Trajectory], device: torch.device) -> list[str]:
    """Model, rows, machine, versions, commit."""
    seeds = ", ".join(map(str, sorted({run.seed for run in runs})))
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return [
        f"Model {code(config.model.path)}, training data {code(config.data.trained_on)}, {runs[0].final.rows} "
        f"held-out rows of {code(config.data.eval)}, seeds {seeds}",
        f"Machine: {machine}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{config.model.compute_dtype}; sampling by {config.rollout.engine}",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in versions().items()),
        f"Commit: {commit()}",
    ]


def commit() -> str:
    """Of the git tree that this package is a part of; not of one around it, whose settings may name programs to run."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "not in a git tree"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not in a git tree"
    return found.stdout.strip()


class Table(NamedTuple):
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


INTRODUCTION = (
    "Every run of a seed starts from one SFT checkpoint. Seconds are training seconds: loading, evaluation and "
    "checkpoints are left out."
)
ABOUT_CURVES = "Mean over seeds; the band is from the lowest seed to the highest."


def markdown(
    runs: Sequence[Trajectory],
    summaries: Sequence[MethodSummary],
    plots: Sequence[str],
    facts: Sequence[str],
    judged: Sequence[Outcome] = (),
) -> str:
    blocks = [f"# {heading(summaries)}", "\n".join(f"- {fact}" for fact in facts), INTRODUCTION]
    for title, parts in (sections(summaries) | paired_sections(judged)).items():
        blocks.append(f"## {title}")
        blocks += [markdown_table(*part) if isinstance(part, Table) else part for part in parts]
    pictures = "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in plots)
    return "\n\n".join([*blocks, "## Curves", ABOUT_CURVES, pictures]) + "\n"


def html(
    runs: Sequence[Trajectory],
    summaries: Sequence[MethodSummary],
    facts: Sequence[str],
    judged: Sequence[Outcome] = (),
) -> str:
    parts = {
        title: [page.table(*block) if isinstance(block, Table) else page.paragraph(block) for block in blocks]
        for title, blocks in (sections(summaries) | paired_sections(judged)).items()
    }
    drawn = [page.chart(title, draw) for _, title, draw in (*_curves(runs), *_forests(judged))]
    parts["Curves"] = [page.paragraph(ABOUT_CURVES), page.charts(*drawn)]
    parts["Environment"] = [page.paragraph(fact) for fact in facts]
    return page.page(heading(summaries), page.paragraph(INTRODUCTION), parts)


def screen(summaries: Sequence[MethodSummary], folder: Path, *, width: int) -> Group:
    """What a terminal shows at the end, prose in lines of at most `width`."""

    def cell(found: Accuracy) -> str:
        spread, (low, high) = found
        seeds = f" ± {spread.sd:.1%}" if spread.sd is not None else ""
        return f"{spread.mean:.1%}{seeds} [{100 * low:.1f}, {100 * high:.1f}]"

    seeds = "one seed" if summaries[0].seeds == 1 else f"{summaries[0].seeds} seeds, mean ± standard deviation"
    columns = ("method", "at equal samples", "at equal time", "final", "seconds")
    table = core.Table(*columns, title=f"greedy accuracy with its 95% interval, {seeds}")
    for s in summaries:
        table.add_row(s.label, *map(cell, (s.equal_samples, s.equal_time, s.final)), f"{s.seconds.mean:.1f}")
    _, _, *verdicts = sections(summaries)["Accuracy"]
    said = [core.wrapped(core.visible(str(text)), width) for text in verdicts]
    return Group(table, Text("\n".join([*said, f"Report: {core.visible(str(folder / 'compare.html'))}"]), no_wrap=True))


def heading(summaries: Sequence[MethodSummary]) -> str:
    return "Comparison: " + ", ".join(s.label for s in summaries)


def sections(summaries: Sequence[MethodSummary]) -> dict[str, list[str | Table]]:
    """The figures: heading -> paragraphs and tables."""

    def percent(found: Accuracy) -> str:
        spread, (low, high) = found
        seeds = f" ± {spread.sd:.1%} ({spread.low:.1%} to {spread.high:.1%})" if spread.sd is not None else ""
        return f"{spread.mean:.1%}{seeds} [{low:.1%}, {high:.1%}]"

    def number(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    def seconds(spread: Spread) -> str:
        return number(spread.mean, 1) + (f" ± {spread.sd:.1f}" if spread.sd is not None else "")

    def reach(s: MethodSummary, value: float | None, unit: str) -> str:
        if s.reached is None:
            return ""
        if value is None:
            return NEVER
        return f"{value:,.0f}{unit}" + (f" ({s.reached} of {s.seeds} seeds)" if s.reached < s.seeds else "")

    def table(columns: dict[str, Callable[[MethodSummary], str]]) -> Table:
        return Table(("method", *columns), [(s.label, *(cell(s) for cell in columns.values())) for s in summaries])

    if summaries[0].seeds > 1:
        figure = "Mean over seeds ± sample standard deviation (lowest to highest)"
    else:
        figure = "One seed: no spread over seeds is known; the figure"
    # continued SFT for equal time is compared at equal time alone, and is the only continued SFT there
    untimed = [s for s in summaries if s.method != SFT_TIME]
    at_equal_time = [s for s in summaries if s.method != SFT or len(untimed) == len(summaries)]
    return {
        "Accuracy": [
            f"Greedy, held-out rows. {figure}, then the Wilson 95% interval of the rows of all seeds together. "
            "All seeds answer the same questions, so that interval is narrower than independent rows would give.",
            table(
                {
                    "at equal samples": lambda s: percent(s.equal_samples),
                    "at equal time": lambda s: percent(s.equal_time),
                    "final": lambda s: percent(s.final),
                    "best": lambda s: f"{s.best.mean:.1%} ({s.best.low:.1%} to {s.best.high:.1%})",
                }
            ),
            f"At equal samples: {verdict({s.label: s.equal_samples for s in untimed or summaries})}",
            f"At equal time: {verdict({s.label: s.equal_time for s in at_equal_time})}",
        ],
        "Cost": [
            table(
                {
                    "samples": lambda s: number(s.samples, 0),
                    "training seconds": lambda s: seconds(s.seconds),
                    "samples/s": lambda s: number(s.samples_per_second, 1),
                    "samples to continued SFT's best": lambda s: reach(s, s.samples_to_reach, ""),
                    "seconds to it": lambda s: reach(s, s.seconds_to_reach, " s"),
                }
            )
        ],
        "State at the end": [
            table(
                {
                    "reward": lambda s: number(s.reward),
                    "KL": lambda s: number(s.kl, 4),
                    "entropy": lambda s: number(s.entropy),
                    "tokens per answer": lambda s: number(s.completion_length, 1),
                    "answers extractable": lambda s: f"{s.extractable:.1%}",
                    "worst drop after best (points)": lambda s: f"{100 * s.worst_drop:.1f}",
                    "collapsed": lambda s: (
                        f"{s.collapsed} of {s.seeds}"
                        + (f", after {s.samples_to_collapse:,.0f} samples" if s.collapsed else "")
                    ),
                }
            ),
            "Reward, KL and entropy are means over the steps since the evaluation before the last one. Collapsed: the "
            "final accuracy is below half of the run's best, or the share of extractable answers below half of what it "
            "was at the start.",
        ],
    }


def paired_sections(judged: Sequence[Outcome]) -> dict[str, list[str | Table]]:
    """The differences of a study's arms: heading -> paragraphs and tables."""
    columns = ("arm", "mean difference [95%]", "p", "p, corrected", "detectable")
    found: dict[str, list[str | Table]] = {}
    for outcome in judged:
        for reference, pairs in outcome.differences.items():
            rows = [
                (
                    pair.label,
                    f"{pair.mean:+,.1f} [{pair.low:+,.1f}, {pair.high:+,.1f}]",
                    f"{pair.p:.3f}",
                    f"{pair.adjusted_p:.3f}",
                    f"{pair.detectable:,.1f}",
                )
                for pair in pairs
            ]
            found[f"{outcome.name[0].upper()}{outcome.name[1:]}, against {reference}"] = [
                f"In {outcome.unit}, arm minus {reference}, paired by seed ({pairs[0].seeds} seeds): mean, 95% t "
                "interval, p of the paired t test, the same after Holm's correction for the arms of this table, and "
                "the difference that these seeds would find with 80% power.",
                Table(columns, rows),
            ]
    return found
