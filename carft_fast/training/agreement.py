"""Do trainer and sampler hold the same weights? Ask both for the log-probs of the same tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from carft_fast.config import Config
from carft_fast.core import EngineError, derive_seed
from carft_fast.models import CarftModel, pack
from carft_fast.objective import completion_logprobs, sampler_support_logprobs
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


def sampled_logprobs(rollouts: Sequence[Rollout], device: torch.device) -> Tensor:
    """float32 [C], in the order of a packed batch."""
    return torch.tensor([x for rollout in rollouts for x in rollout.sampled_logprobs], device=device)


@torch.no_grad()
def check_agreement(
    engine: RolloutEngine, model: CarftModel, prompts: Sequence[Sequence[int]], config: Config
) -> Mismatch:
    """Sample a little with the run's settings, and compare. Raises EngineError beyond rollout.probe_tolerance."""
    rollout = config.rollout
    picked = list(prompts[:PROMPTS])
    sampling = SamplingParams(
        max_new_tokens=min(TOKENS, rollout.max_new_tokens),
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        seed=derive_seed(config.seed, "probe"),
    )
    rollouts = engine.generate(picked, sampling)
    batch = pack(picked, [r.completion_ids for r in rollouts], model.device)

    def support_logprobs(model: CarftModel) -> Tensor:
        output = model(batch)
        logprob_C = completion_logprobs(model, output, batch, temperature=rollout.temperature)
        return sampler_support_logprobs(
            model, output, batch, logprob_C, temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k
        )

    mismatch = Mismatch.of(model.run(support_logprobs), sampled_logprobs(rollouts, model.device))
    half = "bfloat16" in (config.model.compute_dtype, rollout.dtype)
    tolerance = rollout.probe_tolerance or (0.05 if half else 1e-3)
    if not mismatch.mean <= tolerance:  # NaN is a mismatch too
        raise EngineError(
            f"trainer and sampler disagree: mean |log-prob difference| {mismatch.mean:.2g} nats, largest "
            f"{mismatch.max:.2g}, over {mismatch.tokens} probe tokens; rollout.probe_tolerance allows {tolerance:g}. "
            "The sampler holds other weights or computes something else: do not train on its samples"
        )
    return mismatch
