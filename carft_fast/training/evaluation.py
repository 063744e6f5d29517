"""Evaluation, graded by the reward's own rule: greedy accuracy, and maj@k and pass@k of sampled completions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from carft_fast.config import Config
from carft_fast.core import derive_seed
from carft_fast.data import EncodedExample, PromptFormat, is_step_by_step
from carft_fast.rewards import THINK, Answer, Grade, Grader, same_answer
from carft_fast.rollout import Rollout, RolloutEngine, SamplingParams

BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class EvalResult:
    metrics: dict[str, Any]
    samples: list[dict[str, Any]]

    @property
    def accuracy(self) -> float:
        return float(self.metrics["accuracy"])

    def describe(self) -> str:
        low, high = self.metrics["accuracy_ci95"]
        lines = [
            f"accuracy {self.accuracy:.1%} (95% CI {low:.1%} to {high:.1%}, {self.metrics['rows']} rows), "
            f"{self.metrics['completion_length']:.1f} tokens, {self.metrics['truncated']:.1%} truncated"
        ]
        for name in (name for name in self.metrics if "@" in name and not name.endswith("_ci95")):
            low, high = self.metrics[f"{name}_ci95"]
            lines.append(f"{name} {self.metrics[name]:.1%} (95% CI {low:.1%} to {high:.1%})")
        return "\n".join(lines)


def wilson_interval(correct: float, rows: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a proportion; sensible at 0 and at `rows`, where the normal one is not. Source: Wilson 1927."""
    if rows == 0:
        return 0.0, 1.0
    share = correct / rows
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_interval(gained: int, lost: int, correct_before: int, rows: int) -> tuple[float, float]:
    """95% interval of the accuracy after minus the accuracy before, of the same `rows`.

    `gained` rows were wrong before and are right after, `lost` the other way. Wilson's intervals of both accuracies,
    put together with their correlation. Source: Newcombe 1998 (Statistics in Medicine 17, 2635), method 10.
    """
    correct_after = correct_before + gained - lost
    both = correct_before - lost
    neither = rows - both - gained - lost
    (low_after, high_after), (low_before, high_before) = (
        wilson_interval(correct, rows) for correct in (correct_after, correct_before)
    )
    after, before = correct_after / rows, correct_before / rows
    margins = correct_after * (rows - correct_after) * correct_before * (rows - correct_before)
    product = float(both * neither - gained * lost)
    if product > 0:
        product = max(0.0, product - rows / 2)
    correlation = product / math.sqrt(margins) if margins else 0.0

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    below = distance(after - low_after, high_before - before)
    above = distance(high_after - after, before - low_before)
    return after - before - below, after - before + above


def bootstrap_interval(values: Sequence[float], seed: int) -> tuple[float, float]:
    """95% percentile bootstrap over rows of the mean of values in [0, 1].

    Where all rows have the same value a bootstrap would claim certainty: there it is Wilson's interval.
    """
    n = len(values)
    if min(values) == max(values):
        return wilson_interval(sum(values), n)
    generator = torch.Generator().manual_seed(seed)
    values_N = torch.tensor(values, dtype=torch.float64)
    means = [values_N[torch.randint(n, (n,), generator=generator)].mean() for _ in range(BOOTSTRAP_DRAWS)]
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is correct, 1 - C(n - c, k) / C(n, k).

    Source: Chen et al. 2021 (arXiv 2107.03374), eq. 1.
    """
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(
    answers: Sequence[Answer | None],
    tolerance: float,
    same: Callable[[Answer | None, Answer | None, float], bool] = same_answer,
) -> int | None:
    """Index of the first sample that gives the answer most samples give; None where no answer could be read.

    What is the `same` as an answer's first sample, numbers within `tolerance`, is that answer. Of two as frequent it is
    the one that reached their number first. Source: self-consistency, Wang et al. 2023 (arXiv 2203.11171).
    """
    votes: dict[int, int] = {}
    best = None
    for index, answer in enumerate(answers):
        if answer is None:
            continue
        first = next((i for i in votes if same(answers[i], answer, tolerance)), index)
        votes[first] = votes.get(first, 0) + 1
        if best is None or votes[first] > votes[best]:
            best = first
    return best


def evaluate(
    engine: RolloutEngine,
    rows: Sequence[EncodedExample],
    prompt_format: PromptFormat,
    config: Config,
    grader: Grader,
    on_progress: Callable[[int], None] | None = None,
) -> EvalResult:
    """Answer every row greedily, up to eval.max_new_tokens."""
    sampling = SamplingParams(max_new_tokens=config.eval_max_new_tokens, temperature=0)
    rollouts = engine.generate([row.prompt_ids for row in rows], sampling, on_progress=on_progress)
    answers, grades = _graded(rollouts, rows, prompt_format, grader)
    samples = [
        {
            "item_id": row.example.item_id,
            "question": row.example.question,
            "prompt": row.prompt,
            "target": row.example.answer,
            **answer,
        }
        for row, answer in zip(rows, answers, strict=True)
    ]
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


def add_samples(
    greedy: EvalResult,
    engine: RolloutEngine,
    rows: Sequence[EncodedExample],
    prompt_format: PromptFormat,
    config: Config,
    grader: Grader,
    on_progress: Callable[[int], None] | None = None,
) -> EvalResult:
    """The greedy result of the same rows, with eval.samples sampled completions each, their pass@k and, but with a
    `reward.fn`, their maj@k."""
    n = config.eval.samples
    sampling = SamplingParams(
        max_new_tokens=config.eval_max_new_tokens,
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        samples_per_prompt=n,
        seed=derive_seed(config.seed, "eval"),
    )
    rollouts = engine.generate([row.prompt_ids for row in rows], sampling, on_progress=on_progress)
    answers, _ = _graded(rollouts, [row for row in rows for _ in range(n)], prompt_format, grader)
    per_row = [answers[i : i + n] for i in range(0, len(answers), n)]
    metrics: dict[str, Any] = {"samples_per_row": n}
    for k in config.eval.k or sorted({1, n}):
        values = [pass_at_k(n, sum(answer["correct"] for answer in row), k) for row in per_row]
        metrics[f"pass@{k}"] = sum(values) / len(rows)
        metrics[f"pass@{k}_ci95"] = list(bootstrap_interval(values, derive_seed(config.seed, "bootstrap", k)))
    voted: list[dict[str, Any]] = [{} for _ in rows]
    voting = (config.eval.maj_k or [n]) if config.reward.reads_answers else []
    for k in voting:  # a score says nothing of which answers are one
        for row, verdicts in zip(per_row, voted, strict=True):
            winner = majority([answer["extracted"] for answer in row[:k]], config.reward.tolerance, grader.same)
            chosen = {"extracted": None, "correct": False} if winner is None else row[winner]
            verdicts[f"maj@{k}"] = {name: chosen[name] for name in ("extracted", "correct")}
        correct = sum(verdicts[f"maj@{k}"]["correct"] for verdicts in voted)
        metrics[f"maj@{k}"] = correct / len(rows)
        metrics[f"maj@{k}_ci95"] = list(wilson_interval(correct, len(rows)))
    samples = [
        {**sample, **verdicts, "samples": row}
        for sample, verdicts, row in zip(greedy.samples, voted, per_row, strict=True)
    ]
    return EvalResult(greedy.metrics | metrics, samples)


def grade_rollouts(
    rollouts: Sequence[Rollout], rows: Sequence[EncodedExample], prompt_format: PromptFormat, grader: Grader
) -> tuple[list[str], list[Grade]]:
    """The text and grade of each completion, after its prefix where it has one."""
    texts = [prompt_format.decode(r.prefix_ids + x.completion_ids) for r, x in zip(rows, rollouts, strict=True)]
    examples, read = [row.example for row in rows], texts
    if grader.ignores_think:  # a template may open it in the prompt
        opened = [prompt_format.decode(row.prompt_ids[-8:]).rstrip().endswith(THINK) for row in rows]
        read = [THINK * begins + text for begins, text in zip(opened, texts, strict=True)]
    return texts, grader.grade(read, examples)


def _graded(
    rollouts: Sequence[Rollout], rows: Sequence[EncodedExample], prompt_format: PromptFormat, grader: Grader
) -> tuple[list[dict[str, Any]], list[Grade]]:
    """What each completion says and whether it is right, as samples store it."""
    texts, grades = grade_rollouts(rollouts, rows, prompt_format, grader)
    answers = [
        {
            "completion": text,
            "extracted": result.extracted,
            "correct": result.correct,
            "tokens": len(rollout.completion_ids),
            "truncated": rollout.finish_reason == "length",
            **({} if result.parts is None else {"rewards": dict(result.parts)}),
        }
        for text, result, rollout in zip(texts, grades, rollouts, strict=True)
    ]
    return answers, grades
