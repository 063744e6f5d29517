"""What a comparison leaves: compare.csv, summary.csv, curves, compare.md and compare.html."""

import csv
import io
import os
import statistics
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from carft_fast.compare.stats import SFT, SFT_TIME, Accuracy, MethodSummary, Trajectory, summarise, verdict
from carft_fast.config import Config
from carft_fast.core import write_text
from carft_fast.reports import page as page
from carft_fast.reports import tidy
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


def write_comparison(
    folder: Path, runs: Sequence[Trajectory], config: Config, ran: Sequence[str], device: torch.device
) -> None:
    """`ran` says in a line for each run of a seed what was run."""
    summaries = summarise(runs)
    write_text(folder / "compare.csv", evaluations_csv(runs))
    write_text(folder / "summary.csv", summary_csv(summaries))
    plots = draw_curves(folder, runs)
    facts = [*describe(config, runs, device), *ran]
    write_text(folder / "compare.md", markdown(runs, summaries, plots, facts))
    write_text(folder / "compare.html", html(runs, summaries, facts))


def evaluations_csv(runs: Sequence[Trajectory]) -> str:
    """A line for each method, seed and evaluation."""
    rows = []
    for run in runs:
        for e in run.evaluations:
            row = {name: getattr(e if hasattr(e, name) else run, name) for name in CSV_FIELDS}
            rows.append(row | {"seconds": round(e.seconds, 4)})
    return _csv(CSV_FIELDS, rows)


def summary_csv(summaries: Sequence[MethodSummary]) -> str:
    """A line for each method; accuracies as shares."""
    rows = [_flat(summary) for summary in summaries]
    return _csv(tuple(rows[0]), rows)


def _flat(s: MethodSummary) -> dict[str, Any]:
    def accuracy(name: str, found: Accuracy) -> dict[str, Any]:
        spread = found.spread
        low, high = found.ci95
        parts = {"mean": spread.mean, "sd": spread.sd, "min": spread.low, "max": spread.high}
        return {f"{name}_{part}": value for part, value in (parts | {"ci95_low": low, "ci95_high": high}).items()}

    def reach(value: float | None) -> float | str | None:
        return None if s.reached is None else NEVER if value is None else value

    return {
        "label": s.label,
        "method": s.method,
        "seeds": s.seeds,
        **accuracy("final_accuracy", s.final),
        "best_accuracy_mean": s.best.mean,
        "best_accuracy_sd": s.best.sd,
        "best_accuracy_min": s.best.low,
        "best_accuracy_max": s.best.high,
        **accuracy("equal_samples_accuracy", s.equal_samples),
        **accuracy("equal_time_accuracy", s.equal_time),
        "worst_drop": s.worst_drop,
        "collapsed": s.collapsed,
        "extractable": s.extractable,
        "reward": s.reward,
        "kl": s.kl,
        "entropy": s.entropy,
        "completion_length": s.completion_length,
        "reached_sft": s.reached,
        "samples_to_reach_sft": reach(s.samples_to_reach),
        "seconds_to_reach_sft": reach(s.seconds_to_reach),
        "samples": s.samples,
        "seconds_mean": s.seconds.mean,
        "seconds_sd": s.seconds.sd,
        "samples_per_second": s.samples_per_second,
    }


def _csv(fields: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def draw_curves(folder: Path, runs: Sequence[Trajectory]) -> list[str]:
    """A line for each method, its mean over seeds; the band is from the lowest seed to the highest."""
    from matplotlib.figure import Figure

    written = []
    for file, (_, _, title) in CURVES.items():
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.subplots()
        if not _draw_curve(axes, file, runs):
            continue
        axes.set_title(title, fontsize=9)
        figure.savefig(folder / f"{file}.png", dpi=110)
        written.append(f"{file}.png")
    return written


def _draw_curve(axes: Any, file: str, runs: Sequence[Trajectory]) -> bool:
    """Whether there was something to draw."""
    name, against, _ = CURVES[file]
    for label in dict.fromkeys(run.label for run in runs):
        curve = [
            [(getattr(e, against), getattr(e, name)) for e in at if getattr(e, name) is not None]
            for at in zip(*(run.evaluations for run in runs if run.label == label), strict=False)
        ]
        points = [list(zip(*at, strict=True)) for at in curve if at]
        if points:
            x, y = ([statistics.fmean(at[i]) for at in points] for i in (0, 1))
            (line,) = axes.plot(x, y, marker="o", markersize=3, linewidth=1.2, label=label)
            low, high = [min(at[1]) for at in points], [max(at[1]) for at in points]
            axes.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    if not axes.lines:
        return False
    tidy(axes, "training seconds" if against == "seconds" else "rollouts (SFT: annotated rows)")
    axes.legend(frameon=False, fontsize=8)
    return True


def describe(config: Config, runs: Sequence[Trajectory], device: torch.device) -> list[str]:
    """Model, rows, machine, versions, commit."""
    seeds = sorted({run.seed for run in runs})
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return [
        f"Model `{config.model.path}`, training data `{config.data.train}`, {runs[0].final.rows} held-out rows of "
        f"`{config.data.eval}`, seeds {', '.join(map(str, seeds))}",
        f"Machine: {machine}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{config.model.compute_dtype}; sampling by {config.rollout.engine}",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in versions().items()),
        f"Commit: {commit()}",
    ]


def commit() -> str:
    """Of the git tree this package lies in."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
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
    runs: Sequence[Trajectory], summaries: Sequence[MethodSummary], plots: Sequence[str], facts: Sequence[str]
) -> str:
    lines = [f"# {heading(summaries)}", "", *(f"- {fact}" for fact in facts), "", INTRODUCTION]
    for title, blocks in sections(summaries).items():
        lines += ["", f"## {title}"]
        for block in blocks:
            lines.append("")
            if isinstance(block, Table):
                lines += [f"| {' | '.join(block.columns)} |", "| --- |" + " --- |" * (len(block.columns) - 1)]
                lines += [f"| {' | '.join(row)} |" for row in block.rows]
            else:
                lines.append(block)
    lines += ["", "## Curves", "", ABOUT_CURVES, ""]
    lines += [f"![{name.removesuffix('.png')}]({name})" for name in plots]
    return "\n".join(lines) + "\n"


def html(runs: Sequence[Trajectory], summaries: Sequence[MethodSummary], facts: Sequence[str]) -> str:
    parts = {
        title: [page.table(*block) if isinstance(block, Table) else page.paragraph(block) for block in blocks]
        for title, blocks in sections(summaries).items()
    }
    drawn = [
        page.chart(title, partial(_draw_curve, file=file, runs=runs))
        for file, (name, _, title) in CURVES.items()
        if any(getattr(e, name) is not None for run in runs for e in run.evaluations)
    ]
    parts["Curves"] = [page.paragraph(ABOUT_CURVES), page.charts(*drawn)]
    parts["Environment"] = [page.paragraph(fact) for fact in facts]
    return page.page(heading(summaries), page.paragraph(INTRODUCTION), parts)


def heading(summaries: Sequence[MethodSummary]) -> str:
    return "Comparison: " + ", ".join(s.label for s in summaries)


def sections(summaries: Sequence[MethodSummary]) -> dict[str, list[str | Table]]:
    """The figures: heading -> paragraphs and tables."""
    several = summaries[0].seeds > 1

    def percent(found: Accuracy) -> str:
        spread, (low, high) = found.spread, found.ci95
        seeds = f" ± {spread.sd:.1%} ({spread.low:.1%} to {spread.high:.1%})" if spread.sd is not None else ""
        return f"{spread.mean:.1%}{seeds} [{low:.1%}, {high:.1%}]"

    def number(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    def reach(s: MethodSummary, value: float | None, unit: str) -> str:
        if s.reached is None:
            return ""
        if value is None:
            return NEVER
        return f"{value:,.0f}{unit}" + (f" ({s.reached} of {s.seeds} seeds)" if s.reached < s.seeds else "")

    def table(columns: dict[str, Callable[[MethodSummary], str]]) -> Table:
        return Table(("method", *columns), [(s.label, *(cell(s) for cell in columns.values())) for s in summaries])

    timed = [s for s in summaries if s.method == SFT_TIME]
    return {
        "Accuracy": [
            "Greedy, held-out rows. "
            + ("Mean over seeds ± sample standard deviation (lowest to highest)" * several)
            + ("One seed: no spread over seeds is known; the figure" * (not several))
            + ", then the Wilson 95% interval of the rows of all seeds together. All seeds answer the same questions, "
            "so that interval is narrower than independent rows would give.",
            table(
                {
                    "at equal samples": lambda s: percent(s.equal_samples),
                    "at equal time": lambda s: percent(s.equal_time),
                    "final": lambda s: percent(s.final),
                    "best": lambda s: f"{s.best.mean:.1%} ({s.best.low:.1%} to {s.best.high:.1%})",
                }
            ),
            "At equal samples: "
            + verdict({s.label: s.equal_samples for s in summaries if s not in timed or len(timed) == len(summaries)}),
            "At equal time: "
            # continued SFT has its own run for the whole of that time
            + verdict({s.label: s.equal_time for s in summaries if s.method != SFT or not timed}),
        ],
        "Cost": [
            table(
                {
                    "samples": lambda s: number(s.samples, 0),
                    "training seconds": lambda s: (
                        number(s.seconds.mean, 1) + (f" ± {s.seconds.sd:.1f}" if s.seconds.sd is not None else "")
                    ),
                    "samples/s": lambda s: number(s.samples_per_second, 1),
                    "samples to continued SFT's best": lambda s: reach(s, s.samples_to_reach, ""),
                    "seconds to it": lambda s: reach(s, s.seconds_to_reach, " s"),
                }
            ),
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
                    "collapsed": lambda s: f"{s.collapsed} of {s.seeds}",
                }
            ),
            "Reward, KL and entropy are means over the steps since the evaluation before the last one. Collapsed: the "
            "final accuracy is below half of the run's best, or the share of extractable answers below half of what it "
            "was at the start.",
        ],
    }
