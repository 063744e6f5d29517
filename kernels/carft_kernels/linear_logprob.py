"""Log-prob (and entropy) of given tokens from hidden states, never holding [tokens, vocabulary].

    x_t = (hidden_t weight^T + bias) / temperature, then as token_logprob

Kept for backward: the inputs. Tokens go by in chunks whose logits fit the cache; backward recomputes them. Cost in
units of F = 2 T V D: 1 without gradient, 4 with. Accumulation: float32 for d_weight and for everything past the
matmul (float64 for float64 input). Half-precision matmuls run in their own dtype, on the weight as it is: only a
chunk's logits are widened, never the weight.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from carft_kernels._runtime import (
    Impl,
    accumulation_dtype,
    check_float,
    check_impl,
    check_index,
    check_like,
    check_positive,
    check_same_dtype,
    chunk_size,
    softmax_parts_,
)


def linear_logprob_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The obvious expression: all logits at once."""
    logits_TV = torch.nn.functional.linear(hidden_TD, weight_VD, bias)
    logp_TV = (logits_TV.to(accumulation_dtype(logits_TV)) / temperature).log_softmax(-1)
    entropy_T = torch.special.entr(logp_TV.exp()).sum(-1) if with_entropy else None
    return logp_TV.gather(1, target_T.long()[:, None])[:, 0], entropy_T


def _chunk_logits(h: Tensor, weight_VD: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    x = torch.nn.functional.linear(h, weight_VD, bias).to(accumulation_dtype(h))
    return x if temperature == 1.0 else x.div_(temperature)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        target_T: Tensor,
        bias: Tensor | None,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        tokens = hidden_TD.shape[0]
        logprob_T = hidden_TD.new_empty(tokens, dtype=accumulation_dtype(hidden_TD))
        entropy_T = torch.zeros_like(logprob_T)
        step = chunk_size(tokens, weight_VD.shape[0], hidden_TD.device)
        for s in range(0, tokens, step):
            e = s + step
            x = _chunk_logits(hidden_TD[s:e], weight_VD, bias, temperature)
            logprob_T[s:e], exp, sum_exp = softmax_parts_(x, target_T[s:e, None])
            if with_entropy:
                entropy_T[s:e] = torch.special.entr(exp.div_(sum_exp[:, None])).sum(-1)
        ctx.save_for_backward(hidden_TD, weight_VD, target_T, bias)
        ctx.temperature, ctx.with_entropy = temperature, with_entropy
        return logprob_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprob_T: Tensor, d_entropy_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, target_T, bias = ctx.saved_tensors
        need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        dtype = accumulation_dtype(hidden_TD)
        d_hidden_TD = torch.zeros_like(hidden_TD) if need_hidden else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if need_weight else None
        d_bias_V = torch.zeros_like(bias, dtype=dtype) if need_bias else None
        step = chunk_size(hidden_TD.shape[0], weight_VD.shape[0], hidden_TD.device)
        for s in range(0, hidden_TD.shape[0], step):
            e = s + step
            logp = _chunk_logits(hidden_TD[s:e], weight_VD, bias, ctx.temperature)
            logp.sub_(logp.logsumexp(-1, keepdim=True))
            if ctx.with_entropy:
                p = logp.exp()
                entropy = torch.special.entr(p).sum(-1, keepdim=True)
                d = torch.where(p > 0, p * (logp + entropy), 0.0).mul_(-d_entropy_T[s:e, None])
                d.sub_(p.mul_(d_logprob_T[s:e, None]))
            else:
                d = logp.exp_().mul_(-d_logprob_T[s:e, None])
            d.scatter_add_(1, target_T[s:e, None], d_logprob_T[s:e, None])
            if ctx.temperature != 1.0:
                d.div_(ctx.temperature)
            if d_bias_V is not None:
                d_bias_V += d.sum(0)
            d = d.to(hidden_TD.dtype)
            if d_hidden_TD is not None:
                d_hidden_TD[s:e] = d @ weight_VD
            if d_weight_VD is not None:
                if d_weight_VD.dtype == d.dtype:
                    d_weight_VD.addmm_(d.T, hidden_TD[s:e])
                else:
                    d_weight_VD += d.T @ hidden_TD[s:e]
        return (
            d_hidden_TD,
            None if d_weight_VD is None else d_weight_VD.to(weight_VD.dtype),
            None,
            None if d_bias_V is None else d_bias_V.to(bias.dtype),
            None,
            None,
        )


def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of `target_T` under softmax((hidden @ weight.T + bias) / temperature), and its entropy if asked.

    Equivalent: `((hidden @ weight.T + bias).float() / temperature).log_softmax(-1).gather(1, target[:, None])[:, 0]`.

    Args:
        hidden_TD: float [T, D], any float dtype.
        weight_VD: [V, D], dtype and device of `hidden_TD`.
        target_T: int64 or int32 [T], values in [0, V).
        bias: [V], dtype and device of `hidden_TD`.
        temperature: divides the logits; above 0.
        with_entropy: also return the entropy (nats), differentiable.
        impl: "auto" or "torch".

    Returns:
        log-prob [T] and entropy [T] or None, float32 (float64 for float64 input). Gradients to hidden, weight, bias.

    Source: selective log-softmax of RLHF trainers; chunked over tokens as in fused linear cross-entropy.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    check_impl("linear_logprob", impl)
    check_float("hidden_TD", hidden_TD, 2)
    check_float("weight_VD", weight_VD, 2)
    check_like("weight_VD", weight_VD, (weight_VD.shape[0], hidden_TD.shape[1]), "hidden_TD", hidden_TD)
    check_same_dtype("weight_VD", weight_VD, "hidden_TD", hidden_TD)
    if bias is not None:
        check_like("bias", bias, (weight_VD.shape[0],), "weight_VD", hidden_TD)
        check_same_dtype("bias", bias, "hidden_TD", hidden_TD)
    check_like("target_T", target_T, (hidden_TD.shape[0],), "hidden_TD", hidden_TD)
    check_index("target_T", target_T, weight_VD.shape[0])
    check_positive("temperature", temperature)
    logprob_T, entropy_T = _LinearLogprob.apply(hidden_TD, weight_VD, target_T.long(), bias, temperature, with_entropy)
    return logprob_T, entropy_T if with_entropy else None
