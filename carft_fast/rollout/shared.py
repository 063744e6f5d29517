"""Sampling for several processes: each samples its share of the prompts, or the main one drives the servers for all.

Either way every process gets all completions. Sampling a share (`generate_share`) and exchanging the shares (`gather`)
are two calls, so that a share can be sampled ahead in a thread while the processes work together.
"""

import dataclasses
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from carft_fast.core import each_rank, is_main, on_main, own_share
from carft_fast.models import CarftModel, WeightUpdate
from carft_fast.rollout.base import Progress, Prompts, Rollout, RolloutEngine, SamplingParams

if TYPE_CHECKING:
    from carft_fast.rollout.vllm.servers import VLLMServerEngine


class SharedEngine(ABC):
    @abstractmethod
    def generate_share(
        self, prompts: Prompts, sampling: SamplingParams, *, on_progress: Progress | None = None
    ) -> list[Rollout]:
        """What this process samples of these prompts. Needs no other process where each has all weights."""

    @abstractmethod
    def gather(self, sample: Callable[[], list[Rollout]]) -> list[Rollout]:
        """Every process's result of `sample`, in the order of the prompts, on every process.

        A failure on one process is raised on all, unless the others are inside a forward that waits for it.
        """

    def generate(
        self, prompts: Prompts, sampling: SamplingParams, *, on_progress: Progress | None = None
    ) -> list[Rollout]:
        return self.gather(lambda: self.generate_share(prompts, sampling, on_progress=on_progress))


class SpreadEngine(SharedEngine):
    """An engine in every process ("hf", "vllm"), each with its share of the prompts."""

    def __init__(self, engine: RolloutEngine, sample_together: Callable[[], bool] = lambda: False) -> None:
        """`sample_together`: whether the processes need each other while they sample."""
        self._engine, self._sample_together = engine, sample_together

    @property
    def version(self) -> int:
        return self._engine.version

    def generate_share(
        self, prompts: Prompts, sampling: SamplingParams, *, on_progress: Progress | None = None
    ) -> list[Rollout]:
        share = own_share(len(prompts))
        sampling = dataclasses.replace(sampling, first_prompt=share.start)
        return self._engine.generate(prompts[share], sampling, on_progress=on_progress)

    def gather(self, sample: Callable[[], list[Rollout]]) -> list[Rollout]:
        if self._sample_together():  # a failure is not exchanged: the others wait inside the model, not for news
            sampled = sample()
            shares = each_rank(lambda: sampled)
        else:
            shares = each_rank(sample)
        return [rollout for share in shares for rollout in share]

    def sync(self, model: CarftModel) -> int:
        return self._engine.sync(model)

    def close(self) -> None:
        self._engine.close()


class LeaderEngine(SharedEngine):
    """vLLM servers, which the main process drives; the others take part where weights are brought together."""

    def __init__(self, start: "Callable[[], VLLMServerEngine]", dtype: torch.dtype, *, unmerged: bool) -> None:
        """`start` is called on the main process. `unmerged`: LoRA is sent beside the weights."""
        self._dtype, self._unmerged = dtype, unmerged
        self._model: Callable[[], CarftModel | None] = lambda: None
        self._engine: VLLMServerEngine | None = None
        on_main(lambda: self._start(start))
        self.version = -1

    def _start(self, start: "Callable[[], VLLMServerEngine]") -> None:
        self._engine = start()

    def generate_share(
        self, prompts: Prompts, sampling: SamplingParams, *, on_progress: Progress | None = None
    ) -> list[Rollout]:
        return [] if self._engine is None else self._engine.generate(prompts, sampling, on_progress=on_progress)

    def gather(self, sample: Callable[[], list[Rollout]]) -> list[Rollout]:
        return on_main(sample)

    def sync(self, model: CarftModel) -> int:
        update = None
        if model.divided:  # servers may ask for weights more than once, when the other processes have gone on
            frozen = self._model() is not model
            update = WeightUpdate.of(model.lm, self._dtype, unmerged=self._unmerged, frozen=frozen)
            update = update.held(model.device, keep=is_main())
        engine = self._engine
        self.version = on_main(lambda: 0 if engine is None else engine.sync(model, update))
        self._model = weakref.ref(model)
        return self.version

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
