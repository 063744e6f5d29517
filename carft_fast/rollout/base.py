"""What the trainer knows of a sampler. It never asks which engine it has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from carft_fast.config import RolloutConfig
from carft_fast.core import EngineError, InputError, derive_seed
from carft_fast.models import CarftModel


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 are off.

    What is sampled is a function of weights, prompt, `seed`, the prompt's index and that of its sample, up to rounding.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    samples_per_prompt: int = 1
    seed: int = 0
    first_prompt: int = 0
    """Index in the whole batch of the first of these prompts: seeds count from there."""

    @classmethod
    def of(cls, config: RolloutConfig, seed: int) -> "SamplingParams":
        """What a run's rollouts are sampled with."""
        return cls(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            samples_per_prompt=config.samples_per_prompt,
            seed=seed,
        )


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion. `completion_ids` ends with EOS when `finish_reason` is "stop".

    `sampled_logprobs` are of the distribution actually sampled from: temperature, top-p and top-k applied. For greedy
    completions they are the model's own, at temperature 1. `weight_version` is that of the weights that sampled it.
    """

    completion_ids: list[int]
    sampled_logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    weight_version: int


@runtime_checkable
class RolloutEngine(Protocol):
    @property
    def version(self) -> int:
        """Of the weights it samples with now."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Rollout]:
        """`samples_per_prompt` completions of each prompt, in the order of the prompts, a prompt's side by side.

        `on_progress` is called often with the number of completions just finished, 0 included, so that it can stop a
        long generation: what it raises propagates.
        """
        ...

    def sync(self, model: CarftModel) -> int:
        """Take over the model's weights; returns their version, one more than before.

        After a sync that raised, the engine holds no usable weights: `generate` refuses until one succeeds.
        """
        ...

    def close(self) -> None:
        """Give processes, memory and files back; may be called twice."""
        ...


def request_seed(sampling: SamplingParams, prompt: int) -> int:
    """Seed of the first completion of a call's prompt, the following ones count up: whatever the batch or server."""
    return derive_seed(sampling.seed, "request", sampling.first_prompt + prompt) % 2**62


def check_request(
    prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, context: int, weights_whole: bool
) -> None:
    """Raises EngineError after a sync that failed, InputError where prompt and completion exceed `context` tokens."""
    if not weights_whole:
        raise EngineError("the last weight sync did not finish: sync again before sampling")
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= context - sampling.max_new_tokens:
            raise InputError(
                f"prompt {index} has {len(prompt)} tokens; with max_new_tokens = {sampling.max_new_tokens} the "
                f"engine's context of {context} tokens (data.max_length) allows 1 to "
                f"{context - sampling.max_new_tokens}"
            )
