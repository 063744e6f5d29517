"""Triton kernels for the softmax statistics of a @ b^T without the product: LM head and contrastive similarities alike.

One program computes one tile of the product on the tensor cores and reduces it to, per row, the maximum, the sum of
exponentials, the sum that entropy needs, and the target's logit; a second kernel combines the tiles of a row. Tiles go
in groups of rows, so that a group's `a` stays in the L2 cache while `b` passes by. Powers of two instead of e.
"""

# mypy: disable-error-code="no-untyped-def"

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from carft_kernels._row_kernels import KERNEL_LN2, LOWEST, RowOptions, RowStatistics, soft_cap
from carft_kernels._runtime import FUSED, INTERPRETED, LOG2E, launch

_ROWS_PER_LAUNCH = 16_384  # bounds the [tiles, rows] scratch: 117 MB for a vocabulary of 152,064


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Tile of the product, depth of a step along the inner dimension, and how the launch runs it."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool

    def launch(self, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": 16,
            "TMA": self.tma,
            # three TF32 products give float32 accuracy on the tensor cores
            "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **FUSED,
        }


def tile_config(capability: tuple[int, int], dtype: torch.dtype, *, tma: bool, plain: bool) -> TileConfig:
    """The configuration that ships for a compute capability.

    `tma`: the operands meet what the copy engine asks. `plain`: logits are the bare product; factors, a mask or a bias
    take registers that a wider tile needs for itself.
    """
    hopper, blackwell = capability[0] == 9, capability[0] == 10
    narrow = 64 if blackwell else 128
    if dtype == torch.float32:
        return TileConfig(128 if hopper or blackwell else 64, 128 if plain else narrow, 32, 8, 3, False)
    if hopper or (blackwell and tma):
        return TileConfig(128, 256 if plain else narrow, 64, 8, 4, tma)
    if blackwell:  # without the copy engine addresses take registers too
        return TileConfig(128, 128 if plain else narrow, 64, 8, 4, False)
    return TileConfig(128, 256 if plain else 128, 32, 8, 4, False)


_INTERPRETER_TILES = TileConfig(16, 32, 16, 4, 1, False)


def _tma_ready(x: Tensor) -> bool:
    """What the Tensor Memory Accelerator asks: 16-byte base and row stride, rows that do not overlap."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.stride(0) >= x.shape[1]


def config_for(a: Tensor, b: Tensor, *, plain: bool) -> TileConfig:
    tma = _tma_ready(a) and _tma_ready(b)
    if INTERPRETED:
        return dataclasses.replace(_INTERPRETER_TILES, tma=tma and a.dtype != torch.float32)
    capability = torch.cuda.get_device_capability(a.device)
    return tile_config(capability, a.dtype, tma=tma, plain=plain)


def operand(x: Tensor, rows: int, config: TileConfig) -> Any:
    """What the kernel gets for a matrix: its tensor, or a descriptor of `rows` x BLOCK_K tiles."""
    return TensorDescriptor.from_tensor(x, [rows, config.block_k]) if config.tma else x


@triton.jit
def tile_of(pid, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column block of a program: GROUP_M row blocks share the columns that pass by."""
    m_blocks = tl.cdiv(m, BLOCK_M)
    n_blocks = tl.cdiv(n, BLOCK_N)
    group = pid // (GROUP_M * n_blocks)
    first = group * GROUP_M
    height = tl.minimum(m_blocks - first, GROUP_M)
    inside = pid % (GROUP_M * n_blocks)
    return first + inside % height, inside // height


@triton.jit
def product_tile(
    a,  # [m, k]
    b,  # [n, k]
    row_block,
    column_block,
    m,
    n,
    k,
    stride_a,
    stride_b,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """float32 tile of a @ b^T. Rows beyond m or n hold anything finite or not: mask them."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if TMA:
        for i in range(0, k, BLOCK_K):
            x = a.load([row_block * BLOCK_M, i])
            y = b.load([column_block * BLOCK_N, i])
            acc = tl.dot(x, y.T, acc, input_precision=PRECISION)
    else:
        rows = ((row_block * BLOCK_M + tl.arange(0, BLOCK_M)) % m).to(tl.int64)
        columns = ((column_block * BLOCK_N + tl.arange(0, BLOCK_N)) % n).to(tl.int64)
        inner = tl.arange(0, BLOCK_K)
        x_ptr = a + rows[:, None] * stride_a + inner[None, :]
        y_ptr = b + columns[None, :] * stride_b + inner[:, None]
        for i in range(0, k, BLOCK_K):
            x = tl.load(x_ptr, mask=inner[None, :] < k - i, other=0.0)
            y = tl.load(y_ptr, mask=inner[:, None] < k - i, other=0.0)
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
            x_ptr += BLOCK_K
            y_ptr += BLOCK_K
    return acc


@triton.jit
def tile_logits(acc, row_factor, column_factor, bias, rows, columns, m, n):
    """Logits before the temperature: the product, its rows and columns scaled, plus the bias."""
    if row_factor is not None:
        x = tl.load(row_factor + rows, mask=rows < m, other=0.0)
        y = tl.load(column_factor + columns, mask=columns < n, other=0.0)
        acc = acc * x[:, None] * y[None, :]
    if bias is not None:
        acc += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def tile_mask(mask, rows, columns, m, n, MASK: tl.constexpr):
    """The columns that exist and are allowed: MASK 0 all, 1 by column, 2 by row and column."""
    allowed = (columns < n)[None, :] & (rows < m)[:, None]
    if MASK == 1:
        allowed = allowed & (tl.load(mask + columns, mask=columns < n, other=0) != 0)[None, :]
    if MASK == 2:
        place = rows.to(tl.int64)[:, None] * n + columns[None, :]
        allowed = allowed & (tl.load(mask + place, mask=allowed, other=0) != 0)
    return allowed


# The number of rows, which every packed batch changes, is not compiled in. n, the vocabulary, is: it stays what it is.
@triton.jit(do_not_specialize=["m"], do_not_specialize_on_alignment=["target"])
def matmul_lse_kernel(
    a,
    b,
    bias,
    row_factor,
    column_factor,
    mask,
    target,
    top,  # [column blocks, m], as total and spread
    total,
    spread,  # or None: no entropy
    target_logit,  # [m]
    logits,  # float32 [m, n], rows `stride_logits` apart, before the soft cap; or None
    m,
    n,
    k,
    stride_a,
    stride_b,
    stride_logits,
    scale,
    softcap,  # or None: logits as they are
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_block, column_block = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    acc = product_tile(
        a, b, row_block, column_block, m, n, k, stride_a, stride_b, BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION
    )
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    x = tile_logits(acc, row_factor, column_factor, bias, rows, columns, m, n)
    if logits is not None:
        logits += row_block.to(tl.int64) * BLOCK_M * stride_logits + column_block * BLOCK_N
        place = tl.arange(0, BLOCK_M)[:, None] * stride_logits + tl.arange(0, BLOCK_N)[None, :]
        tl.store(logits + place, x, mask=(rows < m)[:, None] & (columns < n)[None, :])
    if softcap is not None:
        x, _ = soft_cap(x, softcap)
    wanted = tl.load(target + rows, mask=rows < m, other=-1).to(tl.int32)
    here = (wanted >= column_block * BLOCK_N) & (wanted < (column_block + 1) * BLOCK_N)
    x_target = tl.sum(tl.where(columns[None, :] == wanted[:, None], x, 0.0), 1)
    tl.store(target_logit + rows, x_target, mask=here)

    x = tl.where(tile_mask(mask, rows, columns, m, n, MASK), x, float("-inf"))
    tile_top = tl.max(x, 1) * scale
    shift = tl.where(tile_top == float("-inf"), 0.0, tile_top)
    z = tl.fma(x, scale, -shift[:, None])
    e = tl.exp2(z)
    place = column_block.to(tl.int64) * m + rows
    tl.store(top + place, tile_top, mask=rows < m)
    tl.store(total + place, tl.sum(e, 1), mask=rows < m)
    if spread is not None:
        tl.store(spread + place, tl.sum(e * tl.maximum(z, LOWEST), 1), mask=rows < m)


@triton.jit(do_not_specialize=["m", "ignore_index"], do_not_specialize_on_alignment=["target"])
def combine_kernel(
    top,
    total,
    spread,
    target_logit,
    target,
    logprob,
    entropy,
    row_top,
    log_total,
    m,
    n,
    blocks,
    ignore_index,
    scale,
    target_limit,  # the target's logit counts as at most this
    logprob_limit,  # 0 where the target is one of the columns: rounding must not make it more
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Statistics of a row's tiles into log-prob, entropy, maximum and log2 of the sum of exponentials below it."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < m
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    row_total = tl.zeros([ROWS], tl.float32)
    row_spread = tl.zeros([ROWS], tl.float32)
    for i in range(0, blocks, BLOCKS):
        block = i + tl.arange(0, BLOCKS)
        place = block.to(tl.int64)[:, None] * m + rows[None, :]
        here = (block < blocks)[:, None] & inside[None, :]
        t = tl.load(top + place, mask=here, other=float("-inf"))
        s = tl.load(total + place, mask=here, other=0.0)
        new_top = tl.maximum(largest, tl.max(t, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        z = t - shift[None, :]
        rescale = tl.exp2(largest - shift)
        if spread is not None:
            d = tl.load(spread + place, mask=here, other=0.0)
            moved = tl.where(largest == float("-inf"), 0.0, largest - shift)
            row_spread = rescale * (row_spread + moved * row_total)
            row_spread += tl.sum(tl.exp2(z) * (d + tl.maximum(z, LOWEST) * s), 0)
        row_total = row_total * rescale + tl.sum(tl.exp2(z) * s, 0)
        largest = new_top
    # a target outside the columns, which nothing checks on a GPU, has a log-prob of NaN
    wanted = tl.load(target + rows, mask=inside, other=0)
    x = tl.load(target_logit + rows, mask=inside & (wanted >= 0) & (wanted < n), other=float("nan"))
    row_total = tl.where(inside, row_total, 1.0)
    log2_total = tl.log2(row_total)
    value = (tl.fma(tl.where(x > target_limit, target_limit, x), scale, -largest) - log2_total) * KERNEL_LN2
    value = tl.where(value > logprob_limit, logprob_limit, value)
    h = (log2_total - row_spread / row_total) * KERNEL_LN2
    ignored = wanted == ignore_index
    value = tl.where(ignored, 0.0, value)
    h = tl.where(ignored, 0.0, h)
    largest = tl.where(ignored, 0.0, largest)
    log2_total = tl.where(ignored, 0.0, log2_total)
    tl.store(logprob + rows, value, mask=inside)
    tl.store(row_top + rows, largest, mask=inside)
    tl.store(log_total + rows, log2_total, mask=inside)
    if spread is not None:
        tl.store(entropy + rows, h, mask=inside)


COMBINE_CONFIG = {"ROWS": 64, "BLOCKS": 16, "num_warps": 4, **FUSED}


def matmul_logprob(
    a_MK: Tensor,
    b_NK: Tensor,
    target_M: Tensor,
    options: RowOptions,
    *,
    bias_N: Tensor | None = None,
    row_factor_M: Tensor | None = None,
    column_factor_N: Tensor | None = None,
    mask: Tensor | None = None,
    target_limit: float = float("inf"),
    logprob_limit: float = 0.0,
    with_entropy: bool = False,
    logits_MN: Tensor | None = None,
) -> RowStatistics:
    """Statistics of the rows of x, x_ij = row_factor_i column_factor_j a_i . b_j + bias_j, capped and over the
    temperature by the options.

    x itself, in float32 and not capped, goes into `logits_MN` where that is given. `mask` (uint8, [N] or [M, N]) leaves
    columns out of the sum; a target's x counts as at most `target_limit`. All is 0 where the target is ignored; the
    log-prob of any other target outside [0, N) is NaN. FLOP: 2 M N K, once.
    """
    (m, k), n = a_MK.shape, len(b_NK)
    scale = LOG2E / options.temperature
    found = RowStatistics.empty(a_MK, with_entropy)
    if m == 0:
        return found
    target_logit_M = torch.empty_like(found.logprob_T)
    plain = row_factor_M is None and bias_N is None and options.logit_softcap is None
    config = config_for(a_MK, b_NK, plain=plain)
    blocks = triton.cdiv(n, config.block_n)
    b = operand(b_NK, config.block_n, config)
    for s in range(0, m, _ROWS_PER_LAUNCH):
        rows = slice(s, s + _ROWS_PER_LAUNCH)
        a, target, target_logit = a_MK[rows], target_M[rows], target_logit_M[rows]
        # apart, so that where they start does not depend on the number of rows
        top, total = (a_MK.new_empty(blocks, len(a), dtype=torch.float32) for _ in range(2))
        tiles = top, total, torch.empty_like(total) if with_entropy else None
        logits = None if logits_MN is None else logits_MN[rows]
        row_factor = None if row_factor_M is None else row_factor_M[rows]
        inputs = bias_N, row_factor, column_factor_N, mask if mask is None or mask.ndim == 1 else mask[rows], target
        strides = a_MK.stride(0), b_NK.stride(0), 0 if logits is None else logits.stride(0)
        launch(
            matmul_lse_kernel,
            triton.cdiv(len(a), config.block_m) * blocks,
            *(operand(a, config.block_m, config), b, *inputs, *tiles, target_logit, logits),
            *(len(a), n, k, *strides, scale, options.logit_softcap),
            MASK=0 if mask is None else mask.ndim,
            **config.launch(a_MK.dtype),
        )
        launch(
            combine_kernel,
            triton.cdiv(len(a), COMBINE_CONFIG["ROWS"]),
            *(*tiles, target_logit, target, *(x[rows] for x in found)),
            *(len(a), n, blocks, options.ignore_index, scale, target_limit, logprob_limit),
            **COMBINE_CONFIG,
        )
    return found
