"""Sampling for several processes: each samples its share of the prompts, or the main one drives the servers for all.

Either way every process gets all completions. What a process samples by itself (`own`) and what they exchange
(`exchange`) are apart, so that a share can be sampled ahead in a thread while the processes work together.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from carft_fast.core import each_rank, is_main, on_main, own_share
from carft_fast.models import CarftModel, HeldWeights, SamplerWeights
from carft_fast.rollout.base import Rollout, RolloutEngine, SamplingParams

if TYPE_CHECKING:
    from carft_fast.rollout.vllm.servers import VLLMServerEngine


class SharedEngine(ABC):
    """`generate` from what the subclass does alone and together."""

    @abstractmethod
    def own(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Rollout]:
        """What this process samples of these prompts; asks no other process where each has all weights."""

    @abstractmethod
    def exchange(self, own: Callable[[], list[Rollout]]) -> list[Rollout]:
        """All processes' `own` results in the order of the prompts, on all of them; a failure on any, too, where the
        others could hear of it."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Rollout]:
        return self.exchange(lambda: self.own(prompts, sampling, on_progress=on_progress))


class SpreadEngine(SharedEngine):
    """An engine in every process ("hf", "vllm"), each with its share of the prompts."""

    def __init__(self, engine: RolloutEngine, sample_together: Callable[[], bool] = lambda: False) -> None:
        """`sample_together`: whether the processes need each other while they sample."""
        self._engine, self._sample_together = engine, sample_together

    @property
    def version(self) -> int:
        return self._engine.version

    def own(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Rollout]:
        share = own_share(len(prompts))
        sampling = dataclasses.replace(sampling, first_prompt=share.start)
        return self._engine.generate(prompts[share], sampling, on_progress=on_progress)

    def exchange(self, own: Callable[[], list[Rollout]]) -> list[Rollout]:
        if self._sample_together():  # a failure is not exchanged: the others wait inside the model, not for news
            found = own()
            return [rollout for share in each_rank(lambda: found) for rollout in share]
        return [rollout for share in each_rank(own) for rollout in share]

    def sync(self, model: CarftModel) -> int:
        return self._engine.sync(model)

    def close(self) -> None:
        self._engine.close()


class LeaderEngine(SharedEngine):
    """vLLM servers, which the main process drives; the others take part where weights are brought together."""

    def __init__(self, start: "Callable[[], VLLMServerEngine]", dtype: torch.dtype) -> None:
        """`start` is called on the main process."""
        self._dtype = dtype
        self._engine: VLLMServerEngine | None = None
        on_main(lambda: self._start(start))
        self.version = -1

    def _start(self, start: "Callable[[], VLLMServerEngine]") -> None:
        self._engine = start()

    def own(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Rollout]:
        return [] if self._engine is None else self._engine.generate(prompts, sampling, on_progress=on_progress)

    def exchange(self, own: Callable[[], list[Rollout]]) -> list[Rollout]:
        return on_main(own)

    def sync(self, model: CarftModel) -> int:
        held = None
        if model.divided:  # servers may ask for weights more than once, when the other processes have gone on
            held = HeldWeights(SamplerWeights(model.lm, self._dtype), model.device, keep=is_main())
        engine = self._engine
        self.version = on_main(lambda: 0 if engine is None else engine.sync(model, held))
        return self.version

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
