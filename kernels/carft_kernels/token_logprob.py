"""Log-prob (and entropy) of given tokens from their logits.

    logprob_t = x_t[target_t] - logsumexp_v x_t[v],   x = logits / temperature
    entropy_t = -sum_v p_t[v] log p_t[v],             p = softmax(x)

Kept for backward: the logits and their statistics. Accumulation: float32 (float64 for float64 input). Bytes: forward
reads each logit once; backward reads each once and writes its gradient once, over the logit itself on request. Both are
in `_row_kernels.py`.
"""

from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor

from carft_kernels._row_kernels import (
    LogprobOptions,
    RowGradients,
    RowOptions,
    RowStatistics,
    kept_rows,
    logprob_backward,
    logprob_forward,
    logprob_reference,
)
from carft_kernels._runtime import (
    Impl,
    check_float,
    check_rows,
    check_targets,
    define_operator,
    log_implementation,
    unflatten,
    use_triton,
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
    logits_TV = torch.where((target_T != ignore_index)[:, None], logits_TV, 0.0)
    options = RowOptions(temperature, logit_softcap, top_k, top_p, ignore_index, via_triton=False)
    logprob_T, entropy_T, _ = logprob_reference(logits_TV, target_T, options)
    return logprob_T, entropy_T if with_entropy else None


class _Rows(NamedTuple):
    logits_TV: Tensor
    target_T: Tensor


class _Wanted(NamedTuple):
    with_entropy: bool
    with_lse: bool
    inplace: bool


_FORWARD = _Rows, RowOptions, _Wanted
_BACKWARD = _Rows, RowStatistics, RowGradients, RowOptions


def _logprob(rows: _Rows, options: RowOptions, wanted: _Wanted) -> tuple[Tensor, ...]:
    """The rows' statistics, and log-sum-exp (empty unless asked)."""
    log_implementation("token_logprob", options.via_triton, rows.logits_TV.device.type)
    check_targets("target_T", rows.target_T, rows.logits_TV.shape[1], options.ignore_index)
    parts = [
        logprob_forward(x, rows.target_T[at], uncut, wanted.with_entropy) for at, x, uncut in kept_rows(*rows, options)
    ]
    parts = parts or [RowStatistics.empty(rows.logits_TV, wanted.with_entropy)]
    found = parts[0] if len(parts) == 1 else RowStatistics._make(map(torch.cat, zip(*parts, strict=True)))
    return *found, found.lse(options) if wanted.with_lse else found.top_T.new_empty(0)


def _fake(rows: _Rows, _: RowOptions, wanted: _Wanted) -> tuple[Tensor, ...]:
    found = RowStatistics.empty(rows.logits_TV, wanted.with_entropy)
    return *found, found.top_T.new_empty(len(found.top_T) if wanted.with_lse else 0)


def _gradient(rows: _Rows, statistics: RowStatistics, gradients: RowGradients, options: RowOptions) -> Tensor:
    out_TV = torch.empty_like(rows.logits_TV)
    _write_gradient(out_TV, rows, statistics, gradients, options)
    return out_TV


def _gradient_(rows: _Rows, *rest: Any) -> None:
    _write_gradient(rows.logits_TV, rows, *rest)


def _write_gradient(
    out_TV: Tensor, rows: _Rows, statistics: RowStatistics, gradients: RowGradients, options: RowOptions
) -> None:
    for at, x, uncut in kept_rows(*rows, options):
        logprob_backward(x, out_TV[at], rows.target_T[at], statistics.at(at), gradients.at(at), uncut)


_forward = define_operator("token_logprob", _FORWARD, f"({', '.join(['Tensor'] * 5)})", _logprob, _fake)
_backward = define_operator(
    "token_logprob_backward", _BACKWARD, "Tensor", _gradient, lambda rows, *_: torch.empty_like(rows.logits_TV)
)
_backward_ = define_operator(
    "token_logprob_backward_", _BACKWARD, "()", _gradient_, lambda *_: None, mutates="logits_TV"
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, ctx.options, wanted = unflatten(_FORWARD, inputs)
    ctx.inplace, ctx.inputs = wanted.inplace, len(inputs)
    *statistics, _ = output
    ctx.set_materialize_grads(False)  # no zeros for the outputs that carry no gradient
    ctx.mark_non_differentiable(*statistics[2:])
    ctx.save_for_backward(*rows, *statistics)


def _autograd(
    ctx: Any, d_logprob_T: Tensor | None, d_entropy_T: Tensor | None, _top: None, _total: None, d_lse_T: Tensor | None
) -> tuple[Tensor | None, ...]:
    logits_TV, target_T, *statistics = ctx.saved_tensors
    gradients = RowGradients.given(d_logprob_T, d_entropy_T, d_lse_T, statistics[0])
    rest = target_T, *statistics, *gradients, *ctx.options
    if ctx.inplace:
        d_logits_TV = logits_TV.detach()
        _backward_(d_logits_TV, *rest)
    else:
        d_logits_TV = _backward(logits_TV, *rest)
    return d_logits_TV, *([None] * (ctx.inputs - 1))


_forward.register_autograd(_autograd, setup_context=_setup_context)


@overload
def token_logprob(
    logits_TV: Tensor,
    target_T: Tensor,
    *,
    with_lse: Literal[False] = ...,
    inplace_backward: bool = ...,
    **options: Unpack[LogprobOptions],
) -> tuple[Tensor, Tensor | None]: ...


@overload
def token_logprob(
    logits_TV: Tensor,
    target_T: Tensor,
    *,
    with_lse: Literal[True],
    inplace_backward: bool = ...,
    **options: Unpack[LogprobOptions],
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
        logit_softcap: logits become cap * tanh(logits / cap), before the temperature; -inf stays -inf. Above 0.
        top_k: the log-prob, entropy and log-sum-exp are those of the `top_k` most likely tokens alone, and of all that
            are as likely as the last of them, renormalised; no other logit has a gradient. 0 keeps every token. As a
            sampler's, on the logits over the temperature. The target is always kept. Which tokens are kept carries no
            gradient.
        top_p: likewise, after top-k: the fewest most likely tokens whose probabilities add up to `top_p`, and all that
            are as likely as the last of them. In (0, 1]; 1 keeps every token. It sorts the logits.
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
    options = RowOptions(temperature, logit_softcap, top_k, top_p, ignore_index, via_triton)
    target_T = options.checked("target_T", target_T, "logits_TV", logits_TV)
    if via_triton:
        check_rows("logits_TV", logits_TV)
    apart = len(logits_TV) < 2 or logits_TV.stride(0) >= logits_TV.shape[1]
    inplace = inplace_backward and apart and not torch.compiler.is_compiling()
    logprob_T, entropy_T, _, _, lse_T = _forward(logits_TV, target_T, *options, with_entropy, with_lse, inplace)
    found = logprob_T, entropy_T if with_entropy else None
    return (*found, lse_T) if with_lse else found
