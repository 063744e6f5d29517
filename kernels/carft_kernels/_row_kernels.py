"""Statistics of rows of logits and their gradient, shared by the log-prob operators and the policy loss; and where a
packed sequence begins and ends.

Torch: rows in chunks, so that a float32 copy of half-precision logits is never whole. Triton: one program a row of V
logits, in float32 whatever the logits' dtype, powers of two instead of e.
A row is cut in three, so that every load but a few is 128 bits wide whatever V and the row's address: full tiles from
the first 16-byte boundary, one tile masked by whole vectors, and up to seven elements at either end.
"""

# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Iterator
from typing import NamedTuple, TypedDict

import torch
import triton
import triton.language as tl
from torch import Tensor

from carft_kernels._runtime import (
    FUSED,
    LN2,
    LOG2E,
    Impl,
    accumulation_dtype,
    check_integer,
    check_like,
    check_positive,
    chunk_size,
    launch,
    token_chunks,
)


class RowOptions(NamedTuple):
    """What the softmax over a row is of: logits, capped by `logit_softcap` tanh(x / `logit_softcap`), over the
    temperature, of these what `keep_top_` leaves. A row whose target is `ignore_index` is not read."""

    temperature: float
    logit_softcap: float | None
    top_k: int
    top_p: float
    ignore_index: int
    via_triton: bool

    @property
    def cuts(self) -> bool:
        return self.top_k > 0 or self.top_p < 1

    def uncut(self) -> "RowOptions":
        """Of logits that `keep_top_` has seen."""
        return self._replace(top_k=0, top_p=1.0)

    def checked(self, name: str, target_T: Tensor, like_name: str, like: Tensor) -> Tensor:
        """The targets, one for each row of `like`. Raises ValueError for them and for the options."""
        check_like(name, target_T, (len(like),), like_name, like)
        check_integer(name, target_T)
        check_positive("temperature", self.temperature)
        if self.logit_softcap is not None and not 0 < self.logit_softcap < math.inf:
            raise ValueError(f"logit_softcap = {self.logit_softcap}: expected a finite number above 0, or None")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}: expected an integer of at least 0, where 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p = {self.top_p}: expected a number above 0 and at most 1, where 1 keeps every token"
            )
        if not -(1 << 31) <= self.ignore_index < 1 << 31:
            raise ValueError(f"ignore_index = {self.ignore_index}: expected a 32-bit integer")
        return target_T.contiguous()


class LogprobOptions(TypedDict, total=False):
    """Keyword arguments of the log-prob operators."""

    temperature: float
    with_entropy: bool
    logit_softcap: float | None
    top_k: int
    top_p: float
    ignore_index: int
    impl: Impl


class RowStatistics(NamedTuple):
    """[T] each: log-prob of the target, entropy (empty unless asked), row maximum, log of the sum of exponentials below
    it. The last two in powers of two with Triton."""

    logprob_T: Tensor
    entropy_T: Tensor
    top_T: Tensor
    log_total_T: Tensor

    @staticmethod
    def empty(like: Tensor, with_entropy: bool) -> "RowStatistics":
        """Without their values, for the rows of `like`."""
        tokens, dtype = like.shape[0], accumulation_dtype(like)
        sizes = (tokens, tokens if with_entropy else 0, tokens, tokens)
        return RowStatistics._make(like.new_empty(size, dtype=dtype) for size in sizes)

    def at(self, rows: slice) -> "RowStatistics":
        return RowStatistics._make(x[rows] for x in self)

    def lse(self, options: RowOptions) -> Tensor:
        """log-sum-exp [T]."""
        return (self.top_T + self.log_total_T) * (LN2 if options.via_triton else 1.0)


class RowGradients(NamedTuple):
    """[T] each, of log-prob, entropy and log-sum-exp. None: the latter two take no part."""

    d_logprob_T: Tensor
    d_entropy_T: Tensor | None
    d_lse_T: Tensor | None

    @staticmethod
    def given(
        d_logprob_T: Tensor | None, d_entropy_T: Tensor | None, d_lse_T: Tensor | None, logprob_T: Tensor
    ) -> "RowGradients":
        """As autograd has them; contiguous, where the gradient of a sum is an expanded scalar."""
        d_logprob_T = torch.zeros_like(logprob_T) if d_logprob_T is None else d_logprob_T.contiguous()
        d_entropy_T, d_lse_T = (None if d is None or not d.numel() else d.contiguous() for d in (d_entropy_T, d_lse_T))
        return RowGradients(d_logprob_T, d_entropy_T, d_lse_T)

    def at(self, rows: slice | Tensor) -> "RowGradients":
        return RowGradients._make(None if d is None else d[rows] for d in self)


_SORTED_LOGITS = 1 << 25
"""Logits that top-k and top-p sort at once: about 1 GB with the sort's own memory."""
# exp2 of this is 0; stands in for -inf where -inf * 0 would be NaN
LOWEST = tl.constexpr(-1e4)
KERNEL_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(LOG2E)
_NUM_WARPS = 8


def row_config(dtype: torch.dtype, *, group: int = 16) -> dict[str, int]:
    """A thread takes groups of 16 logits, in 128-bit loads: 8 of half precision, 4 of float32."""
    vector = 16 // dtype.itemsize
    return {"GROUPS": group // vector, "LANES": 32 * _NUM_WARPS, "VECTOR": vector, "num_warps": _NUM_WARPS, **FUSED}


@triton.jit
def _tile_offsets(GROUPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """[GROUPS, LANES, VECTOR] offsets of a tile, and [GROUPS, LANES, 1] number of each vector."""
    vector = tl.arange(0, GROUPS)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]
    return vector * VECTOR + tl.arange(0, VECTOR)[None, None, :], vector


@triton.jit
def soft_cap(x, cap):
    """cap * tanh(x / cap), where -inf stays -inf, and the derivative with respect to x."""
    t = 1.0 - 2.0 / (tl.exp2(x * (2.0 * _LOG2E / cap)) + 1.0)
    return tl.where(x == float("-inf"), x, cap * t), 1.0 - t * t


@triton.jit
def _online(x, scale, top, total, spread, ENTROPY: tl.constexpr):
    """One step of the online softmax, a lane at a time: one maximum, so one rescaling, for a group of 16 logits.

    top = running max of x scale, total = sum 2^z with z = x scale - top, spread = sum 2^z z. The fused multiply-add
    rounds z once: however large the logits, those that count keep all their digits.
    """
    new_top = tl.maximum(top, tl.max(tl.max(x, 2), 0) * scale)
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # only -inf so far: -inf - 0, not -inf - -inf
    z = tl.fma(x, scale, -shift[None, :, None])
    e = tl.exp2(z)
    rescale = tl.exp2(top - shift)
    if ENTROPY:
        moved = tl.where(top == float("-inf"), 0.0, top - shift)
        e_z = tl.sum(tl.sum(e * tl.maximum(z, LOWEST), 2), 0)
        spread = rescale * (spread + moved * total) + e_z
    return new_top, rescale * total + tl.sum(tl.sum(e, 2), 0), spread


SEQUENCE_CONFIG = {"BLOCK": 512, "num_warps": 4, **FUSED}
"""Of a program for each sequence."""


@triton.jit
def sequence_bounds(cu_seqlens, tokens):
    """Start and end of this program's sequence, never outside [0, tokens], whatever the offsets hold.

    The first begins at 0 and the last ends at `tokens`: some sequence has every token, also where offsets are wrong.
    """
    b = tl.program_id(0)
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens + b).to(tl.int64), 0), tokens)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1).to(tl.int64), 0), tokens)
    return tl.where(b == 0, 0, start), tl.where(b == tl.num_programs(0) - 1, tokens, end)


@triton.jit
def offsets_rise(cu_seqlens, tokens, LANES: tl.constexpr = 128):
    """Whether all offsets are right: from 0 to `tokens`, never falling. LANES: one for each thread of four warps."""
    sequences = tl.num_programs(0)
    falls = tl.zeros([LANES], tl.int32)
    for i in range(0, sequences, LANES):
        j = i + tl.arange(0, LANES)
        inside = j < sequences
        start = tl.load(cu_seqlens + j, mask=inside, other=0)
        falls += (tl.load(cu_seqlens + j + 1, mask=inside, other=0) < start).to(tl.int32)
    ends = (tl.load(cu_seqlens) == 0) & (tl.load(cu_seqlens + sequences) == tokens)
    return ends & (tl.sum(falls, 0) == 0)


# Nothing that a packed batch changes is compiled in, neither its length nor where a chunk of a vector starts.
@triton.jit(
    do_not_specialize=["ignore_index"],
    do_not_specialize_on_alignment=["target", "logprob", "entropy", "row_top", "log_total"],
)
def logprob_fwd_kernel(
    logits,  # [rows, V], rows `stride` apart
    target,
    logprob,
    entropy,
    row_top,  # max_v scale x_v
    log_total,  # log2 sum_v 2^(scale x_v - row_top)
    vocabulary,
    stride,
    scale,  # log2(e) / temperature
    ignore_index,  # a row with this target is not read: its log-prob and entropy are 0
    softcap,  # or None: logits as they are
    ENTROPY: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(target + row)
    ignored = wanted == ignore_index
    start = row * stride
    end = start + tl.where(ignored, 0, vocabulary)
    aligned = (start + 7) // 8 * 8
    aligned_end = tl.maximum(end // 8 * 8, aligned)
    offset, vector = _tile_offsets(GROUPS, LANES, VECTOR)
    top = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    spread = tl.zeros([LANES], tl.float32)
    tile: tl.constexpr = GROUPS * LANES * VECTOR
    rest = aligned + (aligned_end - aligned) // tile * tile
    for base in range(aligned, rest, tile):
        x = tl.load(logits + base + offset).to(tl.float32)
        if softcap is not None:
            x, _ = soft_cap(x, softcap)
        top, total, spread = _online(x, scale, top, total, spread, ENTROPY)
    whole = vector < (aligned_end - rest) // VECTOR
    x = tl.load(logits + rest + offset, mask=whole, other=float("-inf")).to(tl.float32)
    if softcap is not None:
        x, _ = soft_cap(x, softcap)
    top, total, spread = _online(x, scale, top, total, spread, ENTROPY)
    # up to seven logits before the first boundary, up to seven behind the last
    k = tl.arange(0, 16)
    edge = tl.where(k < 8, start + k, aligned_end + k - 8)
    inside = tl.where(k < 8, edge < tl.minimum(aligned, end), edge < end)
    edge_x = tl.load(logits + edge, mask=inside, other=float("-inf")).to(tl.float32)
    if softcap is not None:
        edge_x, _ = soft_cap(edge_x, softcap)

    largest = tl.maximum(tl.max(top, 0), tl.max(edge_x, 0) * scale)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    rescale = tl.exp2(top - shift)
    edge_z = tl.fma(edge_x, scale, -shift)
    edge_e = tl.exp2(edge_z)
    row_total = tl.sum(total * rescale, 0) + tl.sum(edge_e, 0)
    row_total = tl.where(ignored, 1.0, row_total)
    log2_total = tl.log2(row_total)
    tl.store(row_top + row, tl.where(ignored, 0.0, largest))
    tl.store(log_total + row, log2_total)
    # a target outside the vocabulary, which nothing checks on a GPU, has a log-prob of NaN
    inside_row = (wanted >= 0) & (wanted < vocabulary) & (wanted != ignore_index)
    x = tl.load(logits + start + wanted, mask=inside_row, other=float("nan")).to(tl.float32)
    if softcap is not None:
        x, _ = soft_cap(x, softcap)
    # rounding must not make a probability larger than 1; the comparison lets NaN pass
    value = (tl.fma(x, scale, -largest) - log2_total) * KERNEL_LN2
    tl.store(logprob + row, tl.where(ignored | (value > 0.0), 0.0, value))
    if ENTROPY:
        moved = tl.where(top == float("-inf"), 0.0, top - shift)
        row_spread = tl.sum(rescale * (spread + moved * total), 0)
        row_spread += tl.sum(edge_e * tl.maximum(edge_z, LOWEST), 0)
        tl.store(entropy + row, tl.where(ignored, 0.0, (log2_total - row_spread / row_total) * KERNEL_LN2))


@triton.jit
def _d_logits(x, column, target, scale, top, log_total, g, g_p, g_plogp, softcap):
    if softcap is not None:
        x, slope = soft_cap(x, softcap)
    z = tl.fma(x, scale, -top) - log_total
    p = tl.exp2(z)
    if g_plogp is not None:
        d = -p * (g_p + g_plogp * tl.maximum(z, LOWEST))
    else:
        d = -p * g_p
    d = tl.where(column == target, d + g, d)
    if softcap is not None:
        d *= slope
    return d


@triton.jit(
    do_not_specialize=["ignore_index"],
    do_not_specialize_on_alignment=["target", "row_top", "log_total", "entropy", "d_logprob", "d_entropy", "d_lse"],
)
def logprob_bwd_kernel(
    logits,  # [rows, V], rows `stride` apart
    out,  # d_logits, [programs, V], rows `out_stride` apart; may be in the memory of the logits, row by row
    row_index,  # int64: the row of each program; or None: its own
    target,
    row_top,
    log_total,
    entropy,
    d_logprob,
    d_entropy,  # or None: no gradient of it, and of the next
    d_lse,
    vocabulary,
    stride,
    out_stride,
    scale,  # log2(e) / temperature
    inverse_temperature,
    ignore_index,  # a row with this target is not read: its gradient is 0
    softcap,  # or None: logits as they are
    NARROW: tl.constexpr,  # a row of half precision at the beginning of its own float32 row
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    if row_index is not None:
        row = tl.load(row_index + program)
    else:
        row = program
    start = row * stride
    end = start + vocabulary
    aligned = (start + 7) // 8 * 8
    aligned_end = tl.maximum(end // 8 * 8, aligned)
    # An out offset is the logit's plus `move`. Where a gradient takes its logit's place that is 0, which the compiler
    # must know; elsewhere both strides are multiples of 16, so that a row's vectors stay vectors wherever it goes.
    if row_index is not None or NARROW:
        out += program * out_stride - start
    wanted = tl.load(target + row)
    live = wanted != ignore_index
    row_target = start + wanted
    largest = tl.load(row_top + row, mask=live, other=0.0)
    log2_total = tl.load(log_total + row, mask=live, other=0.0)
    g = tl.load(d_logprob + row, mask=live, other=0.0) * inverse_temperature
    # the log-prob of a target outside the vocabulary is NaN, and so is its gradient
    g = tl.where(((wanted < 0) | (wanted >= vocabulary)) & live & (g != 0.0), float("nan"), g)
    g_p = g
    g_plogp = None
    if d_lse is not None:
        g_p -= tl.load(d_lse + row, mask=live, other=0.0) * inverse_temperature
    if d_entropy is not None:
        g_entropy = tl.load(d_entropy + row, mask=live, other=0.0) * inverse_temperature
        g_p += g_entropy * tl.load(entropy + row, mask=live, other=0.0)
        g_plogp = g_entropy * KERNEL_LN2
    offset, vector = _tile_offsets(GROUPS, LANES, VECTOR)
    tile: tl.constexpr = GROUPS * LANES * VECTOR
    rest = aligned + (aligned_end - aligned) // tile * tile
    live_rest = tl.where(live, rest, aligned)
    for base in range(aligned, live_rest, tile):
        column = base + offset
        x = tl.load(logits + column).to(tl.float32)
        d = _d_logits(x, column, row_target, scale, largest, log2_total, g, g_p, g_plogp, softcap)
        if NARROW:  # a store reaches columns that other threads have read in this round, and none that come later
            tl.debug_barrier()
        tl.store(out + column, d.to(out.dtype.element_ty))
    for base in range(live_rest, rest, tile):
        tl.store(out + base + offset, tl.zeros([GROUPS, LANES, VECTOR], out.dtype.element_ty))
    column = rest + offset
    vectors = (aligned_end - rest) // VECTOR
    whole = vector < vectors
    x = tl.load(logits + column, mask=vector < tl.where(live, vectors, 0), other=0.0).to(tl.float32)
    d = _d_logits(x, column, row_target, scale, largest, log2_total, g, g_p, g_plogp, softcap)
    if NARROW:
        tl.debug_barrier()
    tl.store(out + column, d.to(out.dtype.element_ty), mask=whole)
    k = tl.arange(0, 16)
    column = tl.where(k < 8, start + k, aligned_end + k - 8)
    inside = tl.where(k < 8, column < tl.minimum(aligned, end), column < end)
    live_end = tl.where(live, end, start)
    read = tl.where(k < 8, column < tl.minimum(aligned, live_end), column < live_end)
    x = tl.load(logits + column, mask=read, other=0.0).to(tl.float32)
    d = _d_logits(x, column, row_target, scale, largest, log2_total, g, g_p, g_plogp, softcap)
    if NARROW:
        tl.debug_barrier()
    tl.store(out + column, d.to(out.dtype.element_ty), mask=inside)


def narrow_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, V] of `dtype` in the memory of float32 rows, each at the beginning of its own: for their gradient."""
    vocabulary = x.shape[1]
    return x[:, : -(-vocabulary * dtype.itemsize // x.itemsize)].view(dtype)[:, :vocabulary]


def split_index(index_N: Tensor, size: int, ignore_index: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """int64 [N, 1] that can be gathered with, bool [N] which are ignored, bool [N] which are outside [0, size).

    Nothing is read back. What is outside gets NaN: without index checks it would be somebody else's number.
    """
    ignored_N = torch.zeros_like(index_N, dtype=torch.bool) if ignore_index is None else index_N == ignore_index
    outside_N = ((index_N < 0) | (index_N >= size)) & ~ignored_N
    return index_N.long().clamp(0, size - 1)[:, None], ignored_N, outside_N


def gradient_or_nan(d_N: Tensor, outside_N: Tensor) -> Tensor:
    """The gradient of a number that is NaN because its index is outside; 0 stays 0."""
    return d_N.masked_fill(outside_N & (d_N != 0), math.nan)


def soft_cap_reference(x: Tensor, cap: float) -> Tensor:
    """The obvious expression of `_scaled_`."""
    return torch.where(x == -math.inf, x, cap * (x / cap).tanh())


def logprob_reference(logits_TV: Tensor, target_T: Tensor, options: RowOptions) -> tuple[Tensor, Tensor, Tensor]:
    """The obvious expression: log-prob and entropy [T], 0 where a target is ignored, and the scaled logits [T, V]."""
    counted_T = target_T != options.ignore_index
    target_T1 = target_T.long()[:, None] * counted_T[:, None]
    x_TV = logits_TV.to(accumulation_dtype(logits_TV))
    if options.logit_softcap is not None:
        x_TV = soft_cap_reference(x_TV, options.logit_softcap)
    x_TV = keep_top_reference(x_TV / options.temperature, target_T1, options.top_k, options.top_p)
    logp_TV = x_TV.log_softmax(-1)
    # one of 1e-35 has no part in an entropy, and at 0 its derivative is infinite
    entropy_T = torch.special.entr(logp_TV.clamp(min=-80.0).exp()).sum(-1)
    return logp_TV.gather(1, target_T1)[:, 0] * counted_T, entropy_T * counted_T, x_TV


def keep_top_reference(x: Tensor, target_n1: Tensor, top_k: int, top_p: float) -> Tensor:
    """The obvious expression of `keep_top_`, of logits over the temperature."""
    if not top_k and top_p == 1:
        return x
    kept = x.sort(dim=-1, descending=True).values[:, : top_k or None]
    p = kept.softmax(-1)
    last_n1 = ((p.cumsum(-1) - p) < top_p).sum(-1, keepdim=True) - 1
    cut = (x < kept.gather(1, last_n1)).scatter(1, target_n1, False)
    return x.masked_fill(cut, -math.inf)


def keep_top_(x: Tensor, target_T: Tensor, options: RowOptions) -> None:
    """-inf in place of the logits [n, V] that top-k, then top-p leave out of the softmax of the options.

    Top-k keeps the k most likely; top-p the fewest of these that have its mass; both what is as likely as the last one
    kept. The target stays in any case. Nothing is read back.
    """
    if not options.cuts:
        return
    target_n1, *_ = split_index(target_T, x.shape[1], options.ignore_index)
    step = max(1, _SORTED_LOGITS // max(x.shape[1], 1))
    for rows, target in zip(x.split(step), target_n1.split(step), strict=True):
        z = rows.to(accumulation_dtype(rows), copy=True)
        _scaled_(z, options)
        k = min(options.top_k, z.shape[1])
        kept = z.topk(k).values if k else z.sort(dim=-1, descending=True).values
        if options.top_p < 1:
            p = kept.softmax(-1)
            kept.masked_fill_(p.cumsum(-1) - p >= options.top_p, math.inf)
        rows.masked_fill_((z < kept.amin(-1, keepdim=True)).scatter_(1, target, False), -math.inf)


def kept_rows(logits_TV: Tensor, target_T: Tensor, options: RowOptions) -> Iterator[tuple[slice, Tensor, RowOptions]]:
    """Rows, their logits, and the options of these: all as they are, or chunks of copies that `keep_top_` has seen."""
    if not options.cuts:
        yield slice(None), logits_TV, options
        return
    tokens, vocabulary = logits_TV.shape
    for rows in token_chunks(tokens, chunk_size(tokens, vocabulary, logits_TV.device)):
        x = logits_TV[rows].clone()
        keep_top_(x, target_T[rows], options)
        yield rows, x, options.uncut()


def _scaled_(x: Tensor, options: RowOptions) -> Tensor | None:
    """Logits over the temperature, in place, and the derivative of their cap where there is one."""
    slope = None
    if cap := options.logit_softcap:
        excluded = x == -math.inf
        x.div_(cap).tanh_()
        slope = x.square().neg_().add_(1.0)
        x.mul_(cap).masked_fill_(excluded, -math.inf)
    if options.temperature != 1.0:
        x.div_(options.temperature)
    return slope


def logprob_forward(logits_TV: Tensor, target_T: Tensor, options: RowOptions, with_entropy: bool) -> RowStatistics:
    """Every log-prob of this package that torch finds is found here: two operators agree to the bit on the same logits,
    and the ratio of a policy to itself is exactly 1."""
    found = RowStatistics.empty(logits_TV, with_entropy)
    tokens, vocabulary = logits_TV.shape
    if options.via_triton:
        launch(
            logprob_fwd_kernel,
            tokens,
            *(logits_TV, target_T, *found, vocabulary, logits_TV.stride(0)),
            *(LOG2E / options.temperature, options.ignore_index, options.logit_softcap),
            ENTROPY=with_entropy,
            **row_config(logits_TV.dtype),
        )
        return found
    logprob_T, entropy_T, top_T, log_total_T = found
    target_T1, ignored_T, outside_T = split_index(target_T, vocabulary, options.ignore_index)
    for rows in token_chunks(tokens, chunk_size(tokens, vocabulary, logits_TV.device)):
        x = logits_TV[rows].to(top_T.dtype, copy=True)
        _scaled_(x, options)
        top_T[rows] = x.amax(-1)
        x.sub_(top_T[rows, None])
        exp = x.exp()
        total = exp.sum(-1)
        log_total_T[rows] = total.log()
        logprob_T[rows] = x.gather(1, target_T1[rows])[:, 0] - log_total_T[rows]
        if with_entropy:  # exp * logit is 0 * -inf for an excluded column: its share is 0
            entropy_T[rows] = log_total_T[rows] - x.mul_(exp).nansum(-1) / total
    logprob_T.masked_fill_(outside_T, math.nan)
    for x_T in found:
        if len(x_T):
            x_T.masked_fill_(ignored_T, 0.0)
    return found


def logprob_backward(
    logits_TV: Tensor,
    out_NV: Tensor,
    target_T: Tensor,
    statistics: RowStatistics,
    gradients: RowGradients,
    options: RowOptions,
    index_N: Tensor | None = None,
) -> None:
    """Gradient with respect to the logits into `out_NV`, of the rows in `index_N` if given.

    Bytes: each logit read once, each gradient written once. `out_NV` may be the logits, or their `narrow_rows`.
    """
    over = index_N is None and out_NV.data_ptr() == logits_TV.data_ptr()
    if not options.via_triton:
        _logprob_backward_torch(logits_TV, out_NV, target_T, statistics, gradients, options, index_N, over)
        return
    narrow = over and out_NV.dtype != logits_TV.dtype
    # logits that are a view with a gap between rows
    if index_N is None and not narrow and logits_TV.stride(0) != out_NV.stride(0):
        index_N = torch.arange(len(out_NV), device=out_NV.device)
    launch(
        logprob_bwd_kernel,
        len(out_NV),
        *(logits_TV, out_NV, index_N, target_T, statistics.top_T, statistics.log_total_T, statistics.entropy_T),
        *(*gradients, logits_TV.shape[1], logits_TV.stride(0), out_NV.stride(0)),
        *(LOG2E / options.temperature, 1 / options.temperature, options.ignore_index, options.logit_softcap),
        NARROW=narrow,
        **row_config(logits_TV.dtype, group=8),
    )


def _logprob_backward_torch(
    logits_TV: Tensor,
    out_NV: Tensor,
    target_T: Tensor,
    statistics: RowStatistics,
    gradients: RowGradients,
    options: RowOptions,
    index_N: Tensor | None,
    over: bool,
) -> None:
    target_T1, ignored_T, outside_T = split_index(target_T, logits_TV.shape[1], options.ignore_index)
    gradients = gradients._replace(d_logprob_T=gradient_or_nan(gradients.d_logprob_T, outside_T))
    _, entropy_T, top_T, log_total_T = statistics
    for rows in token_chunks(len(out_NV), chunk_size(len(out_NV), logits_TV.shape[1], out_NV.device)):
        at = rows if index_N is None else index_N[rows]
        x = logits_TV[at].to(top_T.dtype, copy=not over)
        slope = _scaled_(x, options)
        logp = x.sub_(top_T[at, None]).sub_(log_total_T[at, None])
        d_logprob, d_entropy, d_lse = gradients.at(at)
        d_sum = d_logprob if d_lse is None else d_logprob - d_lse  # of what every logit takes part in
        if d_entropy is None:
            d = logp.exp_().mul_(-d_sum[:, None])
        else:
            p = logp.exp()
            # p (log p + H) is 0 where p is 0, though log p is -inf there
            d = torch.where(p > 0, p * logp.add_(entropy_T[at, None]), 0.0).mul_(-d_entropy[:, None])
            d.sub_(p.mul_(d_sum[:, None]))
        d.scatter_add_(1, target_T1[at], d_logprob[:, None])
        if options.temperature != 1.0:
            d.div_(options.temperature)
        if slope is not None:
            d.mul_(slope)
        zero_rows_(d, ignored_T[at])
        out = out_NV[rows]
        if d.dtype != out.dtype or d.data_ptr() != out.data_ptr():
            out.copy_(d.to(out.dtype))  # a copy first: a narrow row overlaps its own logits


def zero_rows_(x: Tensor, rows: Tensor) -> None:
    """x[rows] = 0 for bool rows, whatever x holds; nothing is read back from a GPU."""
    if x.device.type == "cpu":
        x.index_fill_(0, rows.nonzero()[:, 0], 0.0)  # touches those rows alone
    else:
        x.masked_fill_(rows[:, None], 0.0)
