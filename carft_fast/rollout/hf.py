"""Rollouts with transformers' `generate`, in this process and on the trainer's own weights."""

import math
import weakref
from collections.abc import Sequence
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

from carft_fast.core import EngineError, chunks, global_max, world_size
from carft_fast.models import CarftModel
from carft_fast.rollout.base import Progress, Prompts, Rollout, SamplingParams, request_seed


def inverse_cdf(logprob_BV: Tensor, uniform_B1: Tensor) -> Tensor:
    """int64 [B, 1]: the token at which each row's cumulative distribution passes its number in [0, 1) (float64).

    Summed in integer multiples of 2^-50, which is exact in any order: a token of probability 0 is never picked.
    """
    weight_BV = (logprob_BV.exp() * 2.0**50).long()
    cumulative_BV = weight_BV.cumsum(-1)
    aim_B1 = (uniform_B1 * cumulative_BV[:, -1:]).long()
    # NaN weights would pass the end; `_rollout` finds them in the log-probs
    return torch.searchsorted(cumulative_BV, aim_B1, right=True).clamp_(max=logprob_BV.shape[1] - 1)


class _TokenPicker(LogitsProcessor):
    """Last in the chain of greedy decoding: leaves one token of each row a finite score, and keeps its log-prob.

    `uniform_BL` holds each row's random numbers, one per token, so a row's sample does not depend on the other rows.
    None leaves the choice to greedy decoding.
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

    def __init__(self, rows: int, prompt_length: int, eos_id: int, on_progress: Progress) -> None:
        self.unfinished = rows
        self._prompt_length, self._eos_id, self._on_progress = prompt_length, eos_id, on_progress

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        ended_B = (input_ids[:, self._prompt_length :] == self._eos_id).any(-1)
        unfinished = len(ended_B) - int(ended_B.sum())
        self._on_progress(self.unfinished - unfinished)
        self.unfinished = unfinished
        return torch.zeros_like(ended_B)


class _Job(NamedTuple):
    """One completion to make."""

    prompt: Sequence[int]
    seed: int

    def uniform(self, tokens: int) -> Tensor:
        """Its random numbers in [0, 1), float64."""
        return torch.rand(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed))


class HFEngine:
    """Engine "hf". `sync` copies nothing: the sampler reads the trainer's weights.

    With weights that are sharded over processes, all processes have to call `generate` together, each with its own
    prompts or with none.
    """

    def __init__(self, model: CarftModel, tokenizer: Any, *, batch_size: int) -> None:
        self._weak_model = weakref.ref(model)  # a finished stage must not stay in memory
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
        self, prompts: Prompts, sampling: SamplingParams, *, on_progress: Progress | None = None
    ) -> list[Rollout]:
        jobs = [
            _Job(prompt, request_seed(sampling, index) + sample)
            for index, prompt in enumerate(prompts)
            for sample in range(sampling.samples_per_prompt)
        ]
        by_length = sorted(range(len(jobs)), key=lambda job: len(jobs[job].prompt))  # little padding within a batch
        batches = chunks(by_length, self._batch_size)
        together = self.forwards_together()
        idle = global_max(len(batches)) - len(batches) if together else 0
        report = on_progress or (lambda _: None)
        results: dict[int, Rollout] = {}

        def sample(model: CarftModel) -> None:
            with model.padded():
                for rows in batches:
                    rollouts = self._generate_batch([jobs[row] for row in rows], sampling, report, together)
                    results.update(zip(rows, rollouts, strict=True))
                for _ in range(idle):  # takes part in the other processes' forwards
                    one_token = replace(sampling, max_new_tokens=1)
                    self._generate_batch([_Job([self._eos_id], 0)], one_token, lambda _: None, together)

        self._model(sample)
        return [results[job] for job in range(len(jobs))]

    def forwards_together(self) -> bool:
        """Whether the weights are sharded over processes (FSDP2, ZeRO-3), which makes every forward a collective."""
        return world_size() > 1 and any(
            hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in self._model.lm.parameters()
        )

    def _generate_batch(
        self, jobs: Sequence[_Job], sampling: SamplingParams, on_progress: Progress, together: bool
    ) -> list[Rollout]:
        device, lm = self._model.device, cast(Any, self._model.lm)  # generate() is typed as a Tensor
        prompts = [job.prompt for job in jobs]
        longest = max(map(len, prompts))
        ids_BL = torch.tensor([[self._pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
        mask_BL = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        uniform_BL = None
        processors = LogitsProcessorList()
        if sampling.temperature > 0:
            # Drawn on the CPU: the same numbers on every device.
            uniform_BL = torch.stack([job.uniform(sampling.max_new_tokens) for job in jobs]).to(device)
            processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                processors.append(TopPLogitsWarper(sampling.top_p))
        picker = _TokenPicker(uniform_BL)
        processors.append(picker)
        reporter = _ProgressReporter(len(jobs), longest, self._eos_id, on_progress)
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,  # `_TokenPicker` leaves one token
            eos_token_id=self._eos_id,
            pad_token_id=self._pad_id,
            use_cache=True,
        )
        with self._model.autocast(keep_casts=True):  # every token uses every weight
            output_BL: Tensor = lm.generate(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([reporter]),
                generation_config=config,
                synced_gpus=together,
            )
        on_progress(reporter.unfinished)  # these ended at the length limit
        completion_BL = output_BL[:, longest:]
        logprob_BL = torch.stack(picker.logprobs, 1)
        return [
            self._rollout(ids, logprobs)
            for ids, logprobs in zip(completion_BL.tolist(), logprob_BL.tolist(), strict=True)
        ]

    def _rollout(self, ids: list[int], logprobs: list[float]) -> Rollout:
        # Ends at the first EOS, by position: what follows is padding, whatever id padding has.
        stopped = self._eos_id in ids
        length = ids.index(self._eos_id) + 1 if stopped else len(ids)
        if not all(map(math.isfinite, logprobs[:length])):
            raise EngineError("sampled log-probs are not finite: the weights hold NaN or infinity")
        return Rollout(ids[:length], logprobs[:length], "stop" if stopped else "length", self.version)
