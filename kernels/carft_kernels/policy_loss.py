"""Token-level policy and value losses of PPO, for those who already have log-probs and values.

    r_t = exp(logprob_t - old_logprob_t)
    policy = sum_t weight_t max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high))
    value  = 0.5 sum_t weight_t max((v_t - R_t)^2, (clip(v_t, old_v_t - clip, old_v_t + clip) - R_t)^2)

Source: paper eq. 5; PPO. weight_t carries every normaliser. Nothing is kept beyond what autograd keeps of [T] vectors.
Accumulation: float32 (float64 for float64 input).
"""

import torch
from torch import Tensor

from carft_kernels._runtime import Impl, accumulation_dtype, check_float, check_impl, check_like


def policy_loss_reference(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    *,
    weight_T: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """The obvious expression."""
    ratio_T = (logprob_T - old_logprob_T).exp()
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    return (weight_T * torch.max(-advantage_T * ratio_T, -advantage_T * clipped_T)).sum()


def value_loss_reference(
    value_T: Tensor, old_value_T: Tensor, return_T: Tensor, *, weight_T: Tensor, clip: float = 0.2
) -> Tensor:
    """The obvious expression."""
    clipped_T = value_T.clamp(old_value_T - clip, old_value_T + clip)
    return 0.5 * (weight_T * torch.max((value_T - return_T) ** 2, (clipped_T - return_T) ** 2)).sum()


def _checked(tensors: dict[str, Tensor]) -> list[Tensor]:
    (first_name, first), *_ = tensors.items()
    check_float(first_name, first, 1)
    dtype = accumulation_dtype(first)
    for name, x in tensors.items():
        check_float(name, x, 1)
        check_like(name, x, tuple(first.shape), first_name, first)
    return [x.to(dtype) if name == first_name else x.detach().to(dtype) for name, x in tensors.items()]


def _share(condition_T: Tensor, weight_T: Tensor) -> Tensor:
    counted_T = weight_T != 0
    return (condition_T & counted_T).sum() / counted_T.sum().clamp(min=1)


def policy_loss(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    *,
    weight_T: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    impl: Impl = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy loss.

    Equivalent: `r = (logprob - old_logprob).exp()`; `loss = (weight * torch.max(-A * r, -A * r.clamp(1 - clip_low,
    1 + clip_high))).sum()`.

    Args:
        logprob_T: float [T] under the policy being trained.
        old_logprob_T, advantage_T: float [T]; no gradient.
        weight_T: float [T], the token's share of the loss; no gradient.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        impl: "auto" or "torch".

    Returns:
        loss (scalar) and metrics, means over the tokens with weight: `clip_fraction`, `approx_kl` (mean of
        (r - 1) - log r). float32 (float64 for float64 input). Gradient to logprob only.

    Source: paper eq. 5; PPO, Schulman et al. 2017.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    check_impl("policy_loss", impl)
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low = {clip_low}: expected a number in [0, 1]")
    if not clip_high >= 0:
        raise ValueError(f"clip_high = {clip_high}: expected a number of at least 0")
    logprob_T, old_logprob_T, advantage_T, weight_T = _checked(
        {"logprob_T": logprob_T, "old_logprob_T": old_logprob_T, "advantage_T": advantage_T, "weight_T": weight_T}
    )
    # a token without weight takes no part, whatever its ratio: 0 * inf would be NaN
    old_logprob_T = torch.where(weight_T != 0, old_logprob_T, logprob_T.detach())
    loss = policy_loss_reference(
        logprob_T, old_logprob_T, advantage_T, weight_T=weight_T, clip_low=clip_low, clip_high=clip_high
    )
    with torch.no_grad():
        log_ratio_T = torch.where(weight_T != 0, logprob_T - old_logprob_T, torch.zeros_like(logprob_T))
        ratio_T = log_ratio_T.exp()
        metrics = {
            "clip_fraction": _share((ratio_T < 1 - clip_low) | (ratio_T > 1 + clip_high), weight_T),
            "approx_kl": (log_ratio_T.expm1() - log_ratio_T).sum() / (weight_T != 0).sum().clamp(min=1),
        }
    return loss, metrics


def value_loss(
    value_T: Tensor,
    old_value_T: Tensor,
    return_T: Tensor,
    *,
    weight_T: Tensor,
    clip: float = 0.2,
    impl: Impl = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped value loss, the factor 0.5 included.

    Equivalent: `c = value.clamp(old_value - clip, old_value + clip)`; `loss = 0.5 * (weight * torch.max(
    (value - return_) ** 2, (c - return_) ** 2)).sum()`.

    Args:
        value_T: float [T] under the weights being trained.
        old_value_T, return_T: float [T]; no gradient.
        weight_T: float [T], the token's share of the loss; no gradient.
        clip: largest move of a value from the old one, above 0.
        impl: "auto" or "torch".

    Returns:
        loss (scalar) and metrics: `clip_fraction`, the share of tokens with weight whose value moved further than
        `clip`. float32 (float64 for float64 input). Gradient to value only.

    Source: the clipped value loss of PPO trainers, as in ReFT.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    check_impl("value_loss", impl)
    if not clip > 0:
        raise ValueError(f"clip = {clip}: expected a number above 0")
    value_T, old_value_T, return_T, weight_T = _checked(
        {"value_T": value_T, "old_value_T": old_value_T, "return_T": return_T, "weight_T": weight_T}
    )
    loss = value_loss_reference(value_T, old_value_T, return_T, weight_T=weight_T, clip=clip)
    with torch.no_grad():
        return loss, {"clip_fraction": _share((value_T - old_value_T).abs() > clip, weight_T)}
