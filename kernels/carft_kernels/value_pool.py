"""Pool hidden states of each sequence, weighted by the softmax of their values.

    w_t = softmax over the sequence's masked tokens of value_t,   pooled_b = sum_t w_t hidden_t

Source: paper eq. 6, before its projection: the projection is linear and the weights sum to 1, so it is applied to
pooled_b and the [tokens, embedding] tensor never exists. Kept for backward: hidden, weights, pooled. Accumulation:
float32 (float64 for float64 input). With g the gradient of pooled_b:

    d_hidden_t = w_t g,   d_value_t = w_t (hidden_t . g - pooled_b . g)
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from carft_kernels._runtime import (
    Impl,
    accumulation_dtype,
    check_bool,
    check_cu_seqlens,
    check_float,
    check_impl,
    check_like,
    sequence_index,
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


class _ValuePool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, value_T: Tensor, sequence_T: Tensor, mask_T: Tensor | None, sequences: int
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(hidden_TD)
        value_T = value_T.to(dtype)
        if mask_T is not None:
            value_T = value_T.masked_fill(~mask_T, float("-inf"))
        top_B = value_T.new_full((sequences,), float("-inf")).scatter_reduce_(0, sequence_T, value_T, "amax")
        top_B.masked_fill_(top_B == float("-inf"), 0.0)  # a sequence without masked tokens: exp(-inf - 0) = 0
        weight_T = (value_T - top_B[sequence_T]).exp()
        sum_B = weight_T.new_zeros(sequences).index_add_(0, sequence_T, weight_T)
        weight_T = weight_T / sum_B.masked_fill(sum_B == 0, 1.0)[sequence_T]
        pooled_BD = hidden_TD.new_zeros(sequences, hidden_TD.shape[1], dtype=dtype)
        pooled_BD.index_add_(0, sequence_T, weight_T[:, None] * hidden_TD.to(dtype))
        ctx.mark_non_differentiable(weight_T)
        ctx.save_for_backward(hidden_TD, weight_T, sequence_T, pooled_BD)
        return pooled_BD, weight_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_pooled_BD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_T, sequence_T, pooled_BD = ctx.saved_tensors
        g_TD = d_pooled_BD[sequence_T]
        mean_B = (pooled_BD * d_pooled_BD).sum(-1)
        d_value_T = weight_T * ((hidden_TD.to(g_TD.dtype) * g_TD).sum(-1) - mean_B[sequence_T])
        return (weight_T[:, None] * g_TD).to(hidden_TD.dtype), d_value_T, None, None, None


def value_pool(
    hidden_TD: Tensor, value_T: Tensor, cu_seqlens: Tensor, *, mask_T: Tensor | None = None, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Value-weighted mean of each packed sequence's hidden states.

    Equivalent, for each sequence [s, e): `w = value[s:e].masked_fill(~mask[s:e], -inf).softmax(0)`;
    `pooled = w @ hidden[s:e]`.

    Args:
        hidden_TD: float [T, D], any float dtype.
        value_T: float [T].
        cu_seqlens: int64 or int32 [B + 1], offsets of the sequences, from 0 to T.
        mask_T: bool [T], the tokens that count; all when None.
        impl: "auto" or "torch".

    Returns:
        pooled [B, D] and weights [T], float32 (float64 for float64 input). Gradients of pooled to hidden and value;
        the weights carry none. A sequence with no token that counts has zero pooled, zero gradient and weights that
        sum to 0 instead of 1, which is how a caller sees it.

    Source: paper eq. 6.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    check_impl("value_pool", impl)
    check_float("hidden_TD", hidden_TD, 2)
    tokens = hidden_TD.shape[0]
    check_float("value_T", value_T, 1)
    check_like("value_T", value_T, (tokens,), "hidden_TD", hidden_TD)
    check_cu_seqlens("cu_seqlens", cu_seqlens, tokens, "hidden_TD", hidden_TD)
    if mask_T is not None:
        check_like("mask_T", mask_T, (tokens,), "hidden_TD", hidden_TD)
        check_bool("mask_T", mask_T)
    # the cast is outside, so that autograd returns the value's gradient in its own dtype
    value_T = value_T.to(accumulation_dtype(hidden_TD))
    pooled_BD, weight_T = _ValuePool.apply(
        hidden_TD, value_T, sequence_index(cu_seqlens, tokens), mask_T, cu_seqlens.numel() - 1
    )
    return pooled_BD, weight_T
