"""Offsets of sequences that are wrong: an error where they are checked, NaN and no access outside where not."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import carft_kernels as ck
from carft_kernels._runtime import INTERPRETED

from .checks import DEVICE, offsets, randn

if INTERPRETED:
    from .interpreter import guarded

WRONG_OFFSETS = {
    "one falls": [0, 5, 3, 9],
    "negative": [0, -4, 9],
    "the first is negative": [-3, 4, 9],
    "far below": [-(1 << 30), 4, 9],
    "past the end": [0, 12, 9],
    "far past the end": [0, 1 << 30, 9],
    "the last is past the end": [0, 4, 12],
    "the first is not 0": [2, 4, 9],
    "the last is not T": [0, 4, 7],
    "reversed": [9, 4, 0],
    "all past the end": [20, 30, 40],
    "one sequence of more": [-1, 10],
    "past a whole block of them": [0] * 150 + [5, 4, 9],
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", WRONG_OFFSETS)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.usefixtures("unchecked")
def test_wrong_offsets_are_nan_and_never_an_access_outside(impl: Any, kind: str, dtype: torch.dtype) -> None:
    """Where nothing checks them. `make kernels-sanitize` watches compiled kernels, `guarded` interpreted ones."""
    cu = torch.tensor(WRONG_OFFSETS[kind], dtype=dtype, device=DEVICE)
    sequences = len(cu) - 1
    a, b = (randn(i, 9).float().to(DEVICE) for i in (0, 1))
    score = randn(2, sequences).float().to(DEVICE)
    mask = torch.arange(9, device=DEVICE) % 3 > 0
    hidden, value = (randn(*x).float().to(DEVICE).requires_grad_() for x in ((3, 9, 5), (4, 9)))
    with guarded() if INTERPRETED else nullcontext():
        found = [*ck.gae(a, b, cu, gamma=0.9, lam=0.9, impl=impl)]
        found += [ck.kl_shaped_reward(score, a, b, cu, kl_coef=0.1, impl=impl)]
        pooled, weight = ck.value_pool(hidden, value, cu, mask_T=mask, impl=impl)
        found += [weight, *torch.autograd.grad(pooled.sum(), (hidden, value))]
    for x in found:
        assert x.isnan().all()
    assert pooled.isnan().any()
    assert (pooled.isnan() | (pooled == 0)).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_wrong_offsets_are_errors_where_they_are_checked(impl: Any) -> None:
    x, hidden = torch.zeros(9, device=DEVICE), torch.zeros(9, 5, device=DEVICE)
    tokens, right = torch.zeros(9, dtype=torch.int64, device=DEVICE), offsets([4, 0, 5])
    for wrong, text in (
        ([0, 5, 3, 9], r"\[2\] = 3 comes after 5"),
        ([0, 4, -4, 9], r"\[2\] = -4 comes after 4"),
        ([0, 4, 12, 9], r"\[3\] = 9 comes after 12"),
        ([-1, 2, 3, 9], r" goes from -1 to 9: expected 0 to 9"),
        ([0, 2, 3, 12], r" goes from 0 to 12: expected 0 to 9"),
    ):
        cu = torch.tensor(wrong, device=DEVICE)
        for call in (
            lambda cu: ck.gae(x, x, cu, gamma=1.0, lam=1.0, impl=impl),
            lambda cu: ck.kl_shaped_reward(x[:3], x, x, cu, kl_coef=0.1, impl=impl),
            lambda cu: ck.value_pool(hidden, x, cu, impl=impl),
        ):
            with pytest.raises(ValueError, match="cu_seqlens" + text):
                call(cu)
        with pytest.raises(ValueError, match="a_cu" + text):
            ck.lcs_mask(tokens, cu, tokens, right, impl=impl)
