"""Collapse guard: tells from a run's records when training falls apart. Pure; off by default.

It looks at means over the last `window` steps. A collapse is any of: reward or the share of extractable answers far
below its best, entropy or KL beyond a bound, a figure that is no longer finite. Only steps after the last record of
kind "guard" count, so a rollback is not followed by another for the same fall.
"""

import math
from collections.abc import Sequence
from typing import Any

from carft_fast.config import GuardConfig


def find_collapse(records: Sequence[dict[str, Any]], config: GuardConfig) -> str | None:
    """The cause of a collapse at the last RL step; None where there is none."""
    answered = max((i for i, record in enumerate(records) if record["kind"] == "guard"), default=-1)
    steps = [r for r in records[answered + 1 :] if r["kind"] == "train" and r["stage"] == "rl"]
    if not steps:
        return None
    for name in ("reward", "extractable", "entropy", "kl"):
        if not math.isfinite(steps[-1].get(name, 0.0)):
            return f"{name} is {steps[-1][name]}"
    if len(steps) < config.window:
        return None
    for name, share in (("reward", config.reward_drop), ("extractable", config.extractable_drop)):
        values = [step[name] for step in steps]
        means = [sum(values[i - config.window : i]) / config.window for i in range(config.window, len(values) + 1)]
        best = max(means)
        if means[-1] < best - share * abs(best):
            return f"{name} fell to {means[-1]:.3f}, mean of {config.window} steps, from {best:.3f} at its best"
    for name, low, high in (("entropy", config.entropy_min, config.entropy_max), ("kl", None, config.kl_max)):
        recent = [step[name] for step in steps[-config.window :] if name in step]
        if not recent:
            continue
        mean = sum(recent) / len(recent)
        if low is not None and mean < low:
            return f"{name} fell to {mean:.3g} nats, mean of {config.window} steps, below {low:g}"
        if high is not None and mean > high:
            return f"{name} rose to {mean:.3g} nats, mean of {config.window} steps, above {high:g}"
    return None


def rollbacks(records: Sequence[dict[str, Any]]) -> int:
    """How often a run has gone back; its learning rate is lowered as often."""
    return sum(record["kind"] == "guard" and record["action"] == "rollback" for record in records)


def stopped_at(records: Sequence[dict[str, Any]]) -> int | None:
    """The step at which the guard ended the run's RL stage."""
    return next((r["step"] for r in records if r["kind"] == "guard" and r["action"] == "stop"), None)
