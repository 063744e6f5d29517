"""The interface between trainer and sampling engine; the trainer does not depend on which engine it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from carft_fast.config import RolloutConfig
from carft_fast.core import EngineError, InputError, derive_seed
from carft_fast.models import CarftModel

Prompts = Sequence[Sequence[int]]
"""Token ids of each prompt."""
Progress = Callable[[int], None]
"""Called often with the number of completions that have just finished, 0 included. What it raises ends sampling."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 are off.

    A completion is a function of weights, prompt, `seed`, the prompt's index and the sample's index, up to rounding.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    samples_per_prompt: int = 1
    seed: int = 0
    first_prompt: int = 0
    """Index of the first of these prompts in the whole batch; a prompt's seed depends on its index there."""
    drafts: Sequence[Sequence[Sequence[int]]] = ()
    """Guesses of the completions of each prompt of the whole batch, the likeliest first; empty: none. An engine may use
    them to need fewer forwards. They change nothing of what is sampled."""

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

    `sampled_logprobs` are of the distribution sampled from: temperature, top-p and top-k applied. For greedy
    completions they are the model's, at temperature 1. `weight_version` is that of the weights that sampled it.
    """

    completion_ids: list[int]
    sampled_logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    weight_version: int
    drafted: int = 0
    """Tokens that forwards checked as guesses (see `SamplingParams.drafts`)."""
    accepted: int = 0
    """Those of them that were sampled: the completion took that many forwards fewer than it has tokens."""


@runtime_checkable
class RolloutEngine(Protocol):
    """What a sampling engine has to provide; docs/python.md has an example."""

    @property
    def version(self) -> int:
        """Version of the weights it samples with now."""
        ...

    def generate(
        self, prompts: Prompts, sampling: SamplingParams, *, on_progress: Progress | None = None
    ) -> list[Rollout]:
        """`samples_per_prompt` completions of each prompt, in the order of the prompts, a prompt's one after the other.

        What `on_progress` raises propagates: so a long generation can be stopped.
        """
        ...

    def sync(self, model: CarftModel) -> int:
        """Take over the model's weights; returns their version, one more than before.

        After a sync that raised, the engine holds no usable weights: `generate` refuses until one succeeds.
        """
        ...

    def close(self) -> None:
        """Release processes, memory and files; may be called twice."""
        ...


def request_seed(sampling: SamplingParams, prompt: int) -> int:
    """Seed of the first completion of a call's prompt; the others count up from it, on any server, in any batch."""
    return derive_seed(sampling.seed, "request", sampling.first_prompt + prompt) % 2**62


def check_request(prompts: Prompts, sampling: SamplingParams, *, context: int, weights_whole: bool) -> None:
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
