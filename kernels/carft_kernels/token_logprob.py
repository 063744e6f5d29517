"""Log-prob (and entropy) of given tokens from their logits.

    logprob_t = x_t[target_t] - logsumexp_v x_t[v],   x = logits / temperature
    entropy_t = -sum_v p_t[v] log p_t[v],             p = softmax(x)

Kept for backward: the logits, logsumexp and entropy. Accumulation: float32 (float64 for float64 input). Bytes: forward
reads each logit once; backward reads each once and writes its gradient once, over the logit itself on request. Triton:
one program a row. Torch: rows in chunks, so the float32 copy of half-precision logits is never whole.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from carft_kernels._row_kernels import logprob_backward, logprob_forward, lse_of
from carft_kernels._runtime import (
    Impl,
    accumulation_dtype,
    check_float,
    check_ignore_index,
    check_integer,
    check_like,
    check_positive,
    check_rows,
    check_softcap,
    check_targets,
    chunk_size,
    d_logits_,
    given_gradients,
    gradient_or_nan,
    log_implementation,
    soft_cap_,
    soft_cap_reference,
    softmax_parts_,
    split_index,
    token_chunks,
    use_triton,
    zero_rows_,
)


def token_logprob_reference(
    logits_TV: Tensor,
    target_T: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor | None]:
    """The obvious expression."""
    counted_T = target_T != ignore_index
    logits_TV = torch.where(counted_T[:, None], logits_TV, 0.0)
    logits_TV = logits_TV.to(accumulation_dtype(logits_TV))
    if logit_softcap is not None:
        logits_TV = soft_cap_reference(logits_TV, logit_softcap)
    logp_TV = (logits_TV / temperature).log_softmax(-1)
    entropy_T = torch.special.entr(logp_TV.exp()).sum(-1) * counted_T if with_entropy else None
    return logp_TV.gather(1, target_T.long()[:, None] * counted_T[:, None])[:, 0] * counted_T, entropy_T


def _chunk_logits(
    logits_nV: Tensor, dtype: torch.dtype, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """A copy in `dtype` that may be overwritten, and the derivative of its soft cap where there is one."""
    if softcap is None:
        return logits_nV.to(dtype) / temperature, None
    x = logits_nV.to(dtype, copy=True)
    slope = soft_cap_(x, softcap)
    return x.div_(temperature), slope


@torch.library.custom_op("carft::token_logprob", mutates_args=())
def _forward(
    logits_TV: Tensor,
    target_T: Tensor,
    temperature: float,
    with_entropy: bool,
    with_lse: bool,
    logit_softcap: float | None,
    ignore_index: int,
    inplace: bool,
    via_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log-prob, entropy and log-sum-exp (empty unless asked), row maximum and log of the sum of exponentials below it.

    The last two serve this implementation's own backward: Triton keeps them in units of its own.
    """
    log_implementation("token_logprob", via_triton, logits_TV.device.type)
    tokens, vocabulary = logits_TV.shape
    check_targets("target_T", target_T, vocabulary, ignore_index)
    if via_triton:
        logprob_T, entropy_T, top_T, log_total_T = logprob_forward(
            logits_TV, target_T, temperature, with_entropy, ignore_index, logit_softcap
        )
        lse_T = lse_of(top_T, log_total_T) if with_lse else top_T.new_empty(0)
        return logprob_T, entropy_T, lse_T, top_T, log_total_T
    dtype = accumulation_dtype(logits_TV)
    logprob_T, top_T, log_total_T = (logits_TV.new_empty(tokens, dtype=dtype) for _ in range(3))
    entropy_T = logits_TV.new_empty(tokens if with_entropy else 0, dtype=dtype)
    target_T1, ignored_T, outside_T = split_index(target_T, vocabulary, ignore_index)
    for rows in token_chunks(tokens, chunk_size(tokens, vocabulary, logits_TV.device)):
        x, _ = _chunk_logits(logits_TV[rows], dtype, temperature, logit_softcap)
        logprob_T[rows], top_T[rows], exp, sum_exp = softmax_parts_(x, target_T1[rows])
        log_total_T[rows] = sum_exp.log()
        if with_entropy:
            entropy_T[rows] = torch.special.entr(exp.div_(sum_exp[:, None])).sum(-1)
    logprob_T.masked_fill_(outside_T, torch.nan)
    for x_T in (logprob_T, top_T, log_total_T, *([entropy_T] if with_entropy else [])):
        x_T.masked_fill_(ignored_T, 0.0)
    return logprob_T, entropy_T, top_T + log_total_T if with_lse else top_T.new_empty(0), top_T, log_total_T


@_forward.register_fake
def _(
    logits_TV: Tensor, target_T: Tensor, temperature: float, with_entropy: bool, with_lse: bool, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, dtype = logits_TV.shape[0], accumulation_dtype(logits_TV)
    logprob_T, top_T, log_total_T = (logits_TV.new_empty(tokens, dtype=dtype) for _ in range(3))
    entropy_T, lse_T = (logits_TV.new_empty(tokens if asked else 0, dtype=dtype) for asked in (with_entropy, with_lse))
    return logprob_T, entropy_T, lse_T, top_T, log_total_T


def _write_gradient(
    out_TV: Tensor,
    logits_TV: Tensor,
    target_T: Tensor,
    top_T: Tensor,
    log_total_T: Tensor,
    entropy_T: Tensor,
    d_logprob_T: Tensor,
    d_entropy_T: Tensor | None,
    d_lse_T: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    ignore_index: int,
    via_triton: bool,
) -> None:
    if via_triton:
        logprob_backward(
            logits_TV,
            out_TV,
            target_T,
            top_T,
            log_total_T,
            d_logprob_T,
            temperature,
            ignore_index,
            entropy_T=entropy_T,
            d_entropy_T=d_entropy_T,
            d_lse_T=d_lse_T,
            softcap=logit_softcap,
        )
        return
    target_T1, ignored_T, outside_T = split_index(target_T, logits_TV.shape[1], ignore_index)
    d_logprob_T = gradient_or_nan(d_logprob_T, outside_T)
    for rows in token_chunks(len(target_T), chunk_size(*logits_TV.shape, logits_TV.device)):
        x, slope = _chunk_logits(logits_TV[rows], top_T.dtype, temperature, logit_softcap)
        d_entropy_n, d_lse_n = (None if d is None else d[rows] for d in (d_entropy_T, d_lse_T))
        logp = x.sub_(top_T[rows, None]).sub_(log_total_T[rows, None])
        d = d_logits_(logp, target_T1[rows], d_logprob_T[rows], entropy_T[rows], d_entropy_n, d_lse_n)
        d.div_(temperature)
        out_TV[rows] = d if slope is None else d.mul_(slope)
    zero_rows_(out_TV, ignored_T)


@torch.library.custom_op("carft::token_logprob_backward", mutates_args=())
def _backward(
    logits_TV: Tensor,
    target_T: Tensor,
    top_T: Tensor,
    log_total_T: Tensor,
    entropy_T: Tensor,
    d_logprob_T: Tensor,
    d_entropy_T: Tensor | None,
    d_lse_T: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    ignore_index: int,
    via_triton: bool,
) -> Tensor:
    out_TV = torch.empty_like(logits_TV)
    tensors = (target_T, top_T, log_total_T, entropy_T, d_logprob_T, d_entropy_T, d_lse_T)
    _write_gradient(out_TV, logits_TV, *tensors, temperature, logit_softcap, ignore_index, via_triton)
    return out_TV


@_backward.register_fake
def _(logits_TV: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits_TV)


@torch.library.custom_op("carft::token_logprob_backward_", mutates_args=("logits_TV",))
def _backward_(
    logits_TV: Tensor,
    target_T: Tensor,
    top_T: Tensor,
    log_total_T: Tensor,
    entropy_T: Tensor,
    d_logprob_T: Tensor,
    d_entropy_T: Tensor | None,
    d_lse_T: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    ignore_index: int,
    via_triton: bool,
) -> None:
    tensors = (target_T, top_T, log_total_T, entropy_T, d_logprob_T, d_entropy_T, d_lse_T)
    _write_gradient(logits_TV, logits_TV, *tensors, temperature, logit_softcap, ignore_index, via_triton)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_TV, target_T, ctx.temperature, _, _, ctx.logit_softcap, ctx.ignore_index, *last = inputs
    ctx.inplace, ctx.via_triton = last
    _, entropy_T, _, top_T, log_total_T = output
    ctx.set_materialize_grads(False)  # no zeros for the outputs that carry no gradient
    ctx.mark_non_differentiable(top_T, log_total_T)
    ctx.save_for_backward(logits_TV, target_T, top_T, log_total_T, entropy_T)


def _autograd(
    ctx: Any, d_logprob_T: Tensor | None, d_entropy_T: Tensor | None, d_lse_T: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    logits_TV, *saved = ctx.saved_tensors
    given = given_gradients(d_logprob_T, d_entropy_T, d_lse_T, saved[1])
    arguments = (*saved, *given, ctx.temperature, ctx.logit_softcap, ctx.ignore_index, ctx.via_triton)
    if ctx.inplace:
        logits_TV = logits_TV.detach()
        _backward_(logits_TV, *arguments)
        return logits_TV, *([None] * 8)
    return _backward(logits_TV, *arguments), *([None] * 8)


_forward.register_autograd(_autograd, setup_context=_setup_context)


@overload
def token_logprob(
    logits_TV: Tensor,
    target_T: Tensor,
    *,
    temperature: float = ...,
    with_entropy: bool = ...,
    with_lse: Literal[False] = ...,
    logit_softcap: float | None = ...,
    ignore_index: int = ...,
    inplace_backward: bool = ...,
    impl: Impl = ...,
) -> tuple[Tensor, Tensor | None]: ...


@overload
def token_logprob(
    logits_TV: Tensor,
    target_T: Tensor,
    *,
    temperature: float = ...,
    with_entropy: bool = ...,
    with_lse: Literal[True],
    logit_softcap: float | None = ...,
    ignore_index: int = ...,
    inplace_backward: bool = ...,
    impl: Impl = ...,
) -> tuple[Tensor, Tensor | None, Tensor]: ...


def token_logprob(
    logits_TV: Tensor,
    target_T: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    with_lse: bool = False,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    """Log-prob of `target_T` under softmax(logits / temperature), and its entropy if asked.

    Equivalent: `(logits.float() / temperature).log_softmax(-1).gather(1, target[:, None])[:, 0]`, which is
    `-cross_entropy(logits.float() / temperature, target, reduction="none", ignore_index=ignore_index)`.

    Args:
        logits_TV: float [T, V], any float dtype; -inf columns are allowed (a masked vocabulary).
        target_T: int64 or int32 [T], values in [0, V) or `ignore_index`. Others raise where index checks are on (see
            `set_index_checks`); where they are off they give a log-prob of NaN.
        temperature: divides the logits; above 0.
        with_entropy: also return the entropy (nats), differentiable.
        with_lse: also return logsumexp(logits / temperature), differentiable; such as for a z-loss, its square.
        logit_softcap: cap: the logits are cap * tanh(logits / cap), before the temperature; -inf stays -inf. Above 0.
        ignore_index: a token with this target takes no part, whatever its row of logits holds. Its log-prob and entropy
            are 0 and it gives no gradient to anything, as in `torch.nn.functional.cross_entropy`.
        inplace_backward: backward overwrites the logits with their gradient; they must not be used afterwards. It is
            ignored for rows that share memory, and under torch.compile, which plans memory itself.
        impl: "auto" (Triton on CUDA, torch elsewhere and for float64), "triton" or "torch".

    Returns:
        log-prob [T] and entropy [T] or None, with `with_lse` the logsumexp [T] as a third; float32 (float64 for float64
        logits). Gradient to the logits only.

    Source: selective log-softmax of RLHF trainers; with entropy, its derivative in closed form.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    check_float("logits_TV", logits_TV, 2)
    via_triton = use_triton("token_logprob", impl, logits_TV)
    check_like("target_T", target_T, (logits_TV.shape[0],), "logits_TV", logits_TV)
    check_integer("target_T", target_T)
    check_positive("temperature", temperature)
    check_softcap(logit_softcap)
    check_ignore_index(ignore_index)
    if via_triton:
        check_rows("logits_TV", logits_TV)
    apart = len(logits_TV) < 2 or logits_TV.stride(0) >= logits_TV.shape[1]
    inplace = inplace_backward and apart and not torch.compiler.is_compiling()
    options = (temperature, with_entropy, with_lse, logit_softcap, ignore_index, inplace, via_triton)
    logprob_T, entropy_T, lse_T, *_ = _forward(logits_TV, target_T.contiguous(), *options)
    found = logprob_T, entropy_T if with_entropy else None
    return (*found, lse_T) if with_lse else found
