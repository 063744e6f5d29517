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
)

from carft_fast.core import EngineError, chunks, global_max, world_size
from carft_fast.models import CarftModel
from carft_fast.rollout.base import Progress, Prompts, Rollout, SamplingParams, request_seed
from carft_fast.rollout.coupled import pick, processed_logits


class _TokenPicker(LogitsProcessor):
    """The only processor of greedy decoding: leaves one token of each row a finite score, and keeps its log-prob."""

    def __init__(self, jobs: "Sequence[_Job]", sampling: SamplingParams, end_E: Tensor) -> None:
        self._jobs, self._sampling, self._end_E = jobs, sampling, end_E
        self._unfinished = list(range(len(jobs)))
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sampling, rows, vocabulary = self._sampling, len(scores), scores.shape[1]
        if sampling.temperature == 0:
            self.logprobs.append(scores.float().log_softmax(-1).amax(-1))
            return scores
        processed_BV = processed_logits(
            scores,
            scores.new_full((rows,), sampling.temperature),
            scores.new_full((rows,), min(sampling.top_k, vocabulary), dtype=torch.int64) if sampling.top_k else None,
            scores.new_full((rows,), sampling.top_p) if sampling.top_p < 1 else None,
        )
        # Rows that have ended get padding, whatever is picked.
        token_B = self._end_E[:1].repeat(rows)
        jobs, step = [self._jobs[row] for row in self._unfinished], len(self.logprobs)
        token_B[self._unfinished] = pick(
            processed_BV[self._unfinished], [job.seed for job in jobs], [len(job.prompt) + step for job in jobs]
        )
        self._unfinished = torch.isin(token_B, self._end_E, invert=True).nonzero()[:, 0].tolist()
        self.logprobs.append(processed_BV.log_softmax(-1).gather(1, token_B[:, None])[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)


class _ProgressReporter(StoppingCriteria):
    """Tells after every token how many rows have just ended; stops nothing, but what the callback raises propagates."""

    def __init__(self, rows: int, prompt_length: int, end_E: Tensor, on_progress: Progress) -> None:
        self.unfinished = rows
        self._prompt_length, self._end_E, self._on_progress = prompt_length, end_E, on_progress

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        ended_B = torch.isin(input_ids[:, self._prompt_length :], self._end_E).any(-1)
        unfinished = len(ended_B) - int(ended_B.sum())
        self._on_progress(self.unfinished - unfinished)
        self.unfinished = unfinished
        return torch.zeros_like(ended_B)


class _Job(NamedTuple):
    """One completion to make."""

    prompt: Sequence[int]
    seed: int


class HFEngine:
    """Engine "hf". `sync` copies nothing: the sampler reads the trainer's weights.

    With weights that are sharded over processes, all processes have to call `generate` together, each with its own
    prompts or with none.
    """

    def __init__(self, model: CarftModel, tokenizer: Any, *, batch_size: int, ends: Sequence[int] = ()) -> None:
        """`ends`: ids that end a completion; the tokenizer's EOS if not given."""
        self._weak_model = weakref.ref(model)  # a finished stage must not stay in memory
        self._ends = list(ends) or [tokenizer.eos_token_id]
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
                    self._generate_batch([_Job(self._ends[:1], 0)], one_token, lambda _: None, together)

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
        end_E = torch.tensor(self._ends, device=device)
        picker = _TokenPicker(jobs, sampling, end_E)
        reporter = _ProgressReporter(len(jobs), longest, end_E, on_progress)
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,  # `_TokenPicker` leaves one token
            eos_token_id=self._ends,
            pad_token_id=self._pad_id,
            use_cache=True,
        )
        with self._model.autocast(keep_casts=True):  # every token uses every weight
            output_BL: Tensor = lm.generate(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                logits_processor=LogitsProcessorList([picker]),
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
        # Ends at the first of its ends, by position: what follows is padding, whatever id padding has.
        at = next((at for at, token in enumerate(ids) if token in self._ends), None)
        length = len(ids) if at is None else at + 1
        if not all(map(math.isfinite, logprobs[:length])):
            raise EngineError("sampled log-probs are not finite: the weights hold NaN or infinity")
        return Rollout(ids[:length], logprobs[:length], "length" if at is None else "stop", self.version)
