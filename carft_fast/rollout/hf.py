"""Rollouts with transformers' `generate`, in this process and on the trainer's own weights."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

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

from carft_fast.batch import derive_seed
from carft_fast.model import CarftModel
from carft_fast.rollout.base import Rollout, SamplingParams


class _LogprobRecorder(LogitsProcessor):
    """Last in the chain: log-probs of the distribution the next token is drawn from, kept until it is known."""

    def __init__(self) -> None:
        self._pending_BV: Tensor | None = None
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.take(input_ids[:, -1])
        self._pending_BV = scores.float().log_softmax(-1)
        return scores

    def take(self, token_B: Tensor) -> None:
        if self._pending_BV is not None:
            self.logprobs.append(self._pending_BV.gather(1, token_B[:, None])[:, 0])
            self._pending_BV = None


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


class HFEngine:
    """Engine "hf". `sync` copies nothing: the sampler reads the trainer's weights."""

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
        jobs = [prompt for prompt in prompts for _ in range(sampling.samples_per_prompt)]
        by_length = sorted(range(len(jobs)), key=lambda job: len(jobs[job]))  # little padding within a batch
        results: dict[int, Rollout] = {}
        with self._model.padded():
            for start in range(0, len(by_length), self._batch_size):
                rows = by_length[start : start + self._batch_size]
                seed = derive_seed(sampling.seed, "generate", start)
                reporter = _ProgressReporter(self._eos_id, on_progress or (lambda _: None))
                rollouts = self._generate_batch([jobs[row] for row in rows], sampling, seed, reporter)
                results.update(zip(rows, rollouts, strict=True))
                reporter.finish(len(rows))
        return [results[job] for job in range(len(jobs))]

    def _generate_batch(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seed: int, reporter: _ProgressReporter
    ) -> list[Rollout]:
        device, lm = self._model.device, cast(Any, self._model.lm)  # generate() is typed as a Tensor
        longest = max(map(len, prompts))
        ids_BL = torch.tensor([[self._pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
        mask_BL = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        recorder = _LogprobRecorder()
        greedy = sampling.temperature == 0
        processors = LogitsProcessorList()
        if not greedy:
            # Set here, not in the generation config: generate() applies its own warpers after these, and the
            # recorder must see what is sampled from.
            processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                processors.append(TopPLogitsWarper(sampling.top_p))
        processors.append(recorder)
        with self._model.autocast(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            output_BL: Tensor = lm.generate(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([reporter]),
                generation_config=self._generation_config(sampling, greedy),
            )
        completion_BL = output_BL[:, longest:]
        recorder.take(completion_BL[:, -1])
        logprob_BL = torch.stack(recorder.logprobs, 1)
        return [
            self._rollout(ids, logprobs)
            for ids, logprobs in zip(completion_BL.tolist(), logprob_BL.tolist(), strict=True)
        ]

    def _rollout(self, ids: list[int], logprobs: list[float]) -> Rollout:
        # Ends at the first EOS, by position: what follows is padding, whatever id padding has.
        length = ids.index(self._eos_id) + 1 if self._eos_id in ids else len(ids)
        stopped = ids[length - 1] == self._eos_id
        return Rollout(ids[:length], logprobs[:length], "stop" if stopped else "length", self.version)

    def _generation_config(self, sampling: SamplingParams, greedy: bool) -> GenerationConfig:
        # Every field a model's own generation_config.json might set is stated, or generate() would merge it in:
        # Qwen2.5 ships top_k 20, top_p 0.8 and a repetition penalty.
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            max_length=None,
            do_sample=not greedy,
            num_beams=1,
            temperature=1.0,
            top_p=1.0,
            top_k=None if greedy else 0,  # transformers warns of a top_k that greedy decoding ignores
            min_p=None,
            typical_p=1.0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=self._eos_id,
            pad_token_id=self._pad_id,
            use_cache=True,
        )
