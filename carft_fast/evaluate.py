"""Greedy evaluation, graded by the reward's own rule."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from carft_fast.config import Config
from carft_fast.grading import Grader
from carft_fast.prompts import EncodedExample, PromptFormat
from carft_fast.rollout import RolloutEngine, SamplingParams
from carft_fast.synthetic import is_step_by_step


@dataclass(frozen=True, slots=True)
class EvalResult:
    metrics: dict[str, Any]
    samples: list[dict[str, Any]]

    @property
    def accuracy(self) -> float:
        return float(self.metrics["accuracy"])

    def describe(self) -> str:
        low, high = self.metrics["accuracy_ci95"]
        return (
            f"accuracy {self.accuracy:.1%} (95% CI {low:.1%} to {high:.1%}, {self.metrics['rows']} rows), "
            f"{self.metrics['completion_length']:.1f} tokens, {self.metrics['truncated']:.1%} truncated"
        )


def wilson_interval(correct: int, rows: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a proportion; sensible at 0 and at `rows`, where the normal one is not. Source: Wilson 1927."""
    if rows == 0:
        return 0.0, 1.0
    share = correct / rows
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(0.0, centre - half), min(1.0, centre + half)


def evaluate(
    engine: RolloutEngine,
    rows: Sequence[EncodedExample],
    prompt_format: PromptFormat,
    config: Config,
    grader: Grader,
    on_progress: Callable[[int], None] | None = None,
) -> EvalResult:
    """Answer every row greedily, up to rollout.max_new_tokens."""
    sampling = SamplingParams(max_new_tokens=config.rollout.max_new_tokens, temperature=0)
    rollouts = engine.generate([row.prompt_ids for row in rows], sampling, on_progress=on_progress)
    samples: list[dict[str, Any]] = []
    completions = [prompt_format.decode(rollout.completion_ids) for rollout in rollouts]
    grades = grader.grade(completions, [row.example for row in rows])
    for row, rollout, text, result in zip(rows, rollouts, completions, grades, strict=True):
        samples.append(
            {
                "item_id": row.example.item_id,
                "question": row.example.question,
                "completion": text,
                "target": row.example.answer,
                "extracted": result.extracted,
                "correct": result.correct,
                "tokens": len(rollout.completion_ids),
                "truncated": rollout.finish_reason == "length",
            }
        )
    n, correct = len(samples), sum(sample["correct"] for sample in samples)
    metrics = {
        "accuracy": correct / n,
        "correct": correct,
        "rows": n,
        "accuracy_ci95": list(wilson_interval(correct, n)),
        "extractable": sum(result.extractable for result in grades) / n,
        "completion_length": sum(sample["tokens"] for sample in samples) / n,
        "truncated": sum(sample["truncated"] for sample in samples) / n,
        "step_by_step": sum(is_step_by_step(sample["completion"]) for sample in samples) / n,
    }
    return EvalResult(metrics, samples)
