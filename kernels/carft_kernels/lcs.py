"""Longest common subsequence of pairs of token sequences, as masks of the common tokens on either side.

    L[i, j] = L[i-1, j-1] + 1 if a_i = b_j else max(L[i-1, j], L[i, j-1])

Of the subsequences of that length, the one found from the end: a pair of equal last tokens is taken; otherwise the last
token of `a` goes if L[i-1, j] > L[i, j-1], else that of `b`, ties too. The published code follows the same rule, on
whole rows; here a caller passes what should be compared, completions only. Source: paper eq. 8.

What the walk back needs of L is one bit a cell, whether it exceeds its left neighbour. That row of bits is one integer,
and a whole row costs a handful of operations on it (Hyyrö 2004): O(n m / 30) in all, by the 30 bits of a word of
Python's. Triton: one program a pair, a row at a time, all of whose n m cells are compared, in words of 32 columns whose
carries one scan finds; then one program a pair walks back.
"""

# mypy: disable-error-code="no-untyped-def"

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from carft_kernels._runtime import (
    Impl,
    check_cu_seqlens,
    check_integer,
    check_rising,
    launch,
    log_implementation,
    to_device,
    use_triton,
)

_LONGEST_B = 8_192  # a row of the table lives in the registers of one program
_TABLE_BYTES = 1 << 30


def lcs_mask_reference(a: Tensor, a_cu: Tensor, b: Tensor, b_cu: Tensor) -> tuple[Tensor, Tensor]:
    """The obvious expression: the whole table, cell by cell."""
    masks = torch.zeros_like(a, dtype=torch.bool), torch.zeros_like(b, dtype=torch.bool)
    for pair in range(len(a_cu) - 1):
        a_start, b_start = int(a_cu[pair]), int(b_cu[pair])
        x, y = a[a_start : a_cu[pair + 1]].tolist(), b[b_start : b_cu[pair + 1]].tolist()
        table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
        for i in range(1, len(x) + 1):
            for j in range(1, len(y) + 1):
                same = x[i - 1] == y[j - 1]
                table[i][j] = table[i - 1][j - 1] + 1 if same else max(table[i - 1][j], table[i][j - 1])
        i, j = len(x), len(y)
        while i and j:
            if x[i - 1] == y[j - 1]:
                i, j = i - 1, j - 1
                masks[0][a_start + i] = masks[1][b_start + j] = True
            elif table[i - 1][j] > table[i][j - 1]:
                i -= 1
            else:
                j -= 1
    return masks


def _common_positions(x: list[int], y: list[int]) -> tuple[list[int], list[int]]:
    where: dict[int, int] = {}
    for j, token in enumerate(y):
        where[token] = where.get(token, 0) | 1 << j
    all_bits = (1 << len(y)) - 1
    rows, bits = [], all_bits  # bit j is 0 where L[i, j + 1] = L[i, j] + 1
    for token in x:
        matching = bits & where.get(token, 0)
        bits = (bits + matching | bits - matching) & all_bits
        rows.append(bits)
    in_x, in_y = [], []
    i, j = len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            in_x.append(i)
            in_y.append(j)
        elif rows[i - 1] >> (j - 1) & 1:
            j -= 1
        else:
            i -= 1
    return in_x, in_y


@triton.jit
def _carries(generate_a, propagate_a, generate_b, propagate_b):
    """Whether two neighbours, a the lower, pass a carry on: one of their own, and one that comes to them."""
    return generate_b | (propagate_b & generate_a), propagate_a & propagate_b


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["b_cu", "tables"])
def lcs_table_kernel(a, a_cu, b, b_cu, rows_of_bits, tables, first, WORDS: tl.constexpr):
    """One program a pair. Bit j % 32 of rows_of_bits[i, j // 32] is 0 where L[i + 1, j + 1] = L[i + 1, j] + 1."""
    pair = first + tl.program_id(0)
    a_start = tl.load(a_cu + pair)
    b_start = tl.load(b_cu + pair)
    rows = tl.load(a_cu + pair + 1) - a_start
    columns = tl.load(b_cu + pair + 1) - b_start
    words = (columns + 31) // 32
    out = rows_of_bits + tl.load(tables + tl.program_id(0))
    w = tl.arange(0, WORDS)
    k = tl.arange(0, 32)
    j = w[:, None] * 32 + k[None, :]
    inside = j < columns
    tokens = tl.load(b + b_start + j, mask=inside, other=0)
    one = tl.where(inside, 1, 0).to(tl.uint32) << k[None, :].to(tl.uint32)
    bits = tl.full([WORDS], 0xFFFFFFFF, tl.int64)
    for i in range(rows):
        same = tokens == tl.load(a + a_start + i)
        matching = bits & tl.sum(tl.where(same, one, 0), 1).to(tl.int64)
        total = bits + matching
        full = (total & 0xFFFFFFFF) == 0xFFFFFFFF
        carries, _ = tl.associative_scan(((total >> 32).to(tl.int32), full.to(tl.int32)), 0, _carries)
        carry = tl.where(w == 0, 0, tl.gather(carries, tl.maximum(w - 1, 0), 0))
        bits = (total + carry | bits - matching) & 0xFFFFFFFF
        tl.store(out + i * words + w, bits.to(tl.int32), mask=w < words)


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["b_cu", "tables"])
def lcs_walk_kernel(a, a_cu, b, b_cu, rows_of_bits, tables, first, mask_a, mask_b):
    """One program a pair, from the last cell of its table to an edge."""
    pair = first + tl.program_id(0)
    a_start = tl.load(a_cu + pair)
    b_start = tl.load(b_cu + pair)
    i = tl.load(a_cu + pair + 1) - a_start
    j = tl.load(b_cu + pair + 1) - b_start
    words = (j + 31) // 32
    table = rows_of_bits + tl.load(tables + tl.program_id(0))
    while (i > 0) & (j > 0):
        if tl.load(a + a_start + i - 1) == tl.load(b + b_start + j - 1):
            i -= 1
            j -= 1
            tl.store(mask_a + a_start + i, 1)
            tl.store(mask_b + b_start + j, 1)
        else:
            bit = tl.load(table + (i - 1) * words + (j - 1) // 32).to(tl.int64) >> (j - 1) % 32 & 1
            i -= 1 - bit
            j -= bit


def table_config(longest_b: int) -> dict[str, int]:
    words = max(2, triton.next_power_of_2(triton.cdiv(longest_b, 32)))
    return {"WORDS": words, "num_warps": max(1, min(16, words // 16))}


def _groups(words: list[int]) -> list[tuple[int, int]]:
    """Ranges of pairs whose tables fit the scratch together; one pair always makes a group."""
    groups, start, used = [], 0, 0
    for pair, size in enumerate(words):
        if 4 * (used + size) > _TABLE_BYTES and pair > start:
            groups.append((start, pair))
            start, used = pair, 0
        used += size
    return [*groups, (start, len(words))]


# offsets of the device are read back, which no CUDA graph can hold
@torch.library.custom_op("carft::lcs_mask", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _lcs_mask(
    a: Tensor, a_cu: Tensor, b: Tensor, b_cu: Tensor, via_triton: bool, any_length: bool
) -> tuple[Tensor, Tensor]:
    """`any_length`: torch takes over what is too long for Triton."""
    a_offsets, b_offsets = a_cu.tolist(), b_cu.tolist()
    check_rising("a_cu", a_offsets, len(a))  # the host has them: no reason to leave it out on CUDA
    check_rising("b_cu", b_offsets, len(b))
    mask_a, mask_b = torch.zeros_like(a, dtype=torch.bool), torch.zeros_like(b, dtype=torch.bool)
    pairs = [*zip(itertools.pairwise(a_offsets), itertools.pairwise(b_offsets), strict=True)]
    longest_b = max((end - start for _, (start, end) in pairs), default=0)
    if via_triton and longest_b > _LONGEST_B:
        if not any_length:
            raise ValueError(
                f"b holds a sequence of {longest_b} tokens: impl='triton' takes up to {_LONGEST_B}; use 'torch'"
            )
        via_triton = False
    log_implementation("lcs_mask", via_triton, a.device.type)
    if not via_triton:
        x, y = a.tolist(), b.tolist()
        in_a, in_b = [], []
        for (a_start, a_end), (b_start, b_end) in pairs:
            i, j = _common_positions(x[a_start:a_end], y[b_start:b_end])
            in_a += [a_start + k for k in i]
            in_b += [b_start + k for k in j]
        mask_a[to_device(in_a, a.device)] = True
        mask_b[to_device(in_b, b.device)] = True
        return mask_a, mask_b
    words = [(a_end - a_start) * triton.cdiv(b_end - b_start, 32) for (a_start, a_end), (b_start, b_end) in pairs]
    if not any(words):
        return mask_a, mask_b
    groups = _groups(words)
    starts = [start for first, end in groups for start in itertools.accumulate([0, *words[first : end - 1]])]
    a_cu, b_cu, tables = to_device([a_offsets, b_offsets, [*starts, 0]], a.device)
    for first, end in groups:
        rows_of_bits = a.new_empty(sum(words[first:end]), dtype=torch.int32)
        shared = a, a_cu, b, b_cu, rows_of_bits, tables[first:], first
        launch(lcs_table_kernel, end - first, *shared, **table_config(longest_b))
        launch(lcs_walk_kernel, end - first, *shared, mask_a.view(torch.uint8), mask_b.view(torch.uint8), num_warps=1)
    return mask_a, mask_b


@_lcs_mask.register_fake
def _(a: Tensor, a_cu: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a, dtype=torch.bool), torch.empty_like(b, dtype=torch.bool)


def lcs_mask(a: Tensor, a_cu: Tensor, b: Tensor, b_cu: Tensor, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """For each pair of packed sequences, mark the tokens of one longest common subsequence on both sides.

    Equivalent, for each pair: fill the table L of the module's formula and walk back from its last cell.

    Args:
        a: int64 or int32 [T_a], packed token ids.
        a_cu: int64 or int32 [B + 1], offsets of its sequences, from 0 to T_a; on the CPU or on the device of `a`. A
            GPU's are read back, which the host waits for; the CPU's are sent there, and nothing waits.
        b, b_cu: the other sides, as many sequences; dtype and device as `a` and `a_cu`.
        impl: "auto" (Triton on CUDA for sequences of `b` up to 8,192 tokens, torch else), "triton" or "torch".

    Returns:
        bool [T_a] and bool [T_b]; pair by pair as many tokens on one side as on the other, equal in order. No gradient.
        The torch implementation reads the tokens back from a GPU.

    Source: paper eq. 8; the tie rule of the published code.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed. Offsets are checked on every device.
    """
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 1:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected 1 dimension")
        check_integer(name, x)
    if b.dtype != a.dtype or b.device != a.device:
        raise ValueError(f"b is {b.dtype} on {b.device}: expected {a.dtype} on {a.device}, as a is")
    check_cu_seqlens("a_cu", a_cu, "a", a, host_allowed=True)
    check_cu_seqlens("b_cu", b_cu, "b", b, host_allowed=True)
    if b_cu.numel() != a_cu.numel():
        raise ValueError(f"b_cu has shape {tuple(b_cu.shape)}: expected {tuple(a_cu.shape)}, that of a_cu")
    via_triton = use_triton("lcs_mask", impl, a)
    return _lcs_mask(a.contiguous(), a_cu.contiguous(), b.contiguous(), b_cu.contiguous(), via_triton, impl == "auto")
