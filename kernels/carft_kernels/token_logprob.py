"""Log-prob (and entropy) of given tokens from their logits.

    logprob_t = x_t[target_t] - logsumexp_v x_t[v],   x = logits / temperature
    entropy_t = -sum_v p_t[v] log p_t[v],             p = softmax(x)

Kept for backward: the logits, logsumexp and entropy. Accumulation: float32 (float64 for float64 input). Rows are taken
in chunks, so the float32 copy of half-precision logits is never whole.
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
    chunk_size,
    softmax_parts_,
)


def token_logprob_reference(
    logits_TV: Tensor, target_T: Tensor, *, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The obvious expression."""
    logp_TV = (logits_TV.to(accumulation_dtype(logits_TV)) / temperature).log_softmax(-1)
    entropy_T = torch.special.entr(logp_TV.exp()).sum(-1) if with_entropy else None
    return logp_TV.gather(1, target_T.long()[:, None])[:, 0], entropy_T


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, target_T: Tensor, temperature: float, with_entropy: bool, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(logits_TV)
        tokens, vocabulary = logits_TV.shape
        logprob_T = logits_TV.new_empty(tokens, dtype=dtype)
        lse_T, entropy_T = torch.empty_like(logprob_T), torch.zeros_like(logprob_T)
        step = chunk_size(tokens, vocabulary, logits_TV.device)
        for s in range(0, tokens, step):
            e = s + step
            x = logits_TV[s:e].to(dtype) / temperature
            top = x.amax(-1)
            logprob_T[s:e], exp, sum_exp = softmax_parts_(x, target_T[s:e, None])
            lse_T[s:e] = top + sum_exp.log()
            if with_entropy:
                entropy_T[s:e] = torch.special.entr(exp.div_(sum_exp[:, None])).sum(-1)
        ctx.save_for_backward(logits_TV, target_T, lse_T, entropy_T)
        ctx.temperature, ctx.with_entropy, ctx.inplace = temperature, with_entropy, inplace
        return logprob_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprob_T: Tensor, d_entropy_T: Tensor) -> tuple[Tensor | None, ...]:
        logits_TV, target_T, lse_T, entropy_T = ctx.saved_tensors
        d_logits_TV = logits_TV if ctx.inplace else torch.empty_like(logits_TV)
        step = chunk_size(len(target_T), logits_TV.shape[1], logits_TV.device)
        for s in range(0, len(target_T), step):
            e = s + step
            logp = (logits_TV[s:e].to(lse_T.dtype) / ctx.temperature).sub_(lse_T[s:e, None])
            d = -d_logprob_T[s:e, None] * logp.exp()
            if ctx.with_entropy:
                p = logp.exp()
                # p (log p + H) is 0 where p is 0, though log p is -inf there
                d -= d_entropy_T[s:e, None] * torch.where(p > 0, p * (logp + entropy_T[s:e, None]), 0.0)
            d.scatter_add_(1, target_T[s:e, None], d_logprob_T[s:e, None])
            d_logits_TV[s:e] = d.div_(ctx.temperature)
        return d_logits_TV, None, None, None, None


def token_logprob(
    logits_TV: Tensor,
    target_T: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    inplace_backward: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of `target_T` under softmax(logits / temperature), and its entropy if asked.

    Equivalent: `(logits.float() / temperature).log_softmax(-1).gather(1, target[:, None])[:, 0]`.

    Args:
        logits_TV: float [T, V], any float dtype; -inf columns are allowed (a masked vocabulary).
        target_T: int64 or int32 [T], values in [0, V).
        temperature: divides the logits; above 0.
        with_entropy: also return the entropy (nats), differentiable.
        inplace_backward: backward overwrites the logits with their gradient; they must not be used afterwards.
        impl: "auto" or "torch".

    Returns:
        log-prob [T] and entropy [T] or None, float32 (float64 for float64 logits). Gradient to the logits only.

    Source: selective log-softmax of RLHF trainers; with entropy, its derivative in closed form.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    check_impl("token_logprob", impl)
    check_float("logits_TV", logits_TV, 2)
    check_like("target_T", target_T, (logits_TV.shape[0],), "logits_TV", logits_TV)
    check_index("target_T", target_T, logits_TV.shape[1])
    check_positive("temperature", temperature)
    logprob_T, entropy_T = _TokenLogprob.apply(logits_TV, target_T.long(), temperature, with_entropy, inplace_backward)
    return logprob_T, entropy_T if with_entropy else None
