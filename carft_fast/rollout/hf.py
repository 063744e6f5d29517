"""Rollouts with transformers' `generate`, in this process and on the trainer's own weights."""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from carft_fast.core import EngineError, chunks, gather_rows, world_size
from carft_fast.models import CarftModel
from carft_fast.rollout.base import Rollout, SamplingParams, request_seed


def inverse_cdf(logprob_BV: Tensor, uniform_B1: Tensor) -> Tensor:
    """int64 [B, 1]: where each row's cumulative distribution passes its number in [0, 1) (float64).

    Summed in whole numbers of 2^-50: exact in any order, so a token of probability 0 is no step and is never picked.
    """
    weight_BV = (logprob_BV.exp() * 2.0**50).long()
    cumulative_BV = weight_BV.cumsum(-1)
    aim_B1 = (uniform_B1 * cumulative_BV[:, -1:]).long()
    # NaN weights would pass the end; `_rollout` finds them in the log-probs
    return torch.searchsorted(cumulative_BV, aim_B1, right=True).clamp_(max=logprob_BV.shape[1] - 1)


class _TokenPicker(LogitsProcessor):
    """Last in the chain of greedy decoding: leaves one token of each row a finite score, and keeps its log-prob.

    `uniform_BL` holds each row's own random numbers, one for a token, so what a row samples does not depend on the rows
    beside it; None leaves the choice to greedy decoding.
    """

    def __init__(self, uniform_BL: Tensor | None) -> None:
        self._uniform_BL = uniform_BL
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprob_BV = scores.float().log_softmax(-1)
        if self._uniform_BL is None:
            self.logprobs.append(logprob_BV.amax(-1))
            return scores
        step = len(self.logprobs)
        token_B1 = inverse_cdf(logprob_BV, self._uniform_BL[:, step : step + 1])
        self.logprobs.append(logprob_BV.gather(1, token_B1)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)


class _ProgressReporter(StoppingCriteria):
    """Tells after every token how many rows have just ended; stops nothing, but what the callback raises propagates."""

    def __init__(self, eos_id: int, on_progress: Callable[[int], None]) -> None:
        self._eos_id, self._on_progress = eos_id, on_progress
        self._ended_B: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        before_B = torch.zeros_like(input_ids[:, -1], dtype=torch.bool) if self._ended_B is None else self._ended_B
        self._ended_B = before_B | (input_ids[:, -1] == self._eos_id)
        self._on_progress(int((self._ended_B & ~before_B).sum()))
        return torch.zeros_like(before_B)

    def finish(self, rows: int) -> None:
        """Count the rows that ended at the length limit."""
        self._on_progress(rows if self._ended_B is None else int((~self._ended_B).sum()))


class _Job(NamedTuple):
    """One completion to make."""

    prompt: Sequence[int]
    seed: int

    def uniform(self, tokens: int) -> Tensor:
        """Its random numbers in [0, 1), float64."""
        return torch.rand(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed))


class HFEngine:
    """Engine "hf". `sync` copies nothing: the sampler reads the trainer's weights.

    With weights that are sharded over processes all of them have to call `generate` together, each with prompts of its
    own, also with none.
    """

    def __init__(self, model: CarftModel, tokenizer: Any, *, batch_size: int) -> None:
        self._weak_model = weakref.ref(model)  # a stage that is over shall not stay in memory
        self._eos_id: int = tokenizer.eos_token_id
        self._pad_id: int = tokenizer.pad_token_id
        self._batch_size = batch_size
        self.version = 0

    @property
    def _model(self) -> CarftModel:
        model = self._weak_model()
        assert model is not None, "the model whose weights are sampled from is gone"
        return model

    def sync(self, model: CarftModel) -> int:
        self._weak_model = weakref.ref(model)
        self.version += 1
        return self.version

    def close(self) -> None:
        pass

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Rollout]:
        jobs = [
            _Job(prompt, request_seed(sampling, index) + sample)
            for index, prompt in enumerate(prompts)
            for sample in range(sampling.samples_per_prompt)
        ]
        by_length = sorted(range(len(jobs)), key=lambda job: len(jobs[job].prompt))  # little padding within a batch
        batches = chunks(by_length, self._batch_size)
        together = self.forwards_together()
        idle = 0
        if together:
            own = torch.tensor([len(batches)], device=self._model.device)
            idle = int(gather_rows(own, "none")[0].max()) - len(batches)
        results: dict[int, Rollout] = {}

        def sample(model: CarftModel) -> None:
            with model.padded():
                for rows in batches:
                    reporter = _ProgressReporter(self._eos_id, on_progress or (lambda _: None))
                    rollouts = self._generate_batch([jobs[row] for row in rows], sampling, reporter, together)
                    results.update(zip(rows, rollouts, strict=True))
                    reporter.finish(len(rows))
                for _ in range(idle):  # takes part in the other processes' forwards
                    one = replace(sampling, max_new_tokens=1)
                    reporter = _ProgressReporter(self._eos_id, lambda _: None)
                    self._generate_batch([_Job([self._eos_id], 0)], one, reporter, together)

        self._model(sample)
        return [results[job] for job in range(len(jobs))]

    def forwards_together(self) -> bool:
        """Whether the weights are sharded over processes (FSDP2, ZeRO-3), which makes every forward a collective."""
        return world_size() > 1 and any(
            hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in self._model.lm.parameters()
        )

    def _generate_batch(
        self, jobs: Sequence[_Job], sampling: SamplingParams, reporter: _ProgressReporter, together: bool
    ) -> list[Rollout]:
        device, lm = self._model.device, cast(Any, self._model.lm)  # generate() is typed as a Tensor
        prompts = [job.prompt for job in jobs]
        longest = max(map(len, prompts))
        ids_BL = torch.tensor([[self._pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
        mask_BL = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        uniform_BL = None
        processors = LogitsProcessorList()
        if sampling.temperature > 0:
            # On the CPU whatever the device: the same numbers everywhere.
            uniform_BL = torch.stack([job.uniform(sampling.max_new_tokens) for job in jobs]).to(device)
            processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                processors.append(TopPLogitsWarper(sampling.top_p))
        picker = _TokenPicker(uniform_BL)
        processors.append(picker)
        with self._model.autocast():
            output_BL: Tensor = lm.generate(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([reporter]),
                generation_config=self._generation_config(sampling.max_new_tokens),
                synced_gpus=together,
            )
        completion_BL = output_BL[:, longest:]
        logprob_BL = torch.stack(picker.logprobs, 1)
        return [
            self._rollout(ids, logprobs)
            for ids, logprobs in zip(completion_BL.tolist(), logprob_BL.tolist(), strict=True)
        ]

    def _rollout(self, ids: list[int], logprobs: list[float]) -> Rollout:
        # Ends at the first EOS, by position: what follows is padding, whatever id padding has.
        length = ids.index(self._eos_id) + 1 if self._eos_id in ids else len(ids)
        stopped = ids[length - 1] == self._eos_id
        if not all(map(math.isfinite, logprobs[:length])):
            raise EngineError("sampled log-probs are not finite: the weights hold NaN or infinity")
        return Rollout(ids[:length], logprobs[:length], "stop" if stopped else "length", self.version)

    def _generation_config(self, max_new_tokens: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,  # `_TokenPicker` leaves one token
            eos_token_id=self._eos_id,
            pad_token_id=self._pad_id,
            use_cache=True,
        )
