"""An engine that somebody else wrote: what it returns is checked before anything is trained on."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from carft_fast.core import EngineError
from carft_fast.models import CarftModel
from carft_fast.rollout.base import Progress, Prompts, Rollout, RolloutEngine, SamplingParams


class CheckedEngine:
    """The engine it wraps. Raises EngineError, which names the rollout and the value, for what breaks the contract of
    `RolloutEngine`; it cannot see whether the weights were taken over (`rollout.probe_every` does)."""

    def __init__(self, engine: RolloutEngine, vocabulary: int) -> None:
        """`vocabulary`: token ids are below it."""
        self._engine, self._vocabulary = engine, vocabulary
        self._name = type(engine).__qualname__

    @property
    def version(self) -> int:
        return self._engine.version

    def sync(self, model: CarftModel) -> int:
        before, returned = self._engine.version, self._engine.sync(model)
        if returned != self._engine.version or not isinstance(returned, Integral) or returned <= before:
            raise EngineError(
                f"{self._name}.sync returned {returned!r}, its version was {before!r} and is {self._engine.version!r}: "
                "expected a larger whole number, the same for both"
            )
        return int(returned)

    def generate(
        self, prompts: Prompts, sampling: SamplingParams, *, on_progress: Progress | None = None
    ) -> list[Rollout]:
        found: Any = self._engine.generate(prompts, sampling, on_progress=on_progress)
        expected = len(prompts) * sampling.samples_per_prompt
        if not isinstance(found, Sequence) or len(found) != expected:
            shown = f"{len(found)} rollouts" if isinstance(found, Sequence) else f"a {type(found).__name__}"
            raise EngineError(
                f"{self._name}.generate returned {shown}: expected a list of {expected}, {sampling.samples_per_prompt} "
                f"for each of {len(prompts)} prompts"
            )
        for number, rollout in enumerate(found):
            if wrong := self._wrong(rollout, sampling.max_new_tokens):
                raise EngineError(f"{self._name}.generate: rollout {number} {wrong}")
        return list(found)

    def close(self) -> None:
        self._engine.close()

    def _wrong(self, rollout: Any, max_new_tokens: int) -> str | None:
        if not isinstance(rollout, Rollout):
            return f"is a {type(rollout).__name__}: expected a Rollout"
        ids, logprobs = rollout.completion_ids, rollout.sampled_logprobs
        if not isinstance(ids, list) or not 1 <= len(ids) <= max_new_tokens:
            size = f"{len(ids)} tokens" if isinstance(ids, list) else f"completion_ids of type {type(ids).__name__}"
            return f"has {size}: expected a list of 1 to {max_new_tokens}"
        for token in ids:
            if not isinstance(token, Integral) or not 0 <= token < self._vocabulary:
                return f"has the token {token!r}: expected whole numbers from 0 to {self._vocabulary - 1}"
        if not isinstance(logprobs, list) or len(logprobs) != len(ids):
            size = str(len(logprobs)) if isinstance(logprobs, list) else type(logprobs).__name__
            return f"has {size} sampled_logprobs for {len(ids)} tokens: expected one each, in a list"
        for logprob in logprobs:
            if not isinstance(logprob, Real) or not math.isfinite(logprob):
                return f"has the log-prob {logprob!r}: expected finite numbers"
        if rollout.finish_reason not in ("stop", "length"):
            return f'has finish_reason {rollout.finish_reason!r}: expected "stop" or "length"'
        if rollout.weight_version != self.version:
            return f"was sampled by weights {rollout.weight_version!r}: the engine has {self.version}"
        return None
