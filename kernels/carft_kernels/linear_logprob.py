"""Log-prob (and entropy) of given tokens from hidden states, never holding [tokens, vocabulary].

    x_t = (hidden_t weight^T + bias) / temperature, the logits soft-capped first if asked, then as token_logprob

Kept for backward: the inputs and their statistics. Cost in units of F = 2 T V D: 1 without gradient, 4 with, since
backward computes the logits again. Both passes are the loop over chunks of tokens in `_head.py`; without a gradient
Triton streams tiles of logits through registers and never writes one. Accumulation: float32 for d_weight and for
everything past the matmul (float64 for float64 input), and d_hidden is one matmul over the whole vocabulary, so it is
never summed in half precision.
"""

from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor

from carft_kernels._head import Head, Needs, Parts, checked_head, over_chunks
from carft_kernels._row_kernels import (
    LogprobOptions,
    RowGradients,
    RowOptions,
    RowStatistics,
    logprob_reference,
)
from carft_kernels._runtime import Impl, check_targets, define_operator, log_implementation, unflatten, use_triton


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
    hidden_TD = torch.where((target_T != ignore_index)[:, None], hidden_TD, 0.0)
    logits_TV = torch.nn.functional.linear(hidden_TD, weight_VD, bias)
    options = RowOptions(temperature, logit_softcap, top_k, top_p, ignore_index, via_triton=False)
    logprob_T, entropy_T, _ = logprob_reference(logits_TV, target_T, options)
    return logprob_T, entropy_T if with_entropy else None


class _Wanted(NamedTuple):
    with_entropy: bool
    with_lse: bool


_FORWARD = Head, RowOptions, Parts, _Wanted
_BACKWARD = Head, RowStatistics, RowOptions, Parts, RowGradients, Needs


def _logprob(head: Head, options: RowOptions, parts: Parts, wanted: _Wanted) -> tuple[Tensor, ...]:
    """The tokens' statistics, and log-sum-exp (empty unless asked)."""
    log_implementation("linear_logprob", options.via_triton, head.hidden_TD.device.type)
    if parts.group is None:
        check_targets("target_T", head.target_T, head.weight_VD.shape[0], options.ignore_index)
    found_T = RowStatistics.empty(head.hidden_TD, wanted.with_entropy)

    def keep(rows: slice, statistics: RowStatistics) -> None:
        for whole_T, part in zip(found_T, statistics, strict=True):
            whole_T[rows] = part

    over_chunks(head, options, parts, keep, Needs(False, False, False), with_entropy=wanted.with_entropy)
    return *found_T, found_T.lse(options) if wanted.with_lse else found_T.top_T.new_empty(0)


def _fake(head: Head, _: RowOptions, __: Parts, wanted: _Wanted) -> tuple[Tensor, ...]:
    found_T = RowStatistics.empty(head.hidden_TD, wanted.with_entropy)
    return *found_T, found_T.top_T.new_empty(len(found_T.top_T) if wanted.with_lse else 0)


def _gradient(
    head: Head, known: RowStatistics, options: RowOptions, parts: Parts, gradients: RowGradients, needs: Needs
) -> tuple[Tensor, ...]:
    """d_hidden, d_weight, d_bias; empty where not needed."""
    counted_T = head.target_T != options.ignore_index

    def given(rows: slice, _: RowStatistics) -> tuple[RowGradients, Tensor]:
        return gradients.at(rows), counted_T[rows]

    # of a shard the statistics are found again: those known are of the whole vocabulary
    found = over_chunks(
        head,
        options,
        parts,
        given,
        needs,
        with_entropy=parts.group is not None and gradients.d_entropy_T is not None,
        known=known if parts.group is None else None,
    )
    return tuple(d.to(head.hidden_TD.dtype) for d in found)


def _fake_gradient(head: Head, *rest: Any) -> tuple[Tensor, ...]:
    needs: Needs = rest[-1]
    return needs.empty(head, head.weight_VD.dtype)


_TENSORS, _UNSAFE = f"({', '.join(['Tensor'] * 5)})", (torch.Tag.cudagraph_unsafe,)
_forward = define_operator("linear_logprob", _FORWARD, _TENSORS, _logprob, _fake)
_forward_of_shards = define_operator("linear_logprob_of_shards", _FORWARD, _TENSORS, _logprob, _fake, tags=_UNSAFE)
_GRADIENT = _BACKWARD, "(Tensor, Tensor, Tensor)", _gradient, _fake_gradient
_backward = define_operator("linear_logprob_backward", *_GRADIENT)
_backward_of_shards = define_operator("linear_logprob_of_shards_backward", *_GRADIENT, tags=_UNSAFE)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    head, *ctx.rest = unflatten(_FORWARD, inputs)
    *statistics, _ = output
    ctx.set_materialize_grads(False)  # no zeros for the outputs that carry no gradient
    ctx.mark_non_differentiable(*statistics[2:])
    ctx.save_for_backward(*head, *statistics)


def _autograd(
    ctx: Any, d_logprob_T: Tensor | None, d_entropy_T: Tensor | None, _top: None, _total: None, d_lse_T: Tensor | None
) -> tuple[Tensor | None, ...]:
    hidden_TD, weight_VD, bias, target_T, *statistics = ctx.saved_tensors
    need_hidden, need_weight, need_bias, *rest = ctx.needs_input_grad
    needs = Needs(need_hidden, need_weight, need_bias)
    options, parts, _ = ctx.rest
    gradients = RowGradients.given(d_logprob_T, d_entropy_T, d_lse_T, statistics[0])
    head = Head(hidden_TD, weight_VD, bias, target_T)
    backward = _backward_of_shards if parts.reads_back else _backward
    found = backward(*head, *statistics, *options, *parts, *gradients, *needs)
    return *(d if need else None for d, need in zip(found, needs, strict=True)), *([None] * len(rest))


for _operator in (_forward, _forward_of_shards):
    _operator.register_autograd(_autograd, setup_context=_setup_context)


def logprob_of_head(
    head: Head, options: RowOptions, parts: Parts, *, with_entropy: bool = False, with_lse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, and entropy and log-sum-exp where asked, of what `checked_head` returns."""
    forward = _forward_of_shards if parts.reads_back else _forward
    logprob_T, entropy_T, _, _, lse_T = forward(*head, *options, *parts, with_entropy, with_lse)
    return logprob_T, entropy_T, lse_T


@overload
def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    bias: Tensor | None = ...,
    chunk_tokens: int | None = ...,
    group: dist.ProcessGroup | None = ...,
    with_lse: Literal[False] = ...,
    **options: Unpack[LogprobOptions],
) -> tuple[Tensor, Tensor | None]: ...


@overload
def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    bias: Tensor | None = ...,
    chunk_tokens: int | None = ...,
    group: dist.ProcessGroup | None = ...,
    with_lse: Literal[True],
    **options: Unpack[LogprobOptions],
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
    chunk_tokens: int | None = None,
    group: dist.ProcessGroup | None = None,
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
        with_lse: also return the logsumexp of the logits over the temperature, differentiable; for a z-loss, say,
            its square.
        logit_softcap: logits become cap * tanh(logits / cap), before the temperature; -inf stays -inf. Above 0.
        top_k: the log-prob, entropy and log-sum-exp are those of the `top_k` most likely tokens alone, and of all that
            are as likely as the last of them, renormalised; no other logit has a gradient. 0 keeps every token. As a
            sampler's, on the logits over the temperature. The target is always kept. Which tokens are kept carries no
            gradient.
        top_p: likewise, after top-k: the fewest most likely tokens whose probabilities add up to `top_p`, and all that
            are as likely as the last of them. In (0, 1]; 1 keeps every token. It sorts the logits.
        ignore_index: a token with this target takes no part, whatever its state holds. Its log-prob and entropy
            are 0 and it gives no gradient to anything, as in `torch.nn.functional.cross_entropy`.
        chunk_tokens: the most tokens of a chunk; chunks are equal. By default on a GPU 4,096 as far as 3 GiB hold their
            float32 logits, or what 1 GiB holds if that is more; on a CPU what 32 MB hold.
        group: process group over whose ranks the vocabulary is divided (tensor parallel): `weight_VD` and `bias` are
            this rank's rows, contiguous, in the order of the ranks; a rank may have none. A DTensor has to be Shard(0)
            on a one-dimensional mesh of the same ranks. All ranks make the same call, only rows differ: hidden states
            and `chunk_tokens` are the same, and targets are of the whole vocabulary. Each rank gets the whole result,
            and the whole gradient of `hidden_TD`: the operator sums it over the ranks, do not sum it again. Gradients
            of `weight_VD` and `bias` are of this rank's rows. Collectives, by the group's backend where the tensors
            are: a small all-gather, and one a chunk, in either pass; one all-reduce of d_hidden. Without `chunk_tokens`
            the largest shard decides, which is read back. Never run on a GPU.
        impl: "auto" (Triton on CUDA, torch elsewhere and for float64), "triton" or "torch".

    Returns:
        log-prob [T] and entropy [T] or None, with `with_lse` the logsumexp [T] as a third; float32 (float64 for float64
        input). Gradients to hidden, weight, bias.

    Source: selective log-softmax of RLHF trainers; chunked over tokens as in fused linear cross-entropy; divided over
    ranks as in Megatron-LM's vocabulary-parallel cross entropy.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    via_triton = use_triton("linear_logprob", impl, hidden_TD)
    options = RowOptions(temperature, logit_softcap, top_k, top_p, ignore_index, via_triton)
    head, parts = checked_head(Head(hidden_TD, weight_VD, bias, target_T), options, chunk_tokens, group)
    logprob_T, entropy_T, lse_T = logprob_of_head(head, options, parts, with_entropy=with_entropy, with_lse=with_lse)
    found = logprob_T, entropy_T if with_entropy else None
    return (*found, lse_T) if with_lse else found
