"""Token-level policy and value losses of PPO, for those who already have log-probs and values.

    r_t = exp(logprob_t - old_logprob_t)
    policy = sum_t weight_t max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high))
    value  = 0.5 sum_t weight_t max((v_t - R_t)^2, (clip(v_t, old_v_t - clip, old_v_t + clip) - R_t)^2)

Source: paper eq. 5; PPO. weight_t carries every normaliser. Kept for backward: the gradient, computed in the forward
pass. Accumulation: float32 (float64 for float64 input). Triton: one launch of one program, each vector read once.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from carft_kernels._row_kernels import TOKEN_CONFIG, policy_terms
from carft_kernels._runtime import (
    Impl,
    accumulation_dtype,
    check_float,
    check_like,
    log_implementation,
    on_device,
    scaled_gradient,
    use_triton,
)


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
    for name, x in tensors.items():
        check_float(name, x, 1)
        check_like(name, x, tuple(first.shape), first_name, first)
    return [(x if name == first_name else x.detach()).contiguous() for name, x in tensors.items()]


@torch.library.custom_op("carft::policy_loss", mutates_args=())
def _policy_forward(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    clip_low: float,
    clip_high: float,
    via_triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient, and the sums [5] of policy_terms."""
    log_implementation("policy_loss", via_triton, logprob_T.device.type)
    dtype = accumulation_dtype(logprob_T)
    if not via_triton:  # a kernel widens what it reads
        logprob_T, old_logprob_T, advantage_T, weight_T = (
            x.to(dtype) for x in (logprob_T, old_logprob_T, advantage_T, weight_T)
        )
    stats = logprob_T.new_zeros(5, dtype=dtype)
    d_logprob_T = policy_terms(
        logprob_T,
        old_logprob_T,
        advantage_T,
        weight_T,
        stats,
        clip_low=clip_low,
        clip_high=clip_high,
        via_triton=via_triton,
    )
    return stats[0].clone(), d_logprob_T, stats


@_policy_forward.register_fake
def _(logprob_T: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(logprob_T)
    return (
        logprob_T.new_empty((), dtype=dtype),
        torch.empty_like(logprob_T, dtype=dtype),
        logprob_T.new_empty(5, dtype=dtype),
    )


@triton.jit(do_not_specialize=["tokens"])
def value_kernel(
    value,
    old_value,
    return_,
    weight,
    d_value,
    stats,  # [3]: loss, tokens with weight, of these outside the clip
    tokens,
    clip,
    BLOCK: tl.constexpr,
):
    """One program: the sums are the same in every run."""
    loss = tl.zeros([BLOCK], tl.float32)
    counted = tl.zeros([BLOCK], tl.float32)
    outside = tl.zeros([BLOCK], tl.float32)
    for i in range(0, tokens, BLOCK):
        t = i + tl.arange(0, BLOCK)
        inside = t < tokens
        w = tl.load(weight + t, mask=inside, other=0.0).to(tl.float32)
        live = w != 0.0
        v = tl.load(value + t, mask=live, other=0.0).to(tl.float32)
        old = tl.load(old_value + t, mask=live, other=0.0).to(tl.float32)
        r = tl.load(return_ + t, mask=live, other=0.0).to(tl.float32)
        clipped = tl.minimum(tl.maximum(v, old - clip), old + clip) - r
        plain = v - r
        # where the two are equal the value is inside the clip range: gradient flows, NaN too
        stops = plain * plain < clipped * clipped
        tl.store(d_value + t, tl.where(live, tl.where(stops, 0.0, w * plain), 0.0), mask=inside)
        larger = tl.maximum(plain * plain, clipped * clipped, propagate_nan=tl.PropagateNan.ALL)
        loss += tl.where(live, 0.5 * w * larger, 0.0)
        counted += live.to(tl.float32)
        outside += (live & (tl.abs(v - old) > clip)).to(tl.float32)
    tl.store(stats, tl.sum(loss, 0))
    tl.store(stats + 1, tl.sum(counted, 0))
    tl.store(stats + 2, tl.sum(outside, 0))


@torch.library.custom_op("carft::value_loss", mutates_args=())
def _value_forward(
    value_T: Tensor, old_value_T: Tensor, return_T: Tensor, weight_T: Tensor, clip: float, via_triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient, and the sums [3]: loss, tokens with weight, of these outside the clip."""
    log_implementation("value_loss", via_triton, value_T.device.type)
    dtype = accumulation_dtype(value_T)
    if via_triton:
        stats = value_T.new_empty(3, dtype=dtype)
        d_value_T = torch.empty_like(value_T, dtype=dtype)
        options: dict[str, Any] = TOKEN_CONFIG
        with on_device(value_T):
            value_kernel[(1,)](
                value_T, old_value_T, return_T, weight_T, d_value_T, stats, len(value_T), clip, **options
            )
        return stats[0].clone(), d_value_T, stats
    v, old, r, w = (x.to(dtype) for x in (value_T, old_value_T, return_T, weight_T))
    live = w != 0
    plain, clipped = v - r, v.clamp(old - clip, old + clip) - r
    loss = torch.where(live, 0.5 * w * torch.maximum(plain.square(), clipped.square()), 0.0).sum()
    d_value_T = torch.where(live & ~(plain.square() < clipped.square()), w * plain, 0.0)
    outside = (live & ((v - old).abs() > clip)).sum()
    return loss, d_value_T, torch.stack([loss, live.sum().to(dtype), outside.to(dtype)])


@_value_forward.register_fake
def _(value_T: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(value_T)
    return (
        value_T.new_empty((), dtype=dtype),
        torch.empty_like(value_T, dtype=dtype),
        value_T.new_empty(3, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, gradient_T, stats = output
    ctx.set_materialize_grads(False)  # no zeros for the outputs that carry no gradient
    ctx.mark_non_differentiable(gradient_T, stats)
    ctx.save_for_backward(gradient_T)
    ctx.dtype, ctx.inputs = inputs[0].dtype, len(inputs)


def _autograd(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * ctx.inputs
    (gradient_T,) = ctx.saved_tensors
    return scaled_gradient(gradient_T, d_loss, ctx.dtype), *([None] * (ctx.inputs - 1))


_policy_forward.register_autograd(_autograd, setup_context=_setup_context)
_value_forward.register_autograd(_autograd, setup_context=_setup_context)


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
        impl: "auto" (Triton on CUDA, torch elsewhere and for float64), "triton" or "torch".

    Returns:
        loss (scalar) and metrics, means over the tokens with weight: `clip_fraction`, `approx_kl` (mean of
        (r - 1) - log r). float32 (float64 for float64 input). Gradient to logprob only.

    Source: paper eq. 5; PPO, Schulman et al. 2017.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low = {clip_low}: expected a number in [0, 1]")
    if not clip_high >= 0:
        raise ValueError(f"clip_high = {clip_high}: expected a number of at least 0")
    inputs = _checked(
        {"logprob_T": logprob_T, "old_logprob_T": old_logprob_T, "advantage_T": advantage_T, "weight_T": weight_T}
    )
    loss, _, stats = _policy_forward(*inputs, clip_low, clip_high, use_triton("policy_loss", impl, logprob_T))
    count = stats[1].clamp(min=1)
    return loss, {"clip_fraction": stats[2] / count, "approx_kl": stats[3] / count}


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
        impl: "auto" (Triton on CUDA, torch elsewhere and for float64), "triton" or "torch".

    Returns:
        loss (scalar) and metrics: `clip_fraction`, the share of tokens with weight whose value moved further than
        `clip`. float32 (float64 for float64 input). Gradient to value only.

    Source: the clipped value loss of PPO trainers, as in ReFT.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    if not clip > 0:
        raise ValueError(f"clip = {clip}: expected a number above 0")
    inputs = _checked({"value_T": value_T, "old_value_T": old_value_T, "return_T": return_T, "weight_T": weight_T})
    loss, _, stats = _value_forward(*inputs, clip, use_triton("value_loss", impl, value_T))
    return loss, {"clip_fraction": stats[2] / stats[1].clamp(min=1)}
