"""report.md, report.html and the learning curves of a run, from its metrics records."""

import json
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from carft_fast.config import Config, load_config, method_name, to_toml
from carft_fast.core import InputError, write_text, writing
from carft_fast.reports import page as page
from carft_fast.reports.metrics import METRICS, PHASES

CURVES: dict[str, str] = {
    "reward": "reward",
    "accuracy": "accuracy",
    "kl": "KL to the reference",
    "entropy": "entropy",
    "completion_length": "completion length",
    "contrastive_loss": "contrastive loss",
    "cosine": "cosine of z_1 and z_2",
    "loss": "loss",
}


def write_report(folder: Path, config: Config, records: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Write plots/*.png, report.md and report.html."""
    plots = folder / "plots"
    with writing(folder):
        plots.mkdir(exist_ok=True)
        written = [*_draw_curves(plots, records), *_draw_seconds(plots, records)]
        (folder / "report.md").write_text(_markdown(config, summary, written), encoding="utf-8")
    write_text(folder / "report.html", html(config, records, summary, _environment(folder)))


def rewrite_page(folder: Path) -> Path:
    """report.html of a run folder as it is now, finished or not."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        hint = f": a comparison, its page is {folder / 'compare.html'}" if (folder / "compare.csv").is_file() else ""
        raise InputError(f"{folder}: no metrics.jsonl, so this is no run folder{hint}")
    # a run that goes on may be in the middle of its last line
    lines = [line for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    summary_file = folder / "summary.json"
    summary = json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.is_file() else None
    config = load_config(str(folder / "config.toml"))
    write_text(
        folder / "report.html", html(config, [json.loads(line) for line in lines], summary, _environment(folder))
    )
    return folder / "report.html"


def _environment(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def _draw_curves(folder: Path, records: Sequence[dict[str, Any]]) -> list[str]:
    from matplotlib.figure import Figure

    written = []
    for name, title in CURVES.items():
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        stages = _stages_with(name, records)
        if not stages:
            continue
        for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
            _draw_curve(axes, name, stage, records)
        figure.suptitle(textwrap.fill(f"{title}: {METRICS[name]}", 90), fontsize=9)
        figure.savefig(folder / f"{name}.png", dpi=110)
        written.append(f"{name}.png")
    return written


def _stages_with(name: str, records: Sequence[dict[str, Any]]) -> list[str]:
    return [stage for stage in ("sft", "rl") if any(name in r and r["stage"] == stage for r in records)]


def _draw_curve(axes: Any, name: str, stage: str, records: Sequence[dict[str, Any]]) -> None:
    for kind, style in (("train", {"linewidth": 1.2}), ("eval", {"marker": "o", "linewidth": 1.2})):
        points = [(r["step"], r[name]) for r in records if (r["stage"], r["kind"]) == (stage, kind) and name in r]
        if points:
            axes.plot(*zip(*points, strict=True), label="held-out" if kind == "eval" else "training", **style)
    if name == "accuracy":
        sampled = [(r["step"], r["train_accuracy"]) for r in records if r["stage"] == stage and "train_accuracy" in r]
        if sampled:
            axes.plot(*zip(*sampled, strict=True), label="rollouts", alpha=0.5, linewidth=1.2)
        axes.set_ylim(0, 1)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    tidy(axes, f"{stage.upper()} step")


def tidy(axes: Any, x_label: str) -> None:
    """The look of every curve."""
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_seconds(folder: Path, records: Sequence[dict[str, Any]]) -> list[str]:
    from matplotlib.figure import Figure

    if not _rl_steps(records):
        return []
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    _draw_phases(axes, records)
    axes.set_title("seconds per phase", fontsize=9)
    figure.savefig(folder / "seconds_per_phase.png", dpi=110)
    return ["seconds_per_phase.png"]


def _rl_steps(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in records if r["stage"] == "rl" and r["kind"] == "train"]


def _draw_phases(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    steps = _rl_steps(records)
    phases = [
        phase for phase in PHASES if any(phase in r["seconds"] for r in steps) and phase not in ("load", "checkpoint")
    ]
    axes.stackplot(
        [r["step"] for r in steps],
        [[r["seconds"].get(phase, 0.0) for r in steps] for phase in phases],
        labels=phases,
    )
    axes.set_xlabel("RL step")
    axes.set_ylabel("seconds per step")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _result_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Figure, before RL, at the end."""
    low, high = summary["accuracy_ci95"]
    sft_low, sft_high = summary["sft_accuracy_ci95"]
    steps, length = summary["step_by_step"], summary["completion_length"]
    return [
        ("greedy accuracy", f"{summary['sft_accuracy']:.1%}", f"{summary['final_accuracy']:.1%}"),
        ("95% interval (Wilson)", f"{sft_low:.1%} to {sft_high:.1%}", f"{low:.1%} to {high:.1%}"),
        ("answers with more than one equation", f"{steps['sft']:.1%}", f"{steps['final']:.1%}"),
        ("tokens per answer", f"{length['sft']:.1f}", f"{length['final']:.1f}"),
    ]


def html(
    config: Config, records: Sequence[dict[str, Any]], summary: dict[str, Any] | None, environment: dict[str, Any]
) -> str:
    """The page of a run; `summary` is None while it goes on."""
    trained = f"Model {config.model.path}, training data {config.data.train}"
    sections: dict[str, list[str]] = {}
    if summary is None:
        lead = page.paragraph(f"{trained}. Not finished: {len(records)} records so far.")
    else:
        lead = page.paragraph(
            f"{trained}, {summary['eval_rows']} held-out rows of {config.data.eval}. "
            f"{summary['completion_tokens']:,} tokens sampled in RL, {summary['seconds_total']:.0f} s in all."
        )
        example = summary["example"]
        sections["Result"] = [page.table(("figure", "before RL", "final"), _result_rows(summary))]
        sections["One question, before and after"] = [
            page.paragraph(f"{example['question'].strip()} (target {example['target']})"),
            *(
                f"<h3>{when}</h3>{page.quote(example[key])}"
                for when, key in (("Before RL", "before"), ("Final", "after"))
            ),
        ]
    sections["Learning curves"] = [
        page.charts(
            *(
                page.chart(f"{title}, {stage.upper()}", partial(_draw_curve, name=name, stage=stage, records=records))
                for name, title in CURVES.items()
                for stage in _stages_with(name, records)
            )
        )
    ]
    if _rl_steps(records):
        seconds = page.chart("Seconds per phase of each RL step", partial(_draw_phases, records=records))
        sections["Seconds per phase"] = [page.charts(seconds)]
        if summary is not None:
            phases = [(phase, PHASES[phase], value) for phase, value in summary["seconds_by_phase"].items()]
            sections["Seconds per phase"].append(page.table(("phase", "what", "seconds, the run's sum"), phases))
    trainings = [r for r in records if r["kind"] == "train"]
    if trainings:
        last = trainings[-1]
        sections["Every quantity"] = [
            page.paragraph(f"As of {last['stage'].upper()} step {last['step']}, and what it is, with its unit."),
            page.table(
                ("name", "value", "what it is"),
                [
                    (name, last[name], meaning)
                    for name, meaning in METRICS.items()
                    if isinstance(last.get(name), float | int)
                ],
            ),
        ]
    sections["Environment"] = [page.facts(_flat(environment)), page.details("Settings", page.pre(to_toml(config)))]
    method = summary["method"] if summary else method_name(config)
    return page.page(f"{config.output.name}: {method}, seed {config.seed}", lead, sections)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names with dots between."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _markdown(config: Config, summary: dict[str, Any], plots: Sequence[str]) -> str:
    example = summary["example"]
    rows = _result_rows(summary)
    phases = [(phase, PHASES[phase], f"{seconds:.1f}") for phase, seconds in summary["seconds_by_phase"].items()]
    lines = [
        f"# {config.output.name}: {summary['method']}, seed {summary['seed']}",
        "",
        f"Model `{config.model.path}`, training data `{config.data.train}`, {summary['eval_rows']} held-out rows of "
        f"`{config.data.eval}`. {summary['completion_tokens']:,} tokens sampled in RL, "
        f"{summary['seconds_total']:.0f} s in all.",
        "",
        "| | before RL | final |",
        "| --- | --- | --- |",
        *(f"| {name} | {before} | {after} |" for name, before, after in rows),
        "",
        "## One question, before and after",
        "",
        f"{example['question'].strip()} (target {example['target']})",
        "",
        "Before RL:",
        "",
        *(f"> {line}" for line in example["before"].strip().splitlines()),
        "",
        "Final:",
        "",
        *(f"> {line}" for line in example["after"].strip().splitlines()),
        "",
        "## Seconds per phase",
        "",
        "| phase | what | seconds |",
        "| --- | --- | --- |",
        *(f"| {phase} | {what} | {seconds} |" for phase, what, seconds in phases),
        "",
        "## Learning curves",
        "",
        *(f"![{name.removesuffix('.png')}](plots/{name})" for name in plots),
        "",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in summary["versions"].items()),
    ]
    return "\n".join(lines) + "\n"
