"""The rollouts of one step after another; with depth 1 the next step's are sampled while the trainer updates."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import replace

from carft_fast.config import RolloutConfig
from carft_fast.models import CarftModel
from carft_fast.rollout.base import Progress, Prompts, Rollout, RolloutEngine, SamplingParams
from carft_fast.rollout.drafts import LastCompletions
from carft_fast.rollout.shared import SharedEngine

Request = Callable[[int], tuple[Prompts, SamplingParams]]
"""Prompts and sampling of a step: a pure function of the step, so that it may be asked early, and again."""


class _Closed(Exception):  # noqa: N818 - an event, not an error
    pass


class RolloutStream(AbstractContextManager["RolloutStream"]):
    """Use as a context manager, which ends sampling ahead; the engine stays open.

    Depth 1, step k: `take(k)` returns what was sampled during step k - 1 and starts step k + 1 with the weights
    the engine has, v. Meanwhile the trainer makes v + 1. `sync` waits for the sampler before it replaces the weights.
    So a rollout is one version old when it is trained on; those of the first step, and of the first one after a
    resume, are current. Between `sync` and the next `take` the engine is idle, as evaluation needs it.

    With `rollout.drafts` a step's requests carry the last completions of their questions, before the drafts that
    `request` gives.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        request: Request,
        steps: int,
        config: RolloutConfig,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`steps`: where sampling ahead ends. `check` is called while sampling ahead; what it raises ends that."""
        self._engine, self._request, self._steps, self._check = engine, request, steps, check
        self._ahead: tuple[int, Future[list[Rollout]]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout") if config.async_depth else None
        self._closing = threading.Event()
        self._last = LastCompletions() if config.drafting else None

    def take(self, step: int, on_progress: Progress) -> tuple[list[Rollout], int]:
        """The step's completions in the order of `RolloutEngine.generate`, and their staleness.

        Staleness: number of weight versions between the oldest of them and the current weights; 0 is on-policy.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == step:
            rollouts = self._gather(ahead[1].result)
            on_progress(len(rollouts))
        else:
            rollouts = self._gather(lambda: self._sample(step, on_progress))
        if self._last is not None:
            self._last.add(self._request(step)[0], rollouts)
        if self._thread and step + 1 < self._steps:
            self._ahead = step + 1, self._thread.submit(self._sample, step + 1, self._while_ahead)
        return rollouts, self._engine.version - min(rollout.weight_version for rollout in rollouts)

    def sync(self, model: CarftModel) -> None:
        """Give the engine the model's weights, once it is idle. `take` raises what went wrong in sampling ahead."""
        if self._ahead is not None:
            wait([self._ahead[1]])
        self._engine.sync(model)

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._thread:
            self._thread.shutdown()

    def _sample(self, step: int, on_progress: Progress) -> list[Rollout]:
        prompts, sampling = self._request(step)
        if self._last is not None:
            given = sampling.drafts or [()] * len(prompts)
            drafts = [[*self._last.of(p), *other] for p, other in zip(prompts, given, strict=True)]
            sampling = replace(sampling, drafts=drafts)
        sample = self._engine.generate_share if isinstance(self._engine, SharedEngine) else self._engine.generate
        return sample(prompts, sampling, on_progress=on_progress)

    def _gather(self, sample: Callable[[], list[Rollout]]) -> list[Rollout]:
        return self._engine.gather(sample) if isinstance(self._engine, SharedEngine) else sample()

    def _while_ahead(self, _: int) -> None:
        if self._closing.is_set():
            raise _Closed
        self._check()
