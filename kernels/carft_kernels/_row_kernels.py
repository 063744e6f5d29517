"""Triton kernels over rows of logits, shared by the log-prob operators and the policy loss; and where a packed sequence
begins and ends.

Row kernels: one program a row of V logits, in float32 whatever the logits' dtype, powers of two instead of e.
A row is cut in three, so that every load but a few is 128 bits wide whatever V and the row's address: full tiles from
the first 16-byte boundary, one tile masked by whole vectors, and up to seven elements at either end.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from carft_kernels._runtime import FUSED, LN2, LOG2E, on_device

# exp2 of this is 0; stands in for -inf where -inf * 0 would be NaN
_LOWEST = tl.constexpr(-1e4)
_LN2 = tl.constexpr(0.6931471805599453)
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
        e_z = tl.sum(tl.sum(e * tl.maximum(z, _LOWEST), 2), 0)
        spread = rescale * (spread + moved * total) + e_z
    return new_top, rescale * total + tl.sum(tl.sum(e, 2), 0), spread


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
    value = (tl.fma(x, scale, -largest) - log2_total) * _LN2
    tl.store(logprob + row, tl.where(ignored | (value > 0.0), 0.0, value))
    if ENTROPY:
        moved = tl.where(top == float("-inf"), 0.0, top - shift)
        row_spread = tl.sum(rescale * (spread + moved * total), 0)
        row_spread += tl.sum(edge_e * tl.maximum(edge_z, _LOWEST), 0)
        tl.store(entropy + row, tl.where(ignored, 0.0, (log2_total - row_spread / row_total) * _LN2))


@triton.jit
def _d_logits(x, column, target, scale, top, log_total, g, g_p, g_plogp, softcap, ENTROPY: tl.constexpr):
    if softcap is not None:
        x, slope = soft_cap(x, softcap)
    z = tl.fma(x, scale, -top) - log_total
    p = tl.exp2(z)
    if ENTROPY:
        d = -p * (g_p + g_plogp * tl.maximum(z, _LOWEST))
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
    row_index,  # int64: the row of each program (COMPACT)
    target,
    row_top,
    log_total,
    entropy,
    d_logprob,
    d_entropy,
    d_lse,  # or None: no gradient of the log-sum-exp
    vocabulary,
    stride,
    out_stride,
    scale,  # log2(e) / temperature
    inverse_temperature,
    ignore_index,  # a row with this target is not read: its gradient is 0
    softcap,  # or None: logits as they are
    COMPACT: tl.constexpr,
    NARROW: tl.constexpr,  # a row of half precision at the beginning of its own float32 row
    ENTROPY: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    if COMPACT:
        row = tl.load(row_index + program)
    else:
        row = program
    start = row * stride
    end = start + vocabulary
    aligned = (start + 7) // 8 * 8
    aligned_end = tl.maximum(end // 8 * 8, aligned)
    # An out offset is the logit's plus `move`. Where a gradient takes its logit's place that is 0, which the compiler
    # must know; elsewhere both strides are multiples of 16, so that a row's vectors stay vectors wherever it goes.
    if COMPACT or NARROW:
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
    g_plogp = 0.0
    if d_lse is not None:
        g_p -= tl.load(d_lse + row, mask=live, other=0.0) * inverse_temperature
    if ENTROPY:
        g_entropy = tl.load(d_entropy + row, mask=live, other=0.0) * inverse_temperature
        g_p += g_entropy * tl.load(entropy + row, mask=live, other=0.0)
        g_plogp = g_entropy * _LN2
    offset, vector = _tile_offsets(GROUPS, LANES, VECTOR)
    tile: tl.constexpr = GROUPS * LANES * VECTOR
    rest = aligned + (aligned_end - aligned) // tile * tile
    live_rest = tl.where(live, rest, aligned)
    for base in range(aligned, live_rest, tile):
        column = base + offset
        x = tl.load(logits + column).to(tl.float32)
        d = _d_logits(x, column, row_target, scale, largest, log2_total, g, g_p, g_plogp, softcap, ENTROPY)
        if NARROW:  # a store reaches columns that other threads have read in this round, and none that come later
            tl.debug_barrier()
        tl.store(out + column, d.to(out.dtype.element_ty))
    for base in range(live_rest, rest, tile):
        tl.store(out + base + offset, tl.zeros([GROUPS, LANES, VECTOR], out.dtype.element_ty))
    column = rest + offset
    vectors = (aligned_end - rest) // VECTOR
    whole = vector < vectors
    x = tl.load(logits + column, mask=vector < tl.where(live, vectors, 0), other=0.0).to(tl.float32)
    d = _d_logits(x, column, row_target, scale, largest, log2_total, g, g_p, g_plogp, softcap, ENTROPY)
    if NARROW:
        tl.debug_barrier()
    tl.store(out + column, d.to(out.dtype.element_ty), mask=whole)
    k = tl.arange(0, 16)
    column = tl.where(k < 8, start + k, aligned_end + k - 8)
    inside = tl.where(k < 8, column < tl.minimum(aligned, end), column < end)
    live_end = tl.where(live, end, start)
    read = tl.where(k < 8, column < tl.minimum(aligned, live_end), column < live_end)
    x = tl.load(logits + column, mask=read, other=0.0).to(tl.float32)
    d = _d_logits(x, column, row_target, scale, largest, log2_total, g, g_p, g_plogp, softcap, ENTROPY)
    if NARROW:
        tl.debug_barrier()
    tl.store(out + column, d.to(out.dtype.element_ty), mask=inside)


def narrow_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, V] of `dtype` in the memory of float32 rows, each at the beginning of its own: for their gradient."""
    return x.view(dtype)[:, : x.shape[1]]


def logprob_forward(
    logits_TV: Tensor,
    target_T: Tensor,
    temperature: float,
    with_entropy: bool,
    ignore_index: int,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log-prob, entropy (empty unless asked), row maximum, log2 of the sum of exponentials below it; float32 [T]."""
    tokens, vocabulary = logits_TV.shape
    logprob_T, top_T, log_total_T = (logits_TV.new_empty(tokens, dtype=torch.float32) for _ in range(3))
    entropy_T = logits_TV.new_empty(tokens if with_entropy else 0, dtype=torch.float32)
    if tokens:
        with on_device(logits_TV):
            logprob_fwd_kernel[(tokens,)](
                logits_TV,
                target_T,
                logprob_T,
                entropy_T,
                top_T,
                log_total_T,
                vocabulary,
                logits_TV.stride(0),
                LOG2E / temperature,
                ignore_index,
                softcap,
                ENTROPY=with_entropy,
                **row_config(logits_TV.dtype),
            )
    return logprob_T, entropy_T, top_T, log_total_T


def lse_of(top_T: Tensor, log_total_T: Tensor) -> Tensor:
    """log-sum-exp [T] of the statistics that the kernels keep in powers of two."""
    return (top_T + log_total_T) * LN2


def logprob_backward(
    logits_TV: Tensor,
    out_NV: Tensor,
    target_T: Tensor,
    top_T: Tensor,
    log_total_T: Tensor,
    d_logprob_T: Tensor,
    temperature: float,
    ignore_index: int,
    *,
    entropy_T: Tensor | None = None,
    d_entropy_T: Tensor | None = None,
    d_lse_T: Tensor | None = None,
    softcap: float | None = None,
    index_N: Tensor | None = None,
) -> None:
    """Gradient with respect to the logits into `out_NV`, of the rows in `index_N` if given.

    Bytes: each logit read once, each gradient written once. Entropy and log-sum-exp take part when their gradient is
    given. `out_NV` may be the logits, or their `narrow_rows`.
    """
    if len(out_NV) == 0:
        return
    narrow = out_NV.dtype != logits_TV.dtype and out_NV.data_ptr() == logits_TV.data_ptr()
    # logits that are a view with a gap between rows
    if index_N is None and not narrow and logits_TV.stride(0) != out_NV.stride(0):
        index_N = torch.arange(len(out_NV), device=out_NV.device)
    with on_device(logits_TV):
        logprob_bwd_kernel[(len(out_NV),)](
            logits_TV,
            out_NV,
            index_N,
            target_T,
            top_T,
            log_total_T,
            entropy_T,
            d_logprob_T,
            d_entropy_T,
            d_lse_T,
            logits_TV.shape[1],
            logits_TV.stride(0),
            out_NV.stride(0),
            LOG2E / temperature,
            1 / temperature,
            ignore_index,
            softcap,
            COMPACT=index_N is not None,
            NARROW=narrow,
            ENTROPY=d_entropy_T is not None,
            **row_config(logits_TV.dtype, group=8),
        )
