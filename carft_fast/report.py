"""report.md and the learning curves of a run, from its metrics records."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from carft_fast.config import Config
from carft_fast.files import writing
from carft_fast.metrics import METRICS, PHASES

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
    """Write plots/*.png and report.md."""
    plots = folder / "plots"
    with writing(folder):
        plots.mkdir(exist_ok=True)
        written = [*_draw_curves(plots, records), *_draw_seconds(plots, records)]
        (folder / "report.md").write_text(_markdown(config, summary, written), encoding="utf-8")


def _draw_curves(folder: Path, records: Sequence[dict[str, Any]]) -> list[str]:
    from matplotlib.figure import Figure

    written = []
    for name, title in CURVES.items():
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        stages = [stage for stage in ("sft", "rl") if any(name in r and r["stage"] == stage for r in records)]
        if not stages:
            continue
        for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
            for kind, style in (("train", {"linewidth": 1.2}), ("eval", {"marker": "o", "linewidth": 1.2})):
                points = [
                    (r["step"], r[name]) for r in records if (r["stage"], r["kind"]) == (stage, kind) and name in r
                ]
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        label="held-out" if kind == "eval" else "training",
                        **style,
                    )
            if name == "accuracy":
                sampled = [
                    (r["step"], r["train_accuracy"]) for r in records if r["stage"] == stage and "train_accuracy" in r
                ]
                if sampled:
                    axes.plot(*zip(*sampled, strict=True), label="rollouts", alpha=0.5, linewidth=1.2)
                axes.set_ylim(0, 1)
                axes.legend(frameon=False, fontsize=8)
            tidy(axes, f"{stage.upper()} step")
        figure.suptitle(textwrap.fill(f"{title}: {METRICS[name]}", 90), fontsize=9)
        figure.savefig(folder / f"{name}.png", dpi=110)
        written.append(f"{name}.png")
    return written


def tidy(axes: Any, x_label: str) -> None:
    """The look of every curve."""
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_seconds(folder: Path, records: Sequence[dict[str, Any]]) -> list[str]:
    from matplotlib.figure import Figure

    steps = [r for r in records if r["stage"] == "rl" and r["kind"] == "train"]
    if not steps:
        return []
    phases = [
        phase for phase in PHASES if any(phase in r["seconds"] for r in steps) and phase not in ("load", "checkpoint")
    ]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.stackplot(
        [r["step"] for r in steps],
        [[r["seconds"].get(phase, 0.0) for r in steps] for phase in phases],
        labels=phases,
    )
    axes.set_xlabel("RL step")
    axes.set_ylabel("seconds per step")
    axes.set_title("seconds per phase", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "seconds_per_phase.png", dpi=110)
    return ["seconds_per_phase.png"]


def _markdown(config: Config, summary: dict[str, Any], plots: Sequence[str]) -> str:
    low, high = summary["accuracy_ci95"]
    sft_low, sft_high = summary["sft_accuracy_ci95"]
    example = summary["example"]
    rows = [
        ("greedy accuracy", f"{summary['sft_accuracy']:.1%}", f"{summary['final_accuracy']:.1%}"),
        ("95% interval (Wilson)", f"{sft_low:.1%} to {sft_high:.1%}", f"{low:.1%} to {high:.1%}"),
        (
            "answers with more than one equation",
            *(f"{summary['step_by_step'][k]:.1%}" for k in ("sft", "final")),
        ),
        ("tokens per answer", *(f"{summary['completion_length'][k]:.1f}" for k in ("sft", "final"))),
    ]
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
