"""report.md, report.html and the learning curves of a run, from its metrics records."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from carft_fast.config import Config, load_config, method_name, to_toml
from carft_fast.core import InputError, first_line, read_json_object, visible, write_text, writing
from carft_fast.reports import page as page
from carft_fast.reports.metrics import METRICS, PHASES, MetricsLog

CURVES: dict[str, str] = {
    "reward": "reward",
    "accuracy": "accuracy",
    "kl": "KL to the reference",
    "entropy": "entropy",
    "completion_length": "completion length",
    "tokens_per_forward": "sampled tokens per forward",
    "contrastive_loss": "contrastive loss",
    "cosine": "cosine of z_1 and z_2",
    "loss": "loss",
}


def write_report(folder: Path, config: Config, records: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Write plots/*.png, report.md and report.html."""
    plots = folder / "plots"
    with writing(folder):
        plots.mkdir(exist_ok=True)
        written = _draw_plots(plots, records)
        (folder / "report.md").write_text(_markdown(config, summary, written), encoding="utf-8")
    _write_page(folder, config, records, summary)


def rewrite_page(folder: Path) -> Path:
    """Write report.html for a run folder as it is now, finished or not."""
    if not (folder / "metrics.jsonl").is_file():
        hint = f": a comparison, its page is {folder / 'compare.html'}" if (folder / "compare.csv").is_file() else ""
        raise InputError(f"{folder}: no metrics.jsonl, so this is no run folder{hint}")
    metrics = MetricsLog(folder, write=False)
    metrics.load()
    summary_file = folder / "summary.json"
    summary = read_json_object(summary_file) if summary_file.is_file() else None
    config = load_config(str(folder / "config.toml"))
    try:
        return _write_page(folder, config, metrics.records, summary)
    except (KeyError, TypeError, ValueError, IndexError) as error:  # a figure that is missing, or is none
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder}: metrics.jsonl or summary.json cannot be shown: {first_line(error)}") from error


def _write_page(
    folder: Path, config: Config, records: Sequence[dict[str, Any]], summary: dict[str, Any] | None
) -> Path:
    environment = read_json_object(folder / "run.json")
    write_text(folder / "report.html", _html(config, records, summary, environment))
    return folder / "report.html"


def _draw_plots(folder: Path, records: Sequence[dict[str, Any]]) -> list[str]:
    """Write the curves as pictures. Returns their file names."""
    figures = {}
    for name, title in CURVES.items():
        if stages := _stages_with(name, records):
            figure = figures[f"{name}.png"] = page.new_figure(6, 3.2)
            for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
                _draw_curve(axes, name, stage, records)
            figure.suptitle(textwrap.fill(f"{title}: {METRICS[name]}", 90), fontsize=9)
    if _rl_steps(records):
        figure = figures["seconds_per_phase.png"] = page.new_figure(6, 3.2)
        axes = figure.subplots()
        _draw_phases(axes, records)
        axes.set_title("seconds per phase", fontsize=9)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=110)
    return list(figures)


def _stages_with(name: str, records: Sequence[dict[str, Any]]) -> list[str]:
    return [stage for stage in ("sft", "rl") if any(name in r and r["stage"] == stage for r in records)]


def _draw_curve(axes: Any, name: str, stage: str, records: Sequence[dict[str, Any]]) -> None:
    def plot(kind: str, figure: str, label: str, **style: Any) -> None:
        points = [(r["step"], r[figure]) for r in records if (r["stage"], r["kind"]) == (stage, kind) and figure in r]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, **style)

    plot("train", name, "training")
    plot("eval", name, "held-out", marker="o")
    if name == "accuracy":
        plot("train", "train_accuracy", "rollouts", alpha=0.5)
        axes.set_ylim(0, 1)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    tidy(axes, f"{stage.upper()} step")


def tidy(axes: Any, x_label: str) -> None:
    """The look of every curve."""
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _rl_steps(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in records if r["stage"] == "rl" and r["kind"] == "train"]


def _draw_phases(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    steps = _rl_steps(records)
    recorded = set().union(*(r["seconds"] for r in steps)) - {"load", "checkpoint"}
    phases = [phase for phase in PHASES if phase in recorded]
    seconds = [[r["seconds"].get(phase, 0.0) for r in steps] for phase in phases]
    axes.stackplot([r["step"] for r in steps], seconds, labels=phases)
    axes.set_xlabel("RL step")
    axes.set_ylabel("seconds per step")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def result_table(summary: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows: a figure before the run's last stage, after it, and what changed."""
    start, change, stage = summary["start"], summary["change"], summary["start"]["stage"].upper()
    lengths = start["completion_length"], summary["completion_length"]["final"]
    shares = start["step_by_step"], summary["step_by_step"]["final"]
    columns = ("figure", f"before {stage}", f"after {stage}", "change, points")
    return columns, [
        (
            "greedy accuracy",
            f"{start['accuracy']:.1%}",
            f"{summary['final_accuracy']:.1%}",
            "no change" if _holds_zero(change["ci95"]) else _points(change["accuracy"]),
        ),
        (
            "95% interval",
            _interval(start["accuracy_ci95"]),
            _interval(summary["accuracy_ci95"]),
            "{} to {}".format(*map(_points, change["ci95"])),
        ),
        ("answers with more than one equation", *(f"{share:.1%}" for share in shares), ""),
        ("tokens per answer", *(f"{length:.1f}" for length in lengths), ""),
    ]


def change_in_words(summary: dict[str, Any]) -> str:
    """What the run's last stage did to the accuracy; "no change" where the interval of the difference holds zero."""
    start, change, stage = summary["start"], summary["change"], summary["start"]["stage"].upper()
    figures = f"{start['accuracy']:.1%} before {stage}, {summary['final_accuracy']:.1%} after"
    interval = "{} to {} points".format(*map(_points, change["ci95"]))
    if _holds_zero(change["ci95"]):
        said = f"No change in greedy accuracy: {figures}. The 95% interval of the difference, {interval}, holds zero."
    else:
        gain = _points(change["accuracy"])
        said = f"Greedy accuracy: {figures}, a change of {gain} points (95% interval {interval})."
    rows = summary["eval_rows"]
    return f"{said} {change['gained']} of {rows} answers became right, {change['lost']} became wrong."


def change_in_short(summary: dict[str, Any]) -> str:
    """The same in a few words."""
    change, start = summary["change"], summary["start"]
    gain = "no change" if _holds_zero(change["ci95"]) else f"{_points(change['accuracy'])} points"
    low, high = map(_points, change["ci95"])
    return f"accuracy {start['accuracy']:.1%} to {summary['final_accuracy']:.1%}, {gain} [{low}, {high}]"


def _cost_in_words(summary: dict[str, Any]) -> str:
    sampled = f"{summary['completion_tokens']:,} tokens sampled in RL, " * (summary["start"]["stage"] == "rl")
    return f"{sampled}{summary['seconds_total']:.0f} s in all"


def _holds_zero(interval: Sequence[float]) -> bool:
    return interval[0] <= 0 <= interval[1]


def _points(share: float) -> str:
    """A difference of accuracies in percentage points."""
    return f"{100 * share:+.1f}"


def _interval(interval: Sequence[float]) -> str:
    return f"{interval[0]:.1%} to {interval[1]:.1%}"


def _html(
    config: Config, records: Sequence[dict[str, Any]], summary: dict[str, Any] | None, environment: dict[str, Any]
) -> str:
    """The page of a run; `summary` is None while it goes on."""
    trained = f"Model {config.model.path}, training data {config.data.trained_on}"
    sections: dict[str, list[str]] = {}
    if summary is None:
        lead = page.paragraph(f"{trained}. Not finished: {len(records)} records so far.")
    else:
        lead = page.paragraph(
            f"{trained}, {summary['eval_rows']} held-out rows of {config.data.eval}. {_cost_in_words(summary)}."
        )
        example = summary["example"]
        stage = summary["start"]["stage"].upper()
        sections["Result"] = [page.table(*result_table(summary)), page.paragraph(change_in_words(summary))]
        sections["One question, before and after"] = [
            page.paragraph(f"{example['question'].strip()} (target {example['target']})"),
            f"<h3>Before {stage}</h3>{page.quote(example['before'])}",
            f"<h3>After {stage}</h3>{page.quote(example['after'])}",
        ]
    curves = [
        page.chart(f"{title}, {stage.upper()}", partial(_draw_curve, name=name, stage=stage, records=records))
        for name, title in CURVES.items()
        for stage in _stages_with(name, records)
    ]
    sections["Learning curves"] = [page.charts(*curves)]
    if _rl_steps(records):
        seconds = page.chart("Seconds per phase of each RL step", partial(_draw_phases, records=records))
        sections["Seconds per phase"] = [page.charts(seconds)]
        if summary is not None:
            phases = [(phase, PHASES[phase], value) for phase, value in summary["seconds_by_phase"].items()]
            sections["Seconds per phase"].append(page.table(("phase", "what", "seconds, the run's sum"), phases))
    if trainings := [r for r in records if r["kind"] == "train"]:
        last = trainings[-1]
        values = [(name, last[name], meaning) for name, meaning in METRICS.items() if name in last]
        sections["Every quantity"] = [
            page.paragraph(f"As of {last['stage'].upper()} step {last['step']}, and what it is, with its unit."),
            page.table(("name", "value", "what it is"), [row for row in values if isinstance(row[1], float | int)]),
        ]
    facts = [(name, str(value)) for name, value in _flat(environment).items()]
    settings = page.details("Settings", page.pre(to_toml(config)))
    sections["Environment"] = [page.table(("what", "value"), facts), settings]
    method = summary["method"] if summary else method_name(config)
    return page.page(f"{config.output.name}: {method}, seed {config.seed}", lead, sections)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names with dots between."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = ([visible(" ".join(cell.split())).replace("|", r"\|") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *cells))


def code(text: str) -> str:
    """A short text in Markdown, on one line, that is shown letter by letter."""
    line = " ".join(visible(text).split())
    quotes = "`" * (_longest_quotes(line) + 1)
    space = " " if "`" in (line[:1], line[-1:]) else ""
    return f"{quotes}{space}{line}{space}{quotes}" if line else ""


def fenced(text: str) -> str:
    """A text of data or a model as a block of Markdown, in which no link, picture or HTML of it acts."""
    fence = "`" * max(3, _longest_quotes(text) + 1)
    return f"{fence}text\n{visible(text.strip())}\n{fence}"


def _longest_quotes(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _markdown(config: Config, summary: dict[str, Any], plots: Sequence[str]) -> str:
    lead = (
        f"Model {code(config.model.path)}, training data {code(config.data.trained_on)}, {summary['eval_rows']} "
        f"held-out rows of {code(config.data.eval)}. {_cost_in_words(summary)}."
    )
    example = summary["example"]
    stage = summary["start"]["stage"].upper()
    phases = [(phase, PHASES[phase], f"{seconds:.1f}") for phase, seconds in summary["seconds_by_phase"].items()]
    pictures = "\n".join(f"![{name.removesuffix('.png')}](plots/{name})" for name in plots)
    return f"""# {config.output.name}: {summary["method"]}, seed {summary["seed"]}

{lead}

{markdown_table(*result_table(summary))}

{change_in_words(summary)}

## One question, before and after

{fenced(example["question"])}

Target: {code(example["target"])}

Before {stage}:

{fenced(example["before"])}

After {stage}:

{fenced(example["after"])}

## Seconds per phase

{markdown_table(("phase", "what", "seconds"), phases)}

## Learning curves

{pictures}

Versions: {", ".join(f"{name} {number}" for name, number in summary["versions"].items())}
"""
