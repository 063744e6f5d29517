"""Where a fast step's time goes: torch.profiler over one step, as a trace and as a flame graph.

    python -m benchmarks.profile_step [--model FOLDER --data SVAMP.json] [--output docs/step_flame.png]

The trace (runs/profile/trace.json) opens in Perfetto. The picture: width is time, a row's children lie under it.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.rows import commit
from benchmarks.step import CASES, Inputs, Prepared, case_config
from carft_fast.core import Console
from carft_fast.rollout import Rollout
from carft_fast.training import prepare

ROLLOUTS = 8
Tree = dict[str, Any]
"""Name -> [microseconds, Tree]."""


def profiled(model: str, data: str) -> tuple[Any, str]:
    """The profiler after one step on annotated CoTs in the place of rollouts; their lengths are what matters here."""
    name = "SmolLM2-135M" if model else "quickstart"
    count = ROLLOUTS if model else 64
    CASES[name].options.extend([f"rl.batch_size={count}", f"rl.mini_batch_size={count}", "rl.ppo_epochs=1"])
    config = case_config(name, model, data)
    run = prepare(config, Path("runs/profile"), Console(), stages=("rl",), write=False)
    rows = run.train_rows[:count]
    rollouts = [Rollout(row.completion_ids, [-1.0] * len(row.completion_ids), "stop", 0) for row in rows]
    decoded = [run.prompt_format.decode(row.completion_ids) for row in rows]
    prepared = Prepared(config, run.config.model.path, Inputs(rows, rollouts), decoded)
    prepared.update()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with record_function("log-probs"):
            prepared.look()
        with record_function("update"):
            prepared.update()
    return profiler, f"{name}, {count} rollouts, one PPO epoch"


def tree_of(events: Any) -> Tree:
    """Time by path of operators; what is below 0.3% of the whole goes to its parent."""
    total = sum(event.cpu_time_total for event in events if event.name in ("log-probs", "update"))
    tree: Tree = {}

    def add(event: Any, into: Tree) -> None:
        name = event.name.removeprefix("autograd::engine::evaluate_function: ")
        cell = into.setdefault(name, [0.0, {}])
        cell[0] += event.cpu_time_total
        for child in event.cpu_children:
            add(child, cell[1])

    for event in events:
        if event.name in ("log-probs", "update"):
            add(event, tree)

    def prune(node: Tree) -> Tree:
        return {name: [t, prune(below)] for name, (t, below) in node.items() if t >= 0.003 * total}

    return prune(tree)


def draw(tree: Tree, title: str, output: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), layout="constrained")
    axes = figure.subplots()
    total = sum(t for t, _ in tree.values())
    colours = {"mm": "#d1603d", "linear_pointwise": "#d1603d", "attention": "#3d7ed1", "carft": "#4a9d5b"}

    def colour(name: str) -> str:
        return next((c for part, c in colours.items() if part in name.lower()), "#cfc7b8")

    def box(node: Tree, left: float, depth: int) -> None:
        for name, (t, below) in sorted(node.items(), key=lambda item: -item[1][0]):
            width = t / total
            axes.barh(-depth, width, left=left, height=0.95, color=colour(name), edgecolor="white", linewidth=0.5)
            if width > 0.02:
                shown = name.removeprefix("aten::")[: int(width * 170)]
                axes.text(left + width / 2, -depth, shown, ha="center", va="center", fontsize=7, clip_on=True)
            box(below, left, depth + 1)
            left += width

    box(tree, 0.0, 0)
    axes.set_xlim(0, 1)
    axes.axis("off")
    axes.set_title(f"{title}; {total / 1e6:.2f} s on {torch.get_num_threads()} CPU thread(s)", fontsize=10)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)


def largest(events: Any, count: int = 8) -> list[tuple[str, float]]:
    """Operators by the time they take themselves, as shares."""
    own: dict[str, float] = defaultdict(float)
    for event in events:
        own[event.name] += event.self_cpu_time_total
    total = sum(own.values())
    return [(name, t / total) for name, t in sorted(own.items(), key=lambda item: -item[1])[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="SmolLM2 folder; the quickstart model when absent")
    parser.add_argument("--data", default="", help="SVAMP training file, for --model")
    parser.add_argument("--output", type=Path, default=Path("docs/step_flame.png"))
    arguments = parser.parse_args()
    profiler, title = profiled(arguments.model, arguments.data)
    trace = Path("runs/profile/trace.json")
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    events = profiler.events()
    draw(tree_of(events), f"{title}, commit {commit()}", arguments.output)
    print(f"{arguments.output}, {trace}")
    for name, share in largest(events):
        print(f"{share:6.1%}  {name}")


if __name__ == "__main__":
    main()
