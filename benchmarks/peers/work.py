"""What every side of a comparison is given, what it says it did, and whether that was the same work."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

GRADIENT_BOUND = 1e-3
"""Largest relative difference of two sides' gradients of one batch: float32 sums in another order, and no more."""
UPDATE_BOUND = 1e-2
"""Largest relative difference of what all optimizer steps changed in the weights. Adam divides each gradient by its
own size, so that entries next to zero move by the sign of their rounding."""


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """One case. Every step sees the same prompts; prompt p has `samples_per_prompt` completions side by side."""

    model: str
    """Folder of a transformers model with its tokenizer, loaded in float32."""
    config: str
    """carft_fast's config file, and its options."""
    options: list[str]
    method: str
    """Of carft_fast: the recipe every side follows."""
    prompts: list[list[int]]
    texts: list[str]
    answers: list[str]
    samples_per_prompt: int
    max_new_tokens: int
    completions: list[list[int]] | None
    """The same for every side, prompt by prompt; None: each side samples, exactly max_new_tokens each."""
    steps: int
    """The first is compared and not timed."""
    lr: float
    updates_per_step: int = 1
    """Optimizer steps on each batch."""
    annotated: list[list[int]] | None = None
    """CARFT's annotated completion of every prompt."""

    @property
    def samples(self) -> int:
        return len(self.prompts) * self.samples_per_prompt

    @property
    def rewards(self) -> list[float]:
        """The first sample of each prompt is right: every sample has an advantage, and no side may leave one out."""
        return [float(i % self.samples_per_prompt == 0) for i in range(self.samples)]

    @property
    def completion_tokens(self) -> int:
        """What one step trains on."""
        if self.completions is None:
            return self.samples * self.max_new_tokens
        return sum(map(len, self.completions))

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, file: Path) -> "Work":
        return cls(**json.loads(file.read_text()))


@dataclasses.dataclass(slots=True)
class Done:
    """What one step did, counted from the tensors it computed with."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Processor time of the side's process: with one thread what the step takes on a quiet machine."""
    samples: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    positions: int = 0
    """Rows times columns of what went through the model for the gradient, padding included."""
    optimizer_steps: int = 0
    loss: float = 0.0
    peak_mb: float = 0.0
    """Resident memory at its highest in the step above what was there when it began."""
    annotated_tokens: int = 0
    """Of the annotated completions that went through the model."""


class UnequalWorkError(Exception):
    """Two sides did not do the same: no ratio of theirs is reported."""


def check_counts(work: Work, done: Mapping[str, Sequence[Done]]) -> None:
    """Every step of every side: the samples, tokens and updates of the case."""
    prompt_tokens = work.samples_per_prompt * sum(map(len, work.prompts))
    wanted = {
        "samples": work.samples,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": work.completion_tokens,
        "annotated_tokens": work.samples_per_prompt * sum(map(len, work.annotated or [])),
        "optimizer_steps": work.updates_per_step,
    }
    for side, steps in done.items():
        if len(steps) != work.steps:
            raise UnequalWorkError(f"{side}: {len(steps)} steps, wanted {work.steps}")
        for index, step in enumerate(steps):
            for name, value in wanted.items():
                if (found := getattr(step, name)) != value:
                    raise UnequalWorkError(f"{side}, step {index}: {name} {found}, wanted {value}")


def check_losses(done: Mapping[str, Sequence[Done]], tolerance: float = 1e-4) -> float:
    """Largest difference of the sides' losses of the first step."""
    losses = {side: steps[0].loss for side, steps in done.items()}
    if not all(map(math.isfinite, losses.values())):
        raise UnequalWorkError(f"losses {losses}: not finite")
    difference = max(losses.values()) - min(losses.values())
    if difference > tolerance * max(1.0, *map(abs, losses.values())):
        raise UnequalWorkError(f"losses {losses}")
    return difference


def relative_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Norm of the difference of all tensors over the norm of `theirs`, in float64."""
    if ours.keys() != theirs.keys():
        raise UnequalWorkError(f"tensors that only one side has: {sorted(ours.keys() ^ theirs.keys())[:5]}")
    squares = torch.zeros(2, dtype=torch.float64)
    for name, tensor in theirs.items():
        other, own = tensor.double(), ours[name].double()
        squares += torch.stack([(own - other).square().sum(), other.square().sum()])
    if not squares[1] > 0:
        raise UnequalWorkError("all tensors are zero: nothing to compare")
    return float((squares[0] / squares[1]).sqrt())


def check_tensors(what: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], bound: float) -> float:
    difference = relative_difference(ours, theirs)
    if not difference <= bound:
        raise UnequalWorkError(f"{what}: relative difference {difference:.2e}, allowed {bound:.0e}")
    return difference
