"""Advantages over packed sequences: KL-shaped rewards, generalised advantage estimation, whitening.

    r_t     = [t is the sequence's last token] score - kl_coef (old_logprob_t - ref_logprob_t)
    delta_t = r_t + gamma v_{t+1} - v_t,   v after the last token = 0
    A_t     = delta_t + gamma lambda A_{t+1},   return_t = A_t + v_t
    whiten  = (x - mean) / sqrt(var + eps), var unbiased, statistics over masked tokens of every rank

Source: paper section 3.2, ReFT; GAE, Schulman et al. 2016. None of the three carries gradient. Accumulation: float32
(float64 for float64 input). Triton: one launch each, one program a sequence (whitening: one program). Where nothing
checks offsets, wrong ones make every number of the call NaN: each program looks at all of them.
"""

# mypy: disable-error-code="no-untyped-def"

import math
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from carft_kernels._row_kernels import SEQUENCE_CONFIG, offsets_rise, sequence_bounds
from carft_kernels._runtime import (
    FUSED,
    Impl,
    accumulation_dtype,
    call,
    check_bool,
    check_cu_seqlens,
    check_finite,
    check_float,
    check_like,
    check_offsets,
    check_positive,
    launch,
    log_implementation,
    sequence_index,
    usable_offsets,
    use_triton,
)


def gae_reference(
    reward_T: Tensor, value_T: Tensor, cu_seqlens: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """The obvious expression, token by token."""
    advantage_T = torch.zeros_like(reward_T)
    for s, e in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        following = next_value = reward_T.new_zeros(())
        for t in reversed(range(s, e)):
            delta = reward_T[t] + gamma * next_value - value_T[t]
            following = advantage_T[t] = delta + gamma * lam * following
            next_value = value_T[t]
    return advantage_T, advantage_T + value_T


def kl_shaped_reward_reference(
    score_B: Tensor, old_logprob_T: Tensor, ref_logprob_T: Tensor, cu_seqlens: Tensor, *, kl_coef: float
) -> Tensor:
    """The obvious expression."""
    reward_T = -kl_coef * (old_logprob_T - ref_logprob_T)
    for b, (s, e) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        if e > s:
            reward_T[e - 1] += score_B[b]
    return reward_T


def whiten_reference(x_T: Tensor, mask_T: Tensor | None = None, *, eps: float = 1e-8) -> Tensor:
    """The obvious expression, one rank, at least two tokens."""
    mask_T = torch.ones_like(x_T, dtype=torch.bool) if mask_T is None else mask_T
    counted = x_T[mask_T]
    return torch.where(mask_T, (x_T - counted.mean()) * (counted.var() + eps).rsqrt(), 0.0)


@triton.jit
def _then(decay_a, sum_a, decay_b, sum_b):
    """Composition of the steps A -> sum + decay A, a first."""
    return decay_a * decay_b, sum_b + decay_b * sum_a


@triton.jit(do_not_specialize=["tokens"])
def gae_kernel(reward, value, cu_seqlens, advantage, return_, tokens, gamma, decay, BLOCK: tl.constexpr):
    """One program a sequence, from its end: a scan over each block of tokens, its result carried to the next."""
    start, end = sequence_bounds(cu_seqlens, tokens)
    carry = tl.where(offsets_rise(cu_seqlens, tokens), 0.0, float("nan"))
    for i in range(0, end - start, BLOCK):
        t = end - 1 - i - tl.arange(0, BLOCK)  # backwards, so that the scan runs forwards
        inside = t >= start
        r = tl.load(reward + t, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(value + t, mask=inside, other=0.0).to(tl.float32)
        next_v = tl.load(value + t + 1, mask=inside & (t + 1 < end), other=0.0).to(tl.float32)
        delta = tl.where(inside, r + gamma * next_v - v, 0.0)
        powers, sums = tl.associative_scan((tl.zeros([BLOCK], tl.float32) + decay, delta), 0, _then)
        a = sums + powers * carry
        tl.store(advantage + t, a, mask=inside)
        tl.store(return_ + t, a + v, mask=inside)
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, a, 0.0), 0)


@triton.jit(do_not_specialize=["tokens"])
def kl_shaped_reward_kernel(score, old_logprob, ref_logprob, cu_seqlens, reward, tokens, kl_coef, BLOCK: tl.constexpr):
    """One program a sequence."""
    start, end = sequence_bounds(cu_seqlens, tokens)
    coefficient = tl.where(offsets_rise(cu_seqlens, tokens), -kl_coef, float("nan"))
    last = tl.load(score + tl.program_id(0)).to(tl.float32)
    for i in range(start, end, BLOCK):
        t = i + tl.arange(0, BLOCK)
        inside = t < end
        old = tl.load(old_logprob + t, mask=inside, other=0.0).to(tl.float32)
        ref = tl.load(ref_logprob + t, mask=inside, other=0.0).to(tl.float32)
        r = coefficient * (old - ref)
        tl.store(reward + t, tl.where(t == end - 1, r + last, r), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def whiten_kernel(x, mask, out, tokens, eps, BLOCK: tl.constexpr):
    """One program, three passes over a vector that stays in the cache: mean, variance about it, result."""
    count = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, tokens, BLOCK):
        t = i + tl.arange(0, BLOCK)
        here = t < tokens
        if mask is not None:
            here = here & (tl.load(mask + t, mask=here, other=0) != 0)
        count += here.to(tl.float32)
        total += tl.load(x + t, mask=here, other=0.0).to(tl.float32)
    n = tl.sum(count, 0)
    mean = tl.sum(total, 0) / tl.maximum(n, 1.0)
    squares = tl.zeros([BLOCK], tl.float32)
    for i in range(0, tokens, BLOCK):
        t = i + tl.arange(0, BLOCK)
        here = t < tokens
        if mask is not None:
            here = here & (tl.load(mask + t, mask=here, other=0) != 0)
        d = tl.where(here, tl.load(x + t, mask=here, other=0.0).to(tl.float32) - mean, 0.0)
        squares += d * d
    factor = 1.0 / tl.sqrt(tl.sum(squares, 0) / tl.maximum(n - 1.0, 1.0) + eps)
    for i in range(0, tokens, BLOCK):
        t = i + tl.arange(0, BLOCK)
        here = t < tokens
        if mask is not None:
            here = here & (tl.load(mask + t, mask=here, other=0) != 0)
        d = tl.load(x + t, mask=here, other=0.0).to(tl.float32) - mean
        tl.store(out + t, tl.where(here, d * factor, 0.0), mask=t < tokens)


WHITEN_CONFIG = {"BLOCK": 2048, "num_warps": 16, **FUSED}


# torch reads the longest length back, which no CUDA graph can hold
@torch.library.custom_op("carft::gae", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _gae(
    reward_T: Tensor, value_T: Tensor, cu_seqlens: Tensor, gamma: float, lam: float, via_triton: bool
) -> tuple[Tensor, Tensor]:
    log_implementation("gae", via_triton, reward_T.device.type)
    tokens, sequences = len(reward_T), cu_seqlens.numel() - 1
    check_offsets("cu_seqlens", cu_seqlens, tokens)
    dtype = accumulation_dtype(reward_T)
    if via_triton:
        advantage_T, return_T = (reward_T.new_empty(tokens, dtype=dtype) for _ in range(2))
        tensors = reward_T, value_T, cu_seqlens, advantage_T, return_T
        launch(gae_kernel, sequences, *tensors, tokens, gamma, gamma * lam, **SEQUENCE_CONFIG)
        return advantage_T, return_T
    reward_T, value_T = reward_T.to(dtype), value_T.to(dtype)
    if tokens == 0:
        return reward_T.clone(), value_T.clone()
    # One step per position counted from the end of the sequences, all sequences at once.
    cu_seqlens, wrong = usable_offsets(cu_seqlens, tokens)
    longest, sequence_T = int(cu_seqlens.diff().max()), sequence_index(cu_seqlens, tokens)
    back_T = cu_seqlens[1:][sequence_T] - 1 - torch.arange(tokens, device=reward_T.device)
    slot_T = back_T * sequences + sequence_T
    delta_LB = reward_T.new_zeros(longest * sequences)
    next_value_LB = delta_LB.clone()
    next_value_LB[slot_T] = value_T
    next_value_LB = next_value_LB.view(longest, -1).roll(1, 0)
    next_value_LB[0] = 0.0
    delta_LB[slot_T] = reward_T + gamma * next_value_LB.flatten()[slot_T] - value_T
    advantage_LB = delta_LB.view(longest, -1)
    for step in range(1, longest):
        advantage_LB[step] += gamma * lam * advantage_LB[step - 1]
    advantage_T = advantage_LB.flatten()[slot_T].masked_fill_(wrong, math.nan)
    return advantage_T, advantage_T + value_T


@_gae.register_fake
def _(reward_T: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    advantage_T = torch.empty_like(reward_T, dtype=accumulation_dtype(reward_T))
    return advantage_T, torch.empty_like(advantage_T)


@torch.library.custom_op("carft::kl_shaped_reward", mutates_args=())
def _kl_shaped_reward(
    score_B: Tensor, old_logprob_T: Tensor, ref_logprob_T: Tensor, cu_seqlens: Tensor, kl_coef: float, via_triton: bool
) -> Tensor:
    log_implementation("kl_shaped_reward", via_triton, old_logprob_T.device.type)
    check_offsets("cu_seqlens", cu_seqlens, len(old_logprob_T))
    dtype = accumulation_dtype(old_logprob_T)
    if via_triton:
        reward_T = torch.empty_like(old_logprob_T, dtype=dtype)
        tensors = score_B, old_logprob_T, ref_logprob_T, cu_seqlens, reward_T
        launch(kl_shaped_reward_kernel, len(score_B), *tensors, len(reward_T), kl_coef, **SEQUENCE_CONFIG)
        return reward_T
    reward_T = -kl_coef * (old_logprob_T.to(dtype) - ref_logprob_T.to(dtype))
    if len(reward_T) == 0:
        return reward_T
    cu_seqlens, wrong = usable_offsets(cu_seqlens, len(reward_T))
    # an empty sequence adds 0 to another one's last token, or to the first
    last_B = (cu_seqlens[1:] - 1).clamp(min=0)
    last_score_B = torch.where(cu_seqlens.diff() > 0, score_B.to(dtype), 0.0)
    return reward_T.index_add_(0, last_B, last_score_B).masked_fill_(wrong, math.nan)


@_kl_shaped_reward.register_fake
def _(score_B: Tensor, old_logprob_T: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(old_logprob_T, dtype=accumulation_dtype(old_logprob_T))


@torch.library.custom_op("carft::whiten", mutates_args=())
def _whiten(x_T: Tensor, mask_T: Tensor | None, eps: float, via_triton: bool) -> Tensor:
    """This process alone."""
    log_implementation("whiten", via_triton, x_T.device.type)
    if not via_triton:
        return _whiten_torch(x_T, mask_T, eps, None)
    out_T = torch.empty_like(x_T, dtype=torch.float32)
    mask = None if mask_T is None else mask_T.view(torch.uint8)
    launch(whiten_kernel, 1, x_T, mask, out_T, len(x_T), eps, **WHITEN_CONFIG)
    return out_T


@_whiten.register_fake
def _(x_T: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x_T, dtype=accumulation_dtype(x_T))


def _whiten_torch(x_T: Tensor, mask_T: Tensor | None, eps: float, group: dist.ProcessGroup | None) -> Tensor:
    x_T = x_T.to(accumulation_dtype(x_T))
    if mask_T is not None:
        x_T = torch.where(mask_T, x_T, 0.0)
    count = x_T.new_tensor(len(x_T)) if mask_T is None else mask_T.sum().to(x_T.dtype)
    count_sum = torch.stack([count, x_T.sum()])
    if group is not None:
        dist.all_reduce(count_sum, group=group)
    count, mean = count_sum[0], count_sum[1] / count_sum[0].clamp(min=1)
    centred_T = x_T - mean if mask_T is None else torch.where(mask_T, x_T - mean, 0.0)
    squares = centred_T.square().sum()
    if group is not None:
        dist.all_reduce(squares, group=group)
    return centred_T.mul_((squares / (count - 1).clamp(min=1) + eps).rsqrt())


@torch.no_grad()
def gae(
    reward_T: Tensor, value_T: Tensor, cu_seqlens: Tensor, *, gamma: float, lam: float, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates of packed sequences.

    Equivalent, from the last token of each sequence to its first: `A[t] = r[t] + gamma * v[t + 1] - v[t] + gamma *
    lam * A[t + 1]`, with `v` and `A` zero after the last token; `return_ = A + v`.

    Args:
        reward_T, value_T: float [T].
        cu_seqlens: int64 or int32 [B + 1], offsets of the sequences, from 0 to T. Wrong ones are an error where index
            ranges are checked (`set_index_checks`); elsewhere every number of the result is NaN.
        gamma, lam: discount and GAE lambda, in [0, 1].
        impl: "auto" (Triton on CUDA, torch elsewhere and for float64), "triton" or "torch".

    Returns:
        advantage [T] and return [T], float32 (float64 for float64 rewards), without gradient.

    Source: Schulman et al. 2016, as in ReFT and paper section 3.2.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    check_float("reward_T", reward_T, 1)
    check_float("value_T", value_T, 1)
    tokens = len(reward_T)
    check_like("value_T", value_T, (tokens,), "reward_T", reward_T)
    check_cu_seqlens("cu_seqlens", cu_seqlens, "reward_T", reward_T)
    for name, x in (("gamma", gamma), ("lam", lam)):
        if not 0 <= x <= 1:
            raise ValueError(f"{name} = {x}: expected a number in [0, 1]")
    via_triton = use_triton("gae", impl, reward_T)
    return _gae(reward_T.contiguous(), value_T.contiguous(), cu_seqlens.contiguous(), gamma, lam, via_triton)


@torch.no_grad()
def kl_shaped_reward(
    score_B: Tensor,
    old_logprob_T: Tensor,
    ref_logprob_T: Tensor,
    cu_seqlens: Tensor,
    *,
    kl_coef: float,
    impl: Impl = "auto",
) -> Tensor:
    """Per-token reward: minus the KL penalty everywhere, plus the sequence's score at its last token.

    Equivalent: `r = -kl_coef * (old_logprob - ref_logprob)`; `r[cu_seqlens[1:] - 1] += score`.

    Args:
        score_B: float [B], terminal score of each sequence; that of an empty sequence is dropped.
        old_logprob_T, ref_logprob_T: float [T], log-probs of the sampling policy and of the reference.
        cu_seqlens: int64 or int32 [B + 1], offsets of the sequences, from 0 to T. Wrong ones are an error where index
            ranges are checked (`set_index_checks`); elsewhere every number of the result is NaN.
        kl_coef: weight of the penalty, at least 0.
        impl: "auto" (Triton on CUDA, torch elsewhere and for float64), "triton" or "torch".

    Returns:
        reward [T], float32 (float64 for float64 log-probs), without gradient.

    Source: ReFT, paper section 3.2.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    check_float("old_logprob_T", old_logprob_T, 1)
    tokens = len(old_logprob_T)
    check_float("ref_logprob_T", ref_logprob_T, 1)
    check_like("ref_logprob_T", ref_logprob_T, (tokens,), "old_logprob_T", old_logprob_T)
    check_cu_seqlens("cu_seqlens", cu_seqlens, "old_logprob_T", old_logprob_T)
    check_like("score_B", score_B, (cu_seqlens.numel() - 1,), "cu_seqlens", old_logprob_T)
    check_finite("kl_coef", kl_coef, least=0)
    via_triton = use_triton("kl_shaped_reward", impl, old_logprob_T)
    old_logprob_T, ref_logprob_T, score_B = (x.contiguous() for x in (old_logprob_T, ref_logprob_T, score_B))
    return _kl_shaped_reward(score_B, old_logprob_T, ref_logprob_T, cu_seqlens.contiguous(), kl_coef, via_triton)


@torch.no_grad()
def whiten(
    x_T: Tensor,
    mask_T: Tensor | None = None,
    *,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the masked tokens of every rank.

    Equivalent on one rank: `(x - x[mask].mean()) * (x[mask].var() + eps).rsqrt()`, 0 outside the mask.

    Args:
        x_T: float [T]; T may differ between ranks, and be 0.
        mask_T: bool [T], the tokens that count; all when None.
        eps: added to the variance, above 0: constant input becomes 0.
        group: process group whose ranks share the statistics (torch operations around two all-reduces); this process
            alone when None.
        impl: "auto" (Triton on CUDA, torch elsewhere and for float64), "triton" or "torch".

    Returns:
        [T], float32 (float64 for float64 input), without gradient. With fewer than two counted tokens the variance is
        taken as 0.

    Source: the whitening of PPO trainers; the mean is removed.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    check_float("x_T", x_T, 1)
    if mask_T is not None:
        check_like("mask_T", mask_T, tuple(x_T.shape), "x_T", x_T)
        check_bool("mask_T", mask_T)
        mask_T = mask_T.contiguous()
    check_positive("eps", eps)
    via_triton = use_triton("whiten", impl, x_T)
    if group is not None:
        return _whiten_torch(x_T, mask_T, eps, group)
    whitened_T: Tensor = call(_whiten, x_T.contiguous(), mask_T, eps, via_triton)
    return whitened_T
