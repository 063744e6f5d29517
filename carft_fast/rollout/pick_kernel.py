"""`coupled.pick` in one Triton kernel: noise, sum and argmax, with the bits that the CPU draws. Never run on a GPU.

In torch's own operations the generator takes about 400 small ones a token; by their launches alone that is a third of
what reading a 7B's weights takes on an H100.
"""

# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_COUNTERS: int = 128
"""Philox counters a program: eight tokens each."""
_M0: tl.constexpr = tl.constexpr(0xD2E7470EE14C6C93)
_M1: tl.constexpr = tl.constexpr(0xCA5A826395121157)
_W0: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
_W1: tl.constexpr = tl.constexpr(0xBB67AE8584CAA73B)


@triton.jit
def _gumbel(bits):
    """Standard Gumbel noise of 32 random bits, as `coupled.gumbel_noise` has it."""
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # -log1p(-u), exact to the last places for small u, where the noise is large
    w = 1.0 - u
    exponential = tl.where(w == 1.0, u, tl.log(w) * (u / (w - 1.0)))
    return -tl.log(exponential)


@triton.jit
def _pick_kernel(logits, key, best, token, vocabulary, stride, PARTS, COUNTERS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    counter = part * COUNTERS + tl.arange(0, COUNTERS)
    a = (counter + 1).to(tl.uint64)  # numpy counts before it draws
    b = tl.zeros([COUNTERS], tl.uint64)
    c = tl.zeros([COUNTERS], tl.uint64)
    d = tl.zeros([COUNTERS], tl.uint64)
    key_0 = tl.load(key + 2 * row).to(tl.uint64)
    key_1 = tl.load(key + 2 * row + 1).to(tl.uint64)
    m0 = tl.full([COUNTERS], _M0, tl.uint64)
    m1 = tl.full([COUNTERS], _M1, tl.uint64)
    for _ in tl.static_range(10):
        high_0 = tl.umulhi(a, m0)
        high_1 = tl.umulhi(c, m1)
        low_0 = a * m0
        low_1 = c * m1
        a = high_1 ^ b ^ key_0
        b = low_1
        c = high_0 ^ d ^ key_1
        d = low_0
        key_0 += tl.full([], _W0, tl.uint64)
        key_1 += tl.full([], _W1, tl.uint64)
    best_value = -float("inf")
    best_token = vocabulary
    for half in tl.static_range(8):
        if half // 2 == 0:
            word = a
        elif half // 2 == 1:
            word = b
        elif half // 2 == 2:
            word = c
        else:
            word = d
        bits = (word >> (32 * (half % 2))).to(tl.uint32)
        column = 8 * counter + half
        value = tl.load(logits + row * stride + column, mask=column < vocabulary, other=-float("inf")) + _gumbel(bits)
        most = tl.max(value, axis=0)
        first = tl.min(tl.where(value == most, column, vocabulary), axis=0)
        better = (most > best_value) | ((most == best_value) & (first < best_token))
        best_value = tl.where(better, most, best_value)
        best_token = tl.where(better, first, best_token)
    tl.store(best + row * PARTS + part, best_value)
    tl.store(token + row * PARTS + part, best_token)


def best_of_parts(processed_NV: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """float32 [N, P] and int32 [N, P]: the largest sum of logit and noise in each part of the vocabulary, its token."""
    rows, vocabulary = processed_NV.shape
    parts = triton.cdiv(vocabulary, 8 * _COUNTERS)
    key_N2 = torch.tensor([seeds, positions], dtype=torch.int64).T.contiguous().to(processed_NV.device)
    best_NP = processed_NV.new_empty(rows, parts)
    token_NP = torch.empty(rows, parts, dtype=torch.int32, device=processed_NV.device)
    _pick_kernel[(rows, parts)](
        processed_NV.contiguous(), key_N2, best_NP, token_NP, vocabulary, vocabulary, parts, COUNTERS=_COUNTERS
    )
    return best_NP, token_NP


def pick_on_gpu(processed_NV: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """See `coupled.pick`."""
    best_NP, token_NP = best_of_parts(processed_NV, seeds, positions)
    return token_NP.gather(1, best_NP.argmax(-1, keepdim=True))[:, 0].long()
