"""Log-prob (and entropy) of given tokens from their logits.

    logprob_t = x_t[target_t] - logsumexp_v x_t[v],   x = logits / temperature
    entropy_t = -sum_v p_t[v] log p_t[v],             p = softmax(x)

Kept for backward: the logits, logsumexp and entropy. Accumulation: float32 (float64 for float64 input). Bytes: forward
reads each logit once; backward reads each once and writes its gradient once, over the logit itself on request. Triton:
one program a row. Torch: rows in chunks, so the float32 copy of half-precision logits is never whole.
"""

from collections.abc import Iterator
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
    check_top,
    chunk_size,
    d_logits_,
    entropy_reference,
    given_gradients,
    gradient_or_nan,
    keep_top_,
    keep_top_reference,
    log_implementation,
    soft_cap_,
    soft_cap_reference,
    softmax_parts_,
    split_index,
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
    top_k: int = 0,
    top_p: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor | None]:
    """The obvious expression."""
    counted_T = target_T != ignore_index
    logits_TV = torch.where(counted_T[:, None], logits_TV, 0.0)
    logits_TV = logits_TV.to(accumulation_dtype(logits_TV))
    if logit_softcap is not None:
        logits_TV = soft_cap_reference(logits_TV, logit_softcap)
    target_T1 = target_T.long()[:, None] * counted_T[:, None]
    logp_TV = keep_top_reference(logits_TV / temperature, target_T1, top_k, top_p).log_softmax(-1)
    entropy_T = entropy_reference(logp_TV) * counted_T if with_entropy else None
    return logp_TV.gather(1, target_T1)[:, 0] * counted_T, entropy_T


def _chunk_logits(
    logits_nV: Tensor, target_n1: Tensor, temperature: float, softcap: float | None, top_k: int, top_p: float
) -> tuple[Tensor, Tensor | None]:
    """A wide copy that may be overwritten, and the derivative of its soft cap where there is one."""
    if softcap is None:
        x, slope = logits_nV.to(accumulation_dtype(logits_nV)) / temperature, None
    else:
        x = logits_nV.to(accumulation_dtype(logits_nV), copy=True)
        slope = soft_cap_(x, softcap)
        x.div_(temperature)
    keep_top_(x, target_n1, top_k, top_p)
    return x, slope


def _rows_for_kernels(
    logits_TV: Tensor,
    target_T: Tensor,
    temperature: float,
    softcap: float | None,
    top_k: int,
    top_p: float,
    ignore_index: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their logits: all as they are; with top-k or top-p chunks of copies, -inf where they leave one out."""
    if not top_k and top_p == 1:
        yield slice(None), logits_TV
        return
    tokens, vocabulary = logits_TV.shape
    target_T1, *_ = split_index(target_T, vocabulary, ignore_index)
    step = chunk_size(tokens, vocabulary, logits_TV.device)
    for s in range(0, max(tokens, 1), step):
        rows = slice(s, s + step)
        x = logits_TV[rows].clone()
        keep_top_(x, target_T1[rows], top_k, top_p, temperature, softcap)
        yield rows, x


@torch.library.custom_op("carft::token_logprob", mutates_args=())
def _forward(
    logits_TV: Tensor,
    target_T: Tensor,
    temperature: float,
    with_entropy: bool,
    with_lse: bool,
    logit_softcap: float | None,
    top_k: int,
    top_p: float,
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
    options = (temperature, logit_softcap, top_k, top_p)
    if via_triton:
        found = [
            logprob_forward(x, target_T[rows], temperature, with_entropy, ignore_index, logit_softcap)
            for rows, x in _rows_for_kernels(logits_TV, target_T, *options, ignore_index)
        ]
        logprob_T, entropy_T, top_T, log_total_T = (
            found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
        )
        lse_T = lse_of(top_T, log_total_T) if with_lse else top_T.new_empty(0)
        return logprob_T, entropy_T, lse_T, top_T, log_total_T
    dtype = accumulation_dtype(logits_TV)
    logprob_T, top_T, log_total_T = (logits_TV.new_empty(tokens, dtype=dtype) for _ in range(3))
    entropy_T = logits_TV.new_empty(tokens if with_entropy else 0, dtype=dtype)
    target_T1, ignored_T, outside_T = split_index(target_T, vocabulary, ignore_index)
    step = chunk_size(tokens, vocabulary, logits_TV.device)
    for s in range(0, tokens, step):
        e = s + step
        x, _ = _chunk_logits(logits_TV[s:e], target_T1[s:e], *options)
        logprob_T[s:e], top_T[s:e], exp, sum_exp = softmax_parts_(x, target_T1[s:e])
        log_total_T[s:e] = sum_exp.log()
        if with_entropy:
            entropy_T[s:e] = torch.special.entr(exp.div_(sum_exp[:, None])).sum(-1)
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
    top_k: int,
    top_p: float,
    ignore_index: int,
    via_triton: bool,
) -> None:
    options = (temperature, logit_softcap, top_k, top_p)
    if via_triton:
        for rows, x in _rows_for_kernels(logits_TV, target_T, *options, ignore_index):
            logprob_backward(
                x,
                out_TV[rows],
                target_T[rows],
                top_T[rows],
                log_total_T[rows],
                d_logprob_T[rows],
                temperature,
                ignore_index,
                entropy_T=entropy_T[rows],
                d_entropy_T=None if d_entropy_T is None else d_entropy_T[rows],
                d_lse_T=None if d_lse_T is None else d_lse_T[rows],
                softcap=logit_softcap,
            )
        return
    step = chunk_size(len(target_T), logits_TV.shape[1], logits_TV.device)
    target_T1, ignored_T, outside_T = split_index(target_T, logits_TV.shape[1], ignore_index)
    d_logprob_T = gradient_or_nan(d_logprob_T, outside_T)
    for s in range(0, len(target_T), step):
        rows = slice(s, s + step)
        x, slope = _chunk_logits(logits_TV[rows], target_T1[rows], *options)
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
    top_k: int,
    top_p: float,
    ignore_index: int,
    via_triton: bool,
) -> Tensor:
    out_TV = torch.empty_like(logits_TV)
    tensors = (target_T, top_T, log_total_T, entropy_T, d_logprob_T, d_entropy_T, d_lse_T)
    _write_gradient(out_TV, logits_TV, *tensors, temperature, logit_softcap, top_k, top_p, ignore_index, via_triton)
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
    top_k: int,
    top_p: float,
    ignore_index: int,
    via_triton: bool,
) -> None:
    tensors = (target_T, top_T, log_total_T, entropy_T, d_logprob_T, d_entropy_T, d_lse_T)
    options = (temperature, logit_softcap, top_k, top_p, ignore_index, via_triton)
    _write_gradient(logits_TV, logits_TV, *tensors, *options)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_TV, target_T, temperature, _, _, *options, ctx.inplace, via_triton = inputs
    ctx.options = (temperature, *options, via_triton)
    _, entropy_T, _, top_T, log_total_T = output
    ctx.set_materialize_grads(False)  # no zeros for the outputs that carry no gradient
    ctx.mark_non_differentiable(top_T, log_total_T)
    ctx.save_for_backward(logits_TV, target_T, top_T, log_total_T, entropy_T)


def _autograd(
    ctx: Any, d_logprob_T: Tensor | None, d_entropy_T: Tensor | None, d_lse_T: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    logits_TV, *saved = ctx.saved_tensors
    given = given_gradients(d_logprob_T, d_entropy_T, d_lse_T, saved[1])
    arguments = (*saved, *given, *ctx.options)
    if ctx.inplace:
        logits_TV = logits_TV.detach()
        _backward_(logits_TV, *arguments)
        return logits_TV, *([None] * 10)
    return _backward(logits_TV, *arguments), *([None] * 10)


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
    top_k: int = ...,
    top_p: float = ...,
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
    top_k: int = ...,
    top_p: float = ...,
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
    top_k: int = 0,
    top_p: float = 1.0,
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
        top_k: the log-prob, entropy and log-sum-exp are those of the `top_k` most likely tokens alone, and of all that
            are as likely as the last of them, renormalised; no other logit has a gradient. 0 keeps every token. As a
            sampler's, on the logits over the temperature. The target is always kept. Which tokens are kept carries no
            gradient.
        top_p: likewise, behind top-k: the fewest most likely tokens whose probabilities add up to `top_p`, those of
            equal likelihood in the order of their ids. In (0, 1]; 1 keeps every token. It sorts the logits.
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
    check_top(top_k, top_p)
    check_ignore_index(ignore_index)
    if via_triton:
        check_rows("logits_TV", logits_TV)
    apart = len(logits_TV) < 2 or logits_TV.stride(0) >= logits_TV.shape[1]
    inplace = inplace_backward and apart and not torch.compiler.is_compiling()
    options = (temperature, with_entropy, with_lse, logit_softcap, top_k, top_p, ignore_index, inplace, via_triton)
    logprob_T, entropy_T, lse_T, *_ = _forward(logits_TV, target_T.contiguous(), *options)
    found = logprob_T, entropy_T if with_entropy else None
    return (*found, lse_T) if with_lse else found
