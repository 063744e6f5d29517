"""Log-prob (and entropy) of given tokens from hidden states, never holding [tokens, vocabulary].

    x_t = (hidden_t weight^T + bias) / temperature, the logits soft-capped first if asked, then as token_logprob

Kept for backward: the inputs and [T] statistics. Cost in units of F = 2 T V D: 1 without gradient, 4 with, since
backward computes the logits again, a chunk of tokens at a time. Triton: the forward pass streams tiles of logits
through registers and never writes one. Torch: chunks of tokens whose logits fit the cache. Accumulation: float32 for
d_weight and for everything past the matmul (float64 for float64 input), and d_hidden is one matmul over the whole
vocabulary, so it is never summed in half precision. Half-precision matmuls run on the weight as it is: only a chunk's
logits are widened, never the weight.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from carft_kernels._matmul_kernels import matmul_logprob
from carft_kernels._row_kernels import logprob_backward, logprob_forward, lse_of
from carft_kernels._runtime import (
    Impl,
    accumulation_dtype,
    add_product_,
    check_float,
    check_ignore_index,
    check_integer,
    check_like,
    check_positive,
    check_rows,
    check_same_dtype,
    check_softcap,
    check_targets,
    check_top,
    chunk_logits,
    chunk_size,
    d_logits_,
    entropy_reference,
    given_gradients,
    gradient_or_nan,
    keep_top_reference,
    log_implementation,
    rows_scratch,
    soft_cap_reference,
    softmax_parts_,
    split_index,
    use_triton,
    wide_matmul,
    zero_rows_,
)


def linear_logprob_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    logit_softcap: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor | None]:
    """The obvious expression: all logits at once."""
    counted_T = target_T != ignore_index
    logits_TV = torch.nn.functional.linear(torch.where(counted_T[:, None], hidden_TD, 0.0), weight_VD, bias)
    logits_TV = logits_TV.to(accumulation_dtype(logits_TV))
    if logit_softcap is not None:
        logits_TV = soft_cap_reference(logits_TV, logit_softcap)
    target_T1 = target_T.long()[:, None] * counted_T[:, None]
    logp_TV = keep_top_reference(logits_TV / temperature, target_T1, top_k, top_p).log_softmax(-1)
    entropy_T = entropy_reference(logp_TV) * counted_T if with_entropy else None
    return logp_TV.gather(1, target_T1)[:, 0] * counted_T, entropy_T


@torch.library.custom_op("carft::linear_logprob", mutates_args=())
def _forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    bias: Tensor | None,
    temperature: float,
    with_entropy: bool,
    with_lse: bool,
    logit_softcap: float | None,
    top_k: int,
    top_p: float,
    ignore_index: int,
    via_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log-prob, entropy and log-sum-exp (empty unless asked), row maximum and log of the sum of exponentials below it.

    The last two serve this implementation's own backward: Triton keeps them in units of its own.
    """
    log_implementation("linear_logprob", via_triton, hidden_TD.device.type)
    check_targets("target_T", target_T, weight_VD.shape[0], ignore_index)
    if via_triton and not top_k and top_p == 1:
        logprob_T, entropy_T, top_T, log_total_T, _ = matmul_logprob(
            hidden_TD,
            weight_VD,
            target_T,
            temperature,
            bias_M=bias,
            ignore_index=ignore_index,
            with_entropy=with_entropy,
            softcap=logit_softcap,
        )
        lse_T = lse_of(top_T, log_total_T) if with_lse else top_T.new_empty(0)
        return logprob_T, entropy_T, lse_T, top_T, log_total_T
    tokens = hidden_TD.shape[0]
    dtype = accumulation_dtype(hidden_TD)
    logprob_T, top_T, log_total_T = (hidden_TD.new_empty(tokens, dtype=dtype) for _ in range(3))
    entropy_T = hidden_TD.new_empty(tokens if with_entropy else 0, dtype=dtype)
    target_T1, ignored_T, outside_T = split_index(target_T, weight_VD.shape[0], ignore_index)
    step = chunk_size(tokens, weight_VD.shape[0], hidden_TD.device)
    options = (temperature, logit_softcap, top_k, top_p)
    scratch = rows_scratch(hidden_TD, step, weight_VD.shape[0], torch.float32) if via_triton else None
    for s in range(0, tokens, step):
        e = s + step
        x, _ = chunk_logits(hidden_TD[s:e], weight_VD, bias, target_T1[s:e], *options, out=scratch)
        if via_triton:
            logprob_T[s:e], entropy_T[s:e], top_T[s:e], log_total_T[s:e] = logprob_forward(
                x, target_T[s:e], temperature, with_entropy, ignore_index, logit_softcap
            )
            continue
        logprob_T[s:e], top_T[s:e], exp, sum_exp = softmax_parts_(x, target_T1[s:e])
        log_total_T[s:e] = sum_exp.log()
        if with_entropy:
            entropy_T[s:e] = torch.special.entr(exp.div_(sum_exp[:, None])).sum(-1)
    logprob_T.masked_fill_(outside_T, torch.nan)
    for x_T in (logprob_T, top_T, log_total_T, *([entropy_T] if with_entropy else [])):
        x_T.masked_fill_(ignored_T, 0.0)
    lse_T = top_T.new_empty(0)
    if with_lse:
        lse_T = lse_of(top_T, log_total_T) if via_triton else top_T + log_total_T
    return logprob_T, entropy_T, lse_T, top_T, log_total_T


@_forward.register_fake
def _(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    bias: Tensor | None,
    temperature: float,
    with_entropy: bool,
    with_lse: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, dtype = hidden_TD.shape[0], accumulation_dtype(hidden_TD)
    logprob_T, top_T, log_total_T = (hidden_TD.new_empty(tokens, dtype=dtype) for _ in range(3))
    entropy_T, lse_T = (hidden_TD.new_empty(tokens if asked else 0, dtype=dtype) for asked in (with_entropy, with_lse))
    return logprob_T, entropy_T, lse_T, top_T, log_total_T


@torch.library.custom_op("carft::linear_logprob_backward", mutates_args=())
def _backward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    bias: Tensor | None,
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
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    via_triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_hidden, d_weight, d_bias; empty where not needed."""
    tokens, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
    d_hidden_TD = torch.empty_like(hidden_TD) if need_hidden else hidden_TD.new_empty(0)
    dtype = accumulation_dtype(hidden_TD)
    d_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if need_weight else weight_VD.new_empty(0)
    d_bias_V = weight_VD.new_zeros(vocabulary if need_bias else 0, dtype=dtype)
    step = chunk_size(tokens, vocabulary, hidden_TD.device)
    target_T1, ignored_T, outside_T = split_index(target_T, vocabulary, ignore_index)
    d_logprob_T = gradient_or_nan(d_logprob_T, outside_T)
    options = (temperature, logit_softcap, top_k, top_p)
    x_scratch = None
    if via_triton:
        x_scratch = rows_scratch(hidden_TD, step, vocabulary, torch.float32)
        d_scratch = x_scratch if hidden_TD.dtype == dtype else rows_scratch(hidden_TD, step, vocabulary)
    for s in range(0, tokens, step):
        rows = slice(s, s + step)
        # whatever an ignored token's state holds must not reach d_weight: 0 * NaN is NaN
        h = hidden_TD[rows].masked_fill(ignored_T[rows, None], 0.0)
        d_entropy_n, d_lse_n = (None if d is None else d[rows] for d in (d_entropy_T, d_lse_T))
        x, slope = chunk_logits(h, weight_VD, bias, target_T1[rows], *options, out=x_scratch)
        if via_triton:
            d = d_scratch[: len(h)]
            top, log_total = top_T[rows], log_total_T[rows]
            if hidden_TD.dtype == dtype:
                # The two matmuls round differently: with float32 logits in the hundreds that would show in
                # exp(logit - lse). Half precision hides it, and saves the pass.
                _, _, top, log_total = logprob_forward(
                    x, target_T[rows], temperature, False, ignore_index, logit_softcap
                )
            logprob_backward(
                x,
                d,
                target_T[rows],
                top,
                log_total,
                d_logprob_T[rows],
                temperature,
                ignore_index,
                entropy_T=entropy_T[rows],
                d_entropy_T=d_entropy_n,
                d_lse_T=d_lse_n,
                softcap=logit_softcap,
            )
        else:
            logp = x.sub_(top_T[rows, None]).sub_(log_total_T[rows, None])
            d = d_logits_(logp, target_T1[rows], d_logprob_T[rows], entropy_T[rows], d_entropy_n, d_lse_n)
            zero_rows_(d, ignored_T[rows])
            if temperature != 1.0:
                d.div_(temperature)
            if slope is not None:
                d.mul_(slope)
        if need_bias:
            d_bias_V += d.sum(0, dtype=dtype)
        d = d.to(hidden_TD.dtype)
        if need_hidden:
            wide_matmul(d, weight_VD, out=d_hidden_TD[rows])
        if need_weight:
            add_product_(d_weight_VD, d.T, h)
    return d_hidden_TD, d_weight_VD.to(weight_VD.dtype), d_bias_V.to(weight_VD.dtype)


@_backward.register_fake
def _(hidden_TD: Tensor, weight_VD: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = rest[-4:-1]
    return (
        torch.empty_like(hidden_TD) if need_hidden else hidden_TD.new_empty(0),
        torch.empty_like(weight_VD) if need_weight else weight_VD.new_empty(0),
        weight_VD.new_empty(weight_VD.shape[0] if need_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_TD, weight_VD, target_T, bias, ctx.temperature, _, _, *ctx.options, ctx.via_triton = inputs
    _, entropy_T, _, top_T, log_total_T = output
    ctx.set_materialize_grads(False)  # no zeros for the outputs that carry no gradient
    ctx.mark_non_differentiable(top_T, log_total_T)
    ctx.save_for_backward(hidden_TD, weight_VD, target_T, bias, top_T, log_total_T, entropy_T)


def _autograd(
    ctx: Any, d_logprob_T: Tensor | None, d_entropy_T: Tensor | None, d_lse_T: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    saved = ctx.saved_tensors
    d_hidden_TD, d_weight_VD, d_bias_V = _backward(
        *saved,
        *given_gradients(d_logprob_T, d_entropy_T, d_lse_T, saved[4]),
        ctx.temperature,
        *ctx.options,
        need_hidden,
        need_weight,
        need_bias,
        ctx.via_triton,
    )
    return (
        d_hidden_TD if need_hidden else None,
        d_weight_VD if need_weight else None,
        None,
        d_bias_V if need_bias else None,
        *([None] * 8),
    )


_forward.register_autograd(_autograd, setup_context=_setup_context)


@overload
def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    with_entropy: bool = ...,
    with_lse: Literal[False] = ...,
    logit_softcap: float | None = ...,
    top_k: int = ...,
    top_p: float = ...,
    ignore_index: int = ...,
    impl: Impl = ...,
) -> tuple[Tensor, Tensor | None]: ...


@overload
def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    with_entropy: bool = ...,
    with_lse: Literal[True],
    logit_softcap: float | None = ...,
    top_k: int = ...,
    top_p: float = ...,
    ignore_index: int = ...,
    impl: Impl = ...,
) -> tuple[Tensor, Tensor | None, Tensor]: ...


def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    with_lse: bool = False,
    logit_softcap: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    ignore_index: int = -100,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    """Log-prob of `target_T` under softmax((hidden @ weight.T + bias) / temperature), and its entropy if asked.

    Equivalent: `((hidden @ weight.T + bias).float() / temperature).log_softmax(-1).gather(1, target[:, None])[:, 0]`,
    which is `-cross_entropy((hidden @ weight.T + bias).float() / temperature, target, reduction="none",
    ignore_index=ignore_index)`.

    Args:
        hidden_TD: float [T, D], any float dtype.
        weight_VD: [V, D], dtype and device of `hidden_TD`.
        target_T: int64 or int32 [T], values in [0, V) or `ignore_index`. Others raise where index checks are on (see
            `set_index_checks`); where they are off they give a log-prob of NaN.
        bias: [V], dtype and device of `hidden_TD`.
        temperature: divides the logits; above 0.
        with_entropy: also return the entropy (nats), differentiable.
        with_lse: also return the logsumexp of the logits over the temperature, differentiable; such as for a z-loss,
            its square.
        logit_softcap: cap: the logits are cap * tanh(logits / cap), before the temperature; -inf stays -inf. Above 0.
        top_k: the log-prob, entropy and log-sum-exp are those of the `top_k` most likely tokens alone, and of all that
            are as likely as the last of them, renormalised; no other logit has a gradient. 0 keeps every token. As a
            sampler's, on the logits over the temperature. The target is always kept. Which tokens are kept carries no
            gradient.
        top_p: likewise, behind top-k: the fewest most likely tokens whose probabilities add up to `top_p`, those of
            equal likelihood in the order of their ids. In (0, 1]; 1 keeps every token. It sorts the logits.
        ignore_index: a token with this target takes no part, whatever its state holds. Its log-prob and entropy
            are 0 and it gives no gradient to anything, as in `torch.nn.functional.cross_entropy`.
        impl: "auto" (Triton on CUDA, torch elsewhere and for float64), "triton" or "torch".

    Returns:
        log-prob [T] and entropy [T] or None, with `with_lse` the logsumexp [T] as a third; float32 (float64 for float64
        input). Gradients to hidden, weight, bias.

    Source: selective log-softmax of RLHF trainers; chunked over tokens as in fused linear cross-entropy.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    check_float("hidden_TD", hidden_TD, 2)
    via_triton = use_triton("linear_logprob", impl, hidden_TD)
    check_float("weight_VD", weight_VD, 2)
    check_like("weight_VD", weight_VD, (weight_VD.shape[0], hidden_TD.shape[1]), "hidden_TD", hidden_TD)
    check_same_dtype("weight_VD", weight_VD, "hidden_TD", hidden_TD)
    if bias is not None:
        check_like("bias", bias, (weight_VD.shape[0],), "weight_VD", hidden_TD)
        check_same_dtype("bias", bias, "hidden_TD", hidden_TD)
        bias = bias.contiguous()
    check_like("target_T", target_T, (hidden_TD.shape[0],), "hidden_TD", hidden_TD)
    check_integer("target_T", target_T)
    check_positive("temperature", temperature)
    check_softcap(logit_softcap)
    check_top(top_k, top_p)
    check_ignore_index(ignore_index)
    if via_triton:
        check_rows("hidden_TD", hidden_TD)
        check_rows("weight_VD", weight_VD)
    logprob_T, entropy_T, lse_T, *_ = _forward(
        hidden_TD,
        weight_VD,
        target_T.contiguous(),
        bias,
        temperature,
        with_entropy,
        with_lse,
        logit_softcap,
        top_k,
        top_p,
        ignore_index,
        via_triton,
    )
    found = logprob_T, entropy_T if with_entropy else None
    return (*found, lse_T) if with_lse else found
