"""Inputs and terms of the policy loss that several of its tests take."""

from typing import Any

import torch

from carft_kernels.linear_logprob import linear_logprob_reference

from .checks import randn, rng

TOKENS, WIDTH, VOCABULARY = 37, 19, 53  # nothing a power of two
TERMS: dict[str, dict[str, Any]] = {
    "dual clip": {"dual_clip": 1.3},
    "cispo": {"loss": "cispo", "clip_low": 1.0},
    "k2": {"kl_coef": 0.3, "kl_estimate": "k2"},
    "k2, bounded": {"kl_coef": 0.3, "kl_estimate": "k2", "kl_clamp": 0.05},
    "k3, bounded": {"kl_coef": 0.3, "kl_clamp": 0.05, "dual_clip": 1.5},
    "entropy": {"entropy_coef": 0.1, "kl_coef": 0.2},
    "z loss": {"z_loss_coef": 0.03},
    "z loss and entropy": {"z_loss_coef": 0.03, "entropy_coef": 0.1, "loss": "cispo"},
}


def policy_inputs(seed: int, tokens: int, vocabulary: int) -> dict[str, Any]:
    hidden, weight = randn(seed, tokens, WIDTH), randn(seed + 1, vocabulary, WIDTH, scale=0.4)
    target = torch.randint(vocabulary, (tokens,), generator=rng(seed))
    logprob, _ = linear_logprob_reference(hidden, weight, target)
    return {
        "hidden_TD": hidden,
        "weight_VD": weight,
        "target_T": target,
        "advantage_T": randn(seed + 2, tokens),
        "old_logprob_T": logprob + randn(seed + 3, tokens, scale=0.3),
        "weight_T": torch.rand(tokens, generator=rng(seed + 4), dtype=torch.float64),
        "ref_logprob_T": logprob + randn(seed + 5, tokens, scale=0.3),
    }


def _without(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k not in ("hidden_TD", "weight_VD")}
