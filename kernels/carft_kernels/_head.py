"""The one loop of the LM head's operators: logits of a chunk of tokens, their statistics, the gradients' products.

    x_t = hidden_t weight^T + bias,   statistics of softmax(cap(x_t) / temperature) as in token_logprob

Only a chunk's logits exist at a time, in float32. Their gradient takes their place, in the dtype of the inputs, if
every token of the chunk has one. d_weight is added up in float32, and d_hidden is one product over the whole
vocabulary. Half-precision products run on the weight as it is: only a chunk's logits are widened, never the weight.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from carft_kernels._matmul_kernels import matmul_logprob
from carft_kernels._row_kernels import (
    RowGradients,
    RowOptions,
    RowStatistics,
    keep_top_,
    logprob_backward,
    logprob_forward,
    narrow_rows,
)
from carft_kernels._runtime import (
    LN2,
    accumulation_dtype,
    add_product_,
    check_float,
    check_like,
    check_rows,
    check_same_dtype,
    chunk_size,
    head_logits,
    most_rows,
    product,
    rows_scratch,
    token_chunks,
    wide_matmul,
)
from carft_kernels._vocab_parallel import IGNORED, VocabShard, own_gradients, own_shard


class Head(NamedTuple):
    hidden_TD: Tensor
    weight_VD: Tensor
    bias: Tensor | None
    target_T: Tensor


class Needs(NamedTuple):
    """Which gradients are wanted."""

    need_hidden: bool
    need_weight: bool
    need_bias: bool

    def empty(self, head: Head, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """d_hidden in the dtype of hidden, d_weight and d_bias in `dtype`, without their values; what is not wanted
        has no element."""
        hidden_TD, weight_VD, *_ = head
        return (
            torch.empty_like(hidden_TD) if self.need_hidden else hidden_TD.new_empty(0),
            torch.empty_like(weight_VD, dtype=dtype) if self.need_weight else weight_VD.new_empty(0, dtype=dtype),
            weight_VD.new_empty(weight_VD.shape[0] if self.need_bias else 0, dtype=dtype),
        )


class Parts(NamedTuple):
    """How the loop divides tokens, and the ranks the vocabulary."""

    chunk_tokens: int
    """At most; 0: as the largest shard asks."""
    group: str | None
    shard_rows: int
    """Of this rank, before a row was put into an empty shard."""

    @property
    def reads_back(self) -> bool:
        """The rows of the largest shard, which no CUDA graph can hold."""
        return self.group is not None and self.chunk_tokens == 0


def checked_head(
    head: Head,
    options: RowOptions,
    chunk_tokens: int | None,
    group: dist.ProcessGroup | None,
    names: tuple[str, str, str] = ("hidden_TD", "weight_VD", "bias"),
) -> tuple[Head, Parts]:
    """Arguments of these names, of either operator. Raises ValueError."""
    hidden_TD, weight_VD, bias, target_T = head
    hidden_name, weight_name, bias_name = names
    check_float(hidden_name, hidden_TD, 2)
    weight_VD, bias = own_shard(weight_name, weight_VD, group), own_shard(bias_name, bias, group)
    check_float(weight_name, weight_VD, 2)
    tokens, vocabulary = len(hidden_TD), len(weight_VD)
    check_like(weight_name, weight_VD, (vocabulary, hidden_TD.shape[1]), hidden_name, hidden_TD)
    check_same_dtype(weight_name, weight_VD, hidden_name, hidden_TD)
    if bias is not None:
        check_like(bias_name, bias, (vocabulary,), weight_name, hidden_TD)
        check_same_dtype(bias_name, bias, hidden_name, hidden_TD)
        bias = bias.contiguous()
    target_T = options.checked("target_T", target_T, hidden_name, hidden_TD)
    if group is not None and options.cuts:
        raise ValueError(
            f"top_k = {options.top_k}, top_p = {options.top_p}: not with a group: each rank has only a part of "
            "the vocabulary"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens = {chunk_tokens}: expected at least 1")
    if options.via_triton:
        check_rows(hidden_name, hidden_TD)
        check_rows(weight_name, weight_VD)
    if group is None:
        parts = Parts(chunk_tokens or chunk_size(tokens, vocabulary, hidden_TD.device), None, vocabulary)
    else:
        parts = Parts(chunk_tokens or 0, group.group_name, vocabulary)
        if vocabulary == 0:  # a row of zeros, which the kernels need; it is left out of every result
            weight_VD = torch.nn.functional.pad(weight_VD, (0, 0, 0, 1))
            bias = None if bias is None else torch.nn.functional.pad(bias, (0, 1))
    return Head(hidden_TD, weight_VD, bias, target_T), parts


Differentiate = Callable[[slice, RowStatistics], tuple[RowGradients, Tensor] | None]
"""From a chunk's tokens and statistics to the gradients of these and bool [n], which tokens have one. None: none."""


def over_chunks(
    head: Head,
    options: RowOptions,
    parts: Parts,
    differentiate: Differentiate,
    needs: Needs,
    *,
    with_entropy: bool,
    skip_dead: bool = False,
    known: RowStatistics | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_hidden, d_weight, d_bias as of `Needs.empty`, of what `differentiate` is called with for each chunk.

    Tokens without a gradient are left out of the products, if `skip_dead`: their number is read back. `known`: the
    statistics [T], where a pass before has found them. With a group `head` is this rank's shard, `differentiate` sees
    statistics of the whole vocabulary, and none are known.
    """
    hidden_TD, weight_VD, bias, target_T = head
    tokens, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
    most, shard = parts.chunk_tokens, None
    if parts.group is not None:
        shard = VocabShard.of(target_T, parts.shard_rows, bias, options.ignore_index, parts.group)
        target_T, options = shard.target_T, options._replace(ignore_index=IGNORED)
        # the same on every rank, since each chunk has a collective
        most = most or chunk_size(tokens, int(shard.rows_R.max()), hidden_TD.device)
    dtype, via_triton, wanted, uncut = accumulation_dtype(hidden_TD), options.via_triton, any(needs), options.uncut()
    d_hidden_TD, d_weight_VD, d_bias_V = needs.empty(head, dtype)
    d_bias_V.zero_()
    if skip_dead:
        d_hidden_TD.zero_()
    first = True  # no product is in d_weight yet
    streamed = via_triton and not wanted and not options.cuts  # no logit is written
    chunks = token_chunks(tokens, max(tokens, 1) if streamed else most)
    scratch = None
    if via_triton and not streamed:
        scratch = rows_scratch(hidden_TD, most_rows(chunks), vocabulary, dtype)
    found: RowStatistics | None
    for rows in chunks:
        h, target = hidden_TD[rows], target_T[rows]
        if via_triton:
            x = None if scratch is None else scratch[: len(h)]
            found = matmul_logprob(h, weight_VD, target, uncut, bias_N=bias, with_entropy=with_entropy, logits_MN=x)
        else:
            x, found = head_logits(h, weight_VD, bias), None
        if x is not None and options.cuts:
            keep_top_(x, target, options)
            found = None
        own = found if known is None else known.at(rows)
        if own is None:
            assert x is not None
            own = logprob_forward(x, target, uncut, with_entropy)
        statistics = own
        if shard is not None:
            statistics, place = shard.combine(own, rows, LN2 if via_triton else 1.0)
        differentiated = differentiate(rows, statistics)
        if differentiated is None or x is None or not wanted:
            continue
        gradients, live = differentiated
        if shard is not None:
            gradients = own_gradients(gradients, own.entropy_T, statistics.entropy_T, *place)
            live = live & ~shard.absent
        index = None
        if skip_dead:
            index = live.nonzero()[:, 0]
            if len(index) == 0:
                continue
            if len(index) == len(h):
                index = None
        else:  # whatever a token without gradient holds must not reach d_weight: 0 * NaN is NaN
            h, target = h.masked_fill(~live[:, None], 0.0), target.masked_fill(~live, options.ignore_index)
        if index is None:
            d = narrow_rows(x, hidden_TD.dtype)
        else:
            d = rows_scratch(hidden_TD, len(index), vocabulary)
        logprob_backward(x, d, target, own, gradients, uncut, index)
        if needs.need_bias:
            d_bias_V += d.sum(0, dtype=dtype)
        if needs.need_hidden and index is None:
            wide_matmul(d, weight_VD, out=d_hidden_TD[rows])
        elif needs.need_hidden:
            d_hidden_TD[rows.start + index] = product(d, weight_VD)
        if needs.need_weight:
            add_product_(d_weight_VD, d.T, h if index is None else h[index], first=first)
            first = False
    if first:
        d_weight_VD.zero_()
    if shard is not None and needs.need_hidden:
        d_hidden_TD = shard.sum(d_hidden_TD)
    return d_hidden_TD, d_weight_VD, d_bias_V
