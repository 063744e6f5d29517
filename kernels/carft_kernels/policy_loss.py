"""Token-level policy and value losses of PPO, for those who already have log-probs and values.

    r_t = exp(logprob_t - old_logprob_t)
    policy = sum_t weight_t max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high))
    value  = 0.5 sum_t weight_t max((v_t - R_t)^2, (clip(v_t, old_v_t - clip, old_v_t + clip) - R_t)^2)

Source: paper eq. 5; PPO. weight_t carries every normaliser. Variants of the policy loss: a dual clip, CISPO, a factor
of each token, and one ratio for a sequence, exp of the mean of its tokens' log-ratios (GSPO). Kept for backward: the
gradient, computed in the forward pass. Accumulation: float32 (float64 for float64 input). Triton: one launch, of one
program up to 65,536 tokens, each vector read once; ratios of sequences take two more, of a program for each sequence.
"""

# mypy: disable-error-code="no-untyped-def"

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from carft_kernels._policy_kernels import (
    TOKEN_CONFIG,
    PolicyLoss,
    TokenTerms,
    TokenVectors,
    policy_terms,
    policy_terms_reference,
    policy_terms_torch,
    sequence_log_ratio_reference,
    token_programs,
)
from carft_kernels._row_kernels import SEQUENCE_CONFIG, offsets_rise, sequence_bounds
from carft_kernels._runtime import (
    Impl,
    accumulation_dtype,
    all_count,
    call,
    check_float,
    check_like,
    check_offsets,
    differentiable,
    launch,
    log_implementation,
    scaled_gradient,
    sequence_index,
    usable_offsets,
    use_triton,
    zero_where_less,
)


def policy_loss_reference(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    *,
    weight_T: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    loss: PolicyLoss = "clip",
    correction_T: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The obvious expression."""
    log_ratio_T = logprob_T - old_logprob_T
    if cu_seqlens is not None:
        log_ratio_T = sequence_log_ratio_reference(log_ratio_T, weight_T, cu_seqlens)
    terms = TokenTerms(clip_low, clip_high, dual_clip, loss)
    loss_T = policy_terms_reference(
        logprob_T, old_logprob_T, advantage_T, terms, correction_T=correction_T, log_ratio_T=log_ratio_T
    )
    return (weight_T * loss_T).sum()


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


def _fake(x_T: Tensor, metrics: int) -> tuple[Tensor, ...]:
    """Loss, its gradient, metrics."""
    dtype = accumulation_dtype(x_T)
    loss, *rest = (x_T.new_empty((), dtype=dtype) for _ in range(1 + metrics))
    return loss, torch.empty_like(x_T, dtype=dtype), *rest


@triton.jit(do_not_specialize=["tokens"])
def sequence_mean_kernel(
    x,
    less,  # or None: 0
    weight,
    cu_seqlens,
    out,  # the mean of x - less over the tokens with weight of a sequence, at each of these tokens
    tokens,
    BLOCK: tl.constexpr,
):
    """One program a sequence, two passes over its tokens."""
    start, end = sequence_bounds(cu_seqlens, tokens)
    total = tl.zeros([BLOCK], tl.float32)
    counted = tl.zeros([BLOCK], tl.float32)
    for i in range(start, end, BLOCK):
        t = i + tl.arange(0, BLOCK)
        live = tl.load(weight + t, mask=t < end, other=0.0).to(tl.float32) != 0.0
        value = tl.load(x + t, mask=live, other=0.0).to(tl.float32)
        if less is not None:
            value -= tl.load(less + t, mask=live, other=0.0).to(tl.float32)
        total += value
        counted += live.to(tl.float32)
    mean = tl.sum(total, 0) / tl.maximum(tl.sum(counted, 0), 1.0)
    mean = tl.where(offsets_rise(cu_seqlens, tokens), mean, float("nan"))
    for i in range(start, end, BLOCK):
        t = i + tl.arange(0, BLOCK)
        live = tl.load(weight + t, mask=t < end, other=0.0).to(tl.float32) != 0.0
        tl.store(out + t, tl.where(live, mean, 0.0), mask=t < end)


def _sequence_mean(
    x_T: Tensor, less_T: Tensor | None, weight_T: Tensor, cu_seqlens: Tensor, via_triton: bool
) -> Tensor:
    """[T]: see `sequence_mean_kernel`."""
    tokens, sequences = len(x_T), cu_seqlens.numel() - 1
    if via_triton:
        out_T = torch.empty_like(x_T, dtype=torch.float32)
        launch(sequence_mean_kernel, sequences, x_T, less_T, weight_T, cu_seqlens, out_T, tokens, **SEQUENCE_CONFIG)
        return out_T
    cu_seqlens, wrong = usable_offsets(cu_seqlens, tokens)
    sequence_T, live_T = sequence_index(cu_seqlens, tokens), weight_T != 0
    counted_T = torch.where(live_T, x_T if less_T is None else x_T - less_T, 0.0)
    total_B, count_B = (
        x_T.new_zeros(sequences).index_add_(0, sequence_T, y) for y in (counted_T, live_T.to(x_T.dtype))
    )
    mean_T = (total_B / count_B.clamp(min=1))[sequence_T].masked_fill(wrong, math.nan)
    return torch.where(live_T, mean_T, 0.0)


@torch.library.custom_op("carft::policy_loss", mutates_args=())
def _policy_forward(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    correction_T: Tensor | None,
    cu_seqlens: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    loss: str,
    via_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, its gradient, and the metrics: clipped share, approximate KL."""
    log_implementation("policy_loss", via_triton, logprob_T.device.type)
    dtype = accumulation_dtype(logprob_T)
    if not via_triton:  # a kernel widens what it reads
        logprob_T, old_logprob_T, advantage_T, weight_T = (
            x.to(dtype) for x in (logprob_T, old_logprob_T, advantage_T, weight_T)
        )
        correction_T = None if correction_T is None else correction_T.to(dtype)
    if cu_seqlens is not None:
        check_offsets("cu_seqlens", cu_seqlens, len(logprob_T))
        # the loss sees a sequence's log-ratio in the place of each of its tokens'
        logprob_T = _sequence_mean(logprob_T, old_logprob_T, weight_T, cu_seqlens, via_triton)
        old_logprob_T = torch.zeros_like(logprob_T)
    vectors = TokenVectors(advantage_T, old_logprob_T, weight_T, correction_T)
    terms = TokenTerms(clip_low, clip_high, dual_clip, loss)
    if via_triton:
        stats = logprob_T.new_zeros(5, dtype=dtype)
        d_logprob_T = policy_terms(logprob_T, vectors, stats, terms, via_triton=True)
        sums = [stats[0].clone(), *stats[1:]]
    else:
        d_logprob_T, sums = policy_terms_torch(logprob_T, vectors, terms)
    if cu_seqlens is not None:
        d_logprob_T = _sequence_mean(d_logprob_T, None, weight_T, cu_seqlens, via_triton)
    total, count, outside, kl, *_ = sums
    count = count.clamp(min=1)
    return total, d_logprob_T, (outside / count).to(dtype), kl / count


@_policy_forward.register_fake
def _(logprob_T: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _fake(logprob_T, metrics=2)


@triton.jit(do_not_specialize=["tokens"])
def value_kernel(
    value,
    old_value,
    return_,
    weight,
    d_value,
    stats,  # [programs, 3]: loss, tokens with weight, of these outside the clip
    tokens,
    clip,
    BLOCK: tl.constexpr,
):
    """Every program has its blocks and its sums: they are the same in every run."""
    stats += tl.program_id(0) * 3
    loss = tl.zeros([BLOCK], tl.float32)
    counted = tl.zeros([BLOCK], tl.float32)
    outside = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.program_id(0) * BLOCK, tokens, tl.num_programs(0) * BLOCK):
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
    """Loss, its gradient, and the share of the tokens with weight that is outside the clip."""
    log_implementation("value_loss", via_triton, value_T.device.type)
    dtype = accumulation_dtype(value_T)
    if via_triton:
        programs = token_programs(len(value_T))
        sums = value_T.new_empty(programs, 3, dtype=dtype)
        d_value_T = torch.empty_like(value_T, dtype=dtype)
        vectors = value_T, old_value_T, return_T, weight_T, d_value_T
        launch(value_kernel, programs, *vectors, sums, len(value_T), clip, **TOKEN_CONFIG)
        loss, count, outside = sums.sum(0).unbind()
        return loss.clone(), d_value_T, outside / count.clamp(min=1)
    v, old, r, w = (x.to(dtype) for x in (value_T, old_value_T, return_T, weight_T))
    count = w.count_nonzero()
    if not all_count(count, len(w)):  # a token without weight takes no part, whatever it holds: 0 * inf would be NaN
        v, old, r = (torch.where(w != 0, x, 0.0) for x in (v, old, r))
    difference, clipped_v = v - r, v.clamp(old - clip, old + clip)
    plain, clipped = difference.square(), (clipped_v - r).square_()
    loss = 0.5 * (w * torch.maximum(plain, clipped)).sum()
    d_value_T = zero_where_less(w * difference, plain, clipped)
    return loss, d_value_T, ((v != clipped_v).count_nonzero() / count.clamp(min=1)).to(dtype)


@_value_forward.register_fake
def _(value_T: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _fake(value_T, metrics=1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the outputs that carry no gradient
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1])
    ctx.dtype, ctx.inputs = inputs[0].dtype, len(inputs)


def _autograd(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * ctx.inputs
    (gradient_T,) = ctx.saved_tensors
    return call(scaled_gradient, gradient_T, d_loss, ctx.dtype), *([None] * (ctx.inputs - 1))


_policy_terms = differentiable(_policy_forward, _autograd, _setup_context)
_value_terms = differentiable(_value_forward, _autograd, _setup_context)


def policy_loss(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    *,
    weight_T: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    loss: PolicyLoss = "clip",
    correction_T: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss of given log-probs, with the ratio clipped.

    Equivalent: `r = (logprob - old_logprob).exp()`; `loss = (weight * torch.max(-A * r, -A * r.clamp(1 - clip_low,
    1 + clip_high))).sum()`.

    Args:
        logprob_T: float [T] under the policy being trained.
        old_logprob_T, advantage_T: float [T]; no gradient.
        weight_T: float [T], the token's share of the loss; no gradient.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: c > 1: where the advantage is negative a token's loss is at most -A * c, and has no gradient beyond.
            None: no bound.
        loss: "clip" as above; "cispo" `-A * r.clamp(1 - clip_low, 1 + clip_high).detach() * logprob`: the ratio is a
            weight, and every token keeps its gradient. clip_low = 1 leaves it without a lower bound.
        correction_T: float [T], a factor of each token's loss, such as an importance weight; at least 0, no gradient.
        cu_seqlens: int64 or int32 [B + 1], offsets of the sequences, from 0 to T: the ratio of a token is that of its
            sequence, exp of the mean of `logprob - old_logprob` over the sequence's tokens with weight (GSPO). Needs
            "clip". Wrong ones are an error where index ranges are checked (`set_index_checks`); elsewhere the result
            is NaN. None: every token has its own ratio.
        impl: "auto" (Triton on CUDA, torch elsewhere and for float64), "triton" or "torch".

    Returns:
        loss (scalar) and metrics, means over the tokens with weight: `clip_fraction`, `approx_kl` (mean of
        (r - 1) - log r). float32 (float64 for float64 input). Gradient to logprob only.

    Source: paper eq. 5; PPO, Schulman et al. 2017. Dual clip: Ye et al. 2020 (arXiv 1912.09729). CISPO: MiniMax-M1 2025
    (arXiv 2506.13585). Ratios of sequences: GSPO, Zheng et al. 2025 (arXiv 2507.18071).

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    terms = TokenTerms(clip_low, clip_high, dual_clip, loss)
    terms.check()
    tensors = {"logprob_T": logprob_T, "old_logprob_T": old_logprob_T, "advantage_T": advantage_T, "weight_T": weight_T}
    if correction_T is not None:
        tensors["correction_T"] = correction_T
    inputs = _checked(tensors)
    if cu_seqlens is not None:
        terms.check_sequences(cu_seqlens, "logprob_T", logprob_T)
        cu_seqlens = cu_seqlens.contiguous()
    total, _, clip_fraction, approx_kl = _policy_terms(
        *inputs[:4],
        inputs[4] if correction_T is not None else None,
        cu_seqlens,
        *(clip_low, clip_high, dual_clip, loss),
        use_triton("policy_loss", impl, logprob_T),
    )
    return total, {"clip_fraction": clip_fraction, "approx_kl": approx_kl}


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
    loss, _, clip_fraction = _value_terms(*inputs, clip, use_triton("value_loss", impl, value_T))
    return loss, {"clip_fraction": clip_fraction}
