"""Do trainer and sampler hold the same weights? Ask both for the log-probs of the same tokens."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from carft_fast.config import Config
from carft_fast.core import EngineError, derive_seed, to_device
from carft_fast.models import CarftModel
from carft_fast.objective import Outputs, Rows, Want, build_passes
from carft_fast.rollout import Rollout, RolloutEngine, SamplingParams

PROMPTS, TOKENS = 8, 16
MATERIAL_NATS = 1e-2


class Mismatch(NamedTuple):
    """|trainer's - sampler's log-prob| over completion tokens, both on the sampler's support (nats)."""

    mean: float
    max: float
    material: float
    """Share of tokens beyond 1e-2."""
    tokens: int

    @classmethod
    def of(cls, trainer_C: Tensor, sampled_C: Tensor) -> "Mismatch":
        difference_C = (trainer_C - sampled_C).abs()
        return cls(
            float(difference_C.mean()),
            float(difference_C.max()),
            float((difference_C > MATERIAL_NATS).float().mean()),
            len(difference_C),
        )


def effective_sample_share(trainer_C: Tensor, sampled_C: Tensor) -> float:
    """(sum w)^2 / (C sum w^2) of the importance weights w = exp(trainer's - sampler's log-prob): in (0, 1], 1 where
    all are equal. Source: Kish 1965."""
    log_weight_C = (trainer_C - sampled_C).double()
    twice = 2 * torch.logsumexp(log_weight_C, 0) - torch.logsumexp(2 * log_weight_C, 0)  # no weight overflows
    return float(twice.exp() / len(log_weight_C))


def sampled_logprobs(rollouts: Sequence[Rollout], device: torch.device) -> Tensor:
    """float32 [C], in the order of a packed batch."""
    return to_device([x for rollout in rollouts for x in rollout.sampled_logprobs], torch.float32, device)


def check_agreement(engine: RolloutEngine, model: CarftModel, prompts: Sequence[list[int]], config: Config) -> Mismatch:
    """Sample a little with the run's settings, and compare. Raises EngineError beyond rollout.probe_tolerance."""
    rollout, picked = config.rollout, list(prompts[:PROMPTS])
    sampling = SamplingParams.of(rollout, derive_seed(config.seed, "probe"))
    sampling = replace(sampling, max_new_tokens=min(TOKENS, rollout.max_new_tokens), samples_per_prompt=1)
    rollouts = engine.generate(picked, sampling)
    rows = Rows(picked, [r.completion_ids for r in rollouts])
    passes = build_passes(config, model, config.rl.micro_batch_tokens)
    outputs: Outputs = model(passes.outputs, rows, Want(logprob=True))[0]
    assert outputs.support_logprob_C is not None
    mismatch = Mismatch.of(outputs.support_logprob_C, sampled_logprobs(rollouts, model.device))
    half = "bfloat16" in (config.model.compute_dtype, rollout.dtype)
    tolerance = rollout.probe_tolerance or (0.05 if half else 1e-3)
    if not mismatch.mean <= tolerance:  # NaN is a mismatch too
        raise EngineError(
            f"trainer and sampler disagree: mean |log-prob difference| {mismatch.mean:.2g} nats, largest "
            f"{mismatch.max:.2g}, over {mismatch.tokens} probe tokens; rollout.probe_tolerance allows {tolerance:g}. "
            "The sampler holds other weights or computes something else: do not train on its samples"
        )
    return mismatch
