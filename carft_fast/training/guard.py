"""Collapse guard: when does a run fall apart, told from its own records. Pure; off by default.

Watched are means over the last `window` steps. A collapse is any of: reward or the share of extractable answers far
below its best, entropy or KL beyond a bound, a figure that is no longer finite. What was already answered (records of
kind "guard") starts the watch anew, so a rollback is not followed by another for the same fall.
"""

import math
from collections.abc import Sequence
from typing import Any

from carft_fast.config import GuardConfig

WATCHED = ("reward", "extractable", "entropy", "kl")


def find_collapse(records: Sequence[dict[str, Any]], config: GuardConfig) -> str | None:
    """The cause of a collapse at the newest of a run's RL records, None while there is none."""
    answered = max((i for i, record in enumerate(records) if record["kind"] == "guard"), default=-1)
    steps = [r for r in records[answered + 1 :] if r["kind"] == "train" and r["stage"] == "rl"]
    if not steps:
        return None
    for name in WATCHED:
        if not math.isfinite(steps[-1].get(name, 0.0)):
            return f"{name} is {steps[-1][name]}"
    if len(steps) < config.window:
        return None
    for name, share in (("reward", config.reward_drop), ("extractable", config.extractable_drop)):
        means = _moving_means([step[name] for step in steps], config.window)
        best = max(means)
        if means[-1] < best - share * abs(best):
            return f"{name} fell to {means[-1]:.3f}, mean of {config.window} steps, from {best:.3f} at its best"
    for name, low, high in (
        ("entropy", config.entropy_min, config.entropy_max),
        ("kl", None, config.kl_max),
    ):
        recent = [step[name] for step in steps[-config.window :] if name in step]
        mean = sum(recent) / len(recent) if recent else None
        if mean is not None and low is not None and mean < low:
            return f"{name} fell to {mean:.3g} nats, mean of {config.window} steps, below {low:g}"
        if mean is not None and high is not None and mean > high:
            return f"{name} rose to {mean:.3g} nats, mean of {config.window} steps, above {high:g}"
    return None


def _moving_means(values: Sequence[float], window: int) -> list[float]:
    return [sum(values[i - window : i]) / window for i in range(window, len(values) + 1)]


def rollbacks(records: Sequence[dict[str, Any]]) -> int:
    """How often a run has gone back; its learning rate is lowered as often."""
    return sum(record["kind"] == "guard" and record["action"] == "rollback" for record in records)


def stopped_at(records: Sequence[dict[str, Any]]) -> int | None:
    """The step at which the guard ended the run's RL stage."""
    return next((r["step"] for r in records if r["kind"] == "guard" and r["action"] == "stop"), None)
