"""Pool hidden states of each sequence, weighted by the softmax of their values.

    w_t = softmax over the sequence's masked tokens of value_t,   pooled_b = sum_t w_t hidden_t

Source: paper eq. 6, before its projection: the projection is linear and the weights sum to 1, so it is applied to
pooled_b and the [tokens, embedding] tensor never exists. Kept for backward: hidden, weights, pooled. Accumulation:
float32 (float64 for float64 input). Bytes: forward reads each hidden state once, backward reads each once and writes
its gradient once; a token without weight is not read. With g the gradient of pooled_b:

    d_hidden_t = w_t g,   d_value_t = w_t (hidden_t - pooled_b) . g
"""

# mypy: disable-error-code="no-untyped-def"

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from carft_kernels._row_kernels import SEQUENCE_CONFIG, offsets_rise, sequence_bounds
from carft_kernels._runtime import (
    FUSED,
    Impl,
    accumulation_dtype,
    check_bool,
    check_cu_seqlens,
    check_float,
    check_like,
    check_offsets,
    check_rows,
    launch,
    log_implementation,
    sequence_index,
    usable_offsets,
    use_triton,
)


def value_pool_reference(
    hidden_TD: Tensor, value_T: Tensor, cu_seqlens: Tensor, *, mask_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The obvious expression, a loop over sequences."""
    pooled, weights = [], []
    for s, e in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        mask = torch.ones_like(value_T[s:e], dtype=torch.bool) if mask_T is None else mask_T[s:e]
        w = value_T[s:e].masked_fill(~mask, float("-inf")).softmax(0) if mask.any() else torch.zeros_like(value_T[s:e])
        pooled.append((w[:, None] * hidden_TD[s:e]).sum(0))
        weights.append(w)
    return torch.stack(pooled), torch.cat(weights)


@triton.jit(do_not_specialize=["tokens"])
def value_pool_weight_kernel(value, mask, cu_seqlens, weight, tokens, BLOCK: tl.constexpr):
    """One program a sequence: softmax of its values. Every weight is NaN where an offset is wrong."""
    start, end = sequence_bounds(cu_seqlens, tokens)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(start, end, BLOCK):
        t = i + tl.arange(0, BLOCK)
        inside = t < end
        if mask is not None:
            inside = inside & (tl.load(mask + t, mask=inside, other=0) != 0)
        v = tl.load(value + t, mask=inside, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, v)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.exp(v - shift)
        top = new_top
    largest = tl.max(top, 0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    denominator = tl.sum(total * tl.exp(top - shift), 0)
    inverse = 1.0 / tl.where(denominator == 0.0, 1.0, denominator)
    inverse = tl.where(offsets_rise(cu_seqlens, tokens), inverse, float("nan"))
    for i in range(start, end, BLOCK):
        t = i + tl.arange(0, BLOCK)
        inside = t < end
        counted = inside
        if mask is not None:
            counted = inside & (tl.load(mask + t, mask=inside, other=0) != 0)
        v = tl.load(value + t, mask=counted, other=float("-inf")).to(tl.float32)
        tl.store(weight + t, tl.exp(v - shift) * inverse, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def value_pool_fwd_kernel(
    hidden, weight, cu_seqlens, pooled, tokens, width, stride, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program a sequence and a slice of the hidden dimension."""
    b = tl.program_id(0).to(tl.int64)
    start, end = sequence_bounds(cu_seqlens, tokens)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < width
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for i in range(start, end, BLOCK_T):
        t = i + tl.arange(0, BLOCK_T)
        w = tl.load(weight + t, mask=t < end, other=0.0)
        # a token without weight is not read: whatever it holds takes no part
        here = (w != 0.0)[:, None] & inside[None, :]
        h = tl.load(hidden + t[:, None] * stride + column[None, :], mask=here, other=0.0).to(tl.float32)
        acc += w[:, None] * h
    tl.store(pooled + b * width + column, tl.sum(acc, 0), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def value_pool_bwd_kernel(
    hidden,
    weight,
    d_pooled,
    pooled,
    cu_seqlens,
    d_hidden,
    d_value,
    tokens,
    width,
    stride,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a sequence and every so many of its tokens; the sequence's gradient stays in registers."""
    b = tl.program_id(0).to(tl.int64)
    start, end = sequence_bounds(cu_seqlens, tokens)
    column = tl.arange(0, BLOCK_D)
    inside = column < width
    g = tl.load(d_pooled + b * width + column, mask=inside, other=0.0)
    mean = tl.load(pooled + b * width + column, mask=inside, other=0.0)
    for i in range(start + tl.program_id(1) * BLOCK_T, end, tl.num_programs(1) * BLOCK_T):
        t = i + tl.arange(0, BLOCK_T)
        w = tl.load(weight + t, mask=t < end, other=0.0)
        here = (w != 0.0)[:, None] & inside[None, :]
        h = tl.load(hidden + t[:, None] * stride + column[None, :], mask=here, other=0.0).to(tl.float32)
        # the difference first: a token that holds all the weight is its own mean
        along = tl.sum((h - mean[None, :]) * g[None, :], 1)
        tl.store(d_value + t, tl.where(w != 0.0, w * along, 0.0), mask=t < end)
        d = w[:, None] * g[None, :]
        place = d_hidden + t[:, None] * width + column[None, :]
        tl.store(place, d.to(d_hidden.dtype.element_ty), mask=(t < end)[:, None] & inside[None, :])


def forward_config(dtype: torch.dtype) -> dict[str, int]:
    """8 warps, each reading one token's 128-bit vectors at a time."""
    return {"BLOCK_T": 16, "BLOCK_D": 32 * 16 // dtype.itemsize, "num_warps": 8, **FUSED}


def backward_config(width: int) -> dict[str, int]:
    """A whole hidden state at a time: 8 or 16 warps so that its registers stay few."""
    block = max(triton.next_power_of_2(width), 256)
    return {"BLOCK_T": max(1, 4096 // block), "BLOCK_D": block, "num_warps": 8 if block <= 4096 else 16, **FUSED}


def backward_splits(tokens: int, sequences: int) -> int:
    """Programs a sequence, of 16 tokens or more: enough for four on each of an H100's 132 SMs, where as many fit.

    Each reads two float32 vectors of its sequence, for all but the first from the L2 cache: an eighth of its requests
    at 16 tokens of half precision.
    """
    return max(1, min(triton.cdiv(528, sequences), tokens // (16 * sequences)))


@torch.library.custom_op("carft::value_pool", mutates_args=())
def _forward(
    hidden_TD: Tensor, value_T: Tensor, cu_seqlens: Tensor, mask_T: Tensor | None, via_triton: bool
) -> tuple[Tensor, Tensor]:
    """pooled [B, D], weights [T]."""
    log_implementation("value_pool", via_triton, hidden_TD.device.type)
    tokens, width = hidden_TD.shape
    check_offsets("cu_seqlens", cu_seqlens, tokens)
    sequences = cu_seqlens.numel() - 1
    dtype = accumulation_dtype(hidden_TD)
    if via_triton:
        weight_T = hidden_TD.new_empty(tokens, dtype=dtype)
        pooled_BD = hidden_TD.new_empty(sequences, width, dtype=dtype)
        mask = None if mask_T is None else mask_T.view(torch.uint8)
        vectors = value_T, mask, cu_seqlens, weight_T
        launch(value_pool_weight_kernel, sequences, *vectors, tokens, **SEQUENCE_CONFIG)
        options = forward_config(hidden_TD.dtype)
        grid = sequences, triton.cdiv(width, options["BLOCK_D"])
        tensors = hidden_TD, weight_T, cu_seqlens, pooled_BD
        launch(value_pool_fwd_kernel, grid, *tensors, tokens, width, hidden_TD.stride(0), **options)
        return pooled_BD, weight_T
    cu_seqlens, wrong = usable_offsets(cu_seqlens, tokens)
    sequence_T = sequence_index(cu_seqlens, tokens)
    value_T = value_T.to(dtype)
    if mask_T is not None:
        value_T = value_T.masked_fill(~mask_T, float("-inf"))
    top_B = value_T.new_full((sequences,), float("-inf")).scatter_reduce_(0, sequence_T, value_T, "amax")
    top_B.masked_fill_(top_B == float("-inf"), 0.0)  # a sequence without masked tokens: exp(-inf - 0) = 0
    weight_T = (value_T - top_B[sequence_T]).exp()
    sum_B = weight_T.new_zeros(sequences).index_add_(0, sequence_T, weight_T)
    weight_T = (weight_T / sum_B.masked_fill(sum_B == 0, 1.0)[sequence_T]).masked_fill_(wrong, math.nan)
    pooled_BD = hidden_TD.new_zeros(sequences, width, dtype=dtype)
    return pooled_BD.index_add_(0, sequence_T, weight_T[:, None] * hidden_TD.to(dtype)), weight_T


@_forward.register_fake
def _(hidden_TD: Tensor, value_T: Tensor, cu_seqlens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(hidden_TD)
    pooled_BD = hidden_TD.new_empty(cu_seqlens.shape[0] - 1, hidden_TD.shape[1], dtype=dtype)
    return pooled_BD, hidden_TD.new_empty(hidden_TD.shape[0], dtype=dtype)


@torch.library.custom_op("carft::value_pool_backward", mutates_args=())
def _backward(
    hidden_TD: Tensor, weight_T: Tensor, pooled_BD: Tensor, d_pooled_BD: Tensor, cu_seqlens: Tensor, via_triton: bool
) -> tuple[Tensor, Tensor]:
    """d_hidden [T, D], d_value [T] in the dtype of the weights."""
    tokens, width = hidden_TD.shape
    if via_triton:
        d_hidden_TD = torch.empty(hidden_TD.shape, dtype=hidden_TD.dtype, device=hidden_TD.device)
        d_value_T = torch.empty_like(weight_T)
        sequences = cu_seqlens.numel() - 1
        if sequences and tokens:
            tensors = hidden_TD, weight_T, d_pooled_BD, pooled_BD, cu_seqlens, d_hidden_TD, d_value_T
            sizes = tokens, width, hidden_TD.stride(0)
            programs = sequences, backward_splits(tokens, sequences)
            launch(value_pool_bwd_kernel, programs, *tensors, *sizes, **backward_config(width))
        return d_hidden_TD, d_value_T
    sequence_T = sequence_index(usable_offsets(cu_seqlens, tokens)[0], tokens)
    g_TD = d_pooled_BD[sequence_T]
    # the difference first: a token that holds all the weight is its own mean
    d_value_T = weight_T * ((hidden_TD - pooled_BD[sequence_T]) * g_TD).sum(-1)
    return (weight_T[:, None] * g_TD).to(hidden_TD.dtype), d_value_T


@_backward.register_fake
def _(hidden_TD: Tensor, weight_T: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(hidden_TD.shape, dtype=hidden_TD.dtype, device=hidden_TD.device), torch.empty_like(weight_T)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_TD, value_T, cu_seqlens, _, ctx.via_triton = inputs
    pooled_BD, weight_T = output
    ctx.value_dtype = value_T.dtype
    ctx.set_materialize_grads(False)  # no zeros for the output that carries no gradient
    ctx.mark_non_differentiable(weight_T)
    ctx.save_for_backward(hidden_TD, weight_T, pooled_BD, cu_seqlens)


def _autograd(ctx: Any, d_pooled_BD: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if d_pooled_BD is None:
        return (None,) * 5
    hidden_TD, weight_T, pooled_BD, cu_seqlens = ctx.saved_tensors
    d_hidden_TD, d_value_T = _backward(
        hidden_TD, weight_T, pooled_BD, d_pooled_BD.contiguous(), cu_seqlens, ctx.via_triton
    )
    return d_hidden_TD, d_value_T.to(ctx.value_dtype), None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def value_pool(
    hidden_TD: Tensor, value_T: Tensor, cu_seqlens: Tensor, *, mask_T: Tensor | None = None, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Value-weighted mean of each packed sequence's hidden states.

    Equivalent, for each sequence [s, e): `w = value[s:e].masked_fill(~mask[s:e], -inf).softmax(0)`;
    `pooled = w @ hidden[s:e]`.

    Args:
        hidden_TD: float [T, D], any float dtype.
        value_T: float [T].
        cu_seqlens: int64 or int32 [B + 1], offsets of the sequences, from 0 to T. Wrong ones are an error where index
            ranges are checked (`set_index_checks`). Elsewhere every weight and every gradient is NaN, and so is pooled,
            but for a sequence that is left without tokens, which may be 0.
        mask_T: bool [T], the tokens that count; all when None.
        impl: "auto" (Triton on CUDA, torch elsewhere and for float64), "triton" or "torch".

    Returns:
        pooled [B, D] and weights [T], float32 (float64 for float64 input). Gradients of pooled to hidden and value;
        the weights carry none. A sequence with no token that counts has zero pooled, zero gradient and weights that
        sum to 0 instead of 1, which is how a caller sees it.

    Source: paper eq. 6.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    check_float("hidden_TD", hidden_TD, 2)
    via_triton = use_triton("value_pool", impl, hidden_TD)
    tokens = hidden_TD.shape[0]
    check_float("value_T", value_T, 1)
    check_like("value_T", value_T, (tokens,), "hidden_TD", hidden_TD)
    check_cu_seqlens("cu_seqlens", cu_seqlens, "hidden_TD", hidden_TD)
    if mask_T is not None:
        check_like("mask_T", mask_T, (tokens,), "hidden_TD", hidden_TD)
        check_bool("mask_T", mask_T)
        mask_T = mask_T.contiguous()
    if via_triton:
        check_rows("hidden_TD", hidden_TD)
    pooled_BD, weight_T = _forward(hidden_TD, value_T.contiguous(), cu_seqlens.contiguous(), mask_T, via_triton)
    return pooled_BD, weight_T
