"""Pooling by value and InfoNCE against their references in float64."""

import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import carft_kernels as ck
from carft_kernels.masked_infonce import masked_infonce_reference
from carft_kernels.value_pool import value_pool_reference

from .checks import FAST, gradients, offsets_of, randn, rng, seeds


@FAST
@given(seed=seeds, lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), share=st.sampled_from([0.0, 0.5, 1.0]))
def test_value_pool(seed: int, lengths: list[int], share: float) -> None:
    tokens, cu = sum(lengths), offsets_of(lengths)
    hidden, value = randn(seed, tokens, 6), randn(seed + 1, tokens, scale=30.0)
    mask = torch.rand(tokens, generator=rng(seed)) < share
    up = randn(seed + 2, len(lengths), 6)
    expected, expected_weights = value_pool_reference(hidden, value, cu, mask_T=mask)
    pooled, weights = ck.value_pool(hidden, value, cu, mask_T=mask)
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(weights, expected_weights)
    if tokens:
        ours = gradients(lambda h, v: (ck.value_pool(h, v, cu, mask_T=mask)[0] * up).sum(), hidden, value)
        theirs = gradients(
            lambda h, v: (value_pool_reference(h, v, cu, mask_T=mask)[0] * up).sum() + 0 * (h.sum() + v.sum()),
            hidden,
            value,
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@FAST
@given(
    seed=seeds,
    n=st.integers(1, 8),
    extra=st.integers(0, 5),
    width=st.integers(1, 12),
    temperature=st.sampled_from([0.01, 0.2, 5.0]),
    clamp=st.sampled_from([0.1, 0.9, 1.0]),
    per_row=st.booleans(),
    small=st.booleans(),
)
def test_masked_infonce(
    seed: int, n: int, extra: int, width: int, temperature: float, clamp: float, per_row: bool, small: bool
) -> None:
    m = n + extra
    anchor, candidate = randn(seed, n, width), randn(seed + 1, m, width)
    positive = torch.randint(m, (n,), generator=rng(seed))  # repeats are allowed
    rows = torch.rand(n, generator=rng(seed + 2)) < 0.6
    mask = torch.rand((n, m) if per_row else (m,), generator=rng(seed + 3)) < 0.5
    if per_row:
        mask[torch.arange(n), positive] = True
    else:
        mask[positive] = True
    options: dict[str, Any] = {
        "positive_N": positive,
        "row_mask_N": rows,
        "candidate_mask": mask,
        "temperature": temperature,
        "positive_clamp": clamp,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["carft_kernels.masked_infonce"], "_SMALL", 1000 * small)
        loss, row_loss = ck.masked_infonce(anchor, candidate, **options)
        ours = gradients(lambda a, c: ck.masked_infonce(a, c, **options)[0], anchor, candidate)
    expected, expected_rows = masked_infonce_reference(anchor, candidate, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(row_loss[rows], expected_rows[rows])
    for gradient in ours:
        assert gradient.isfinite().all()
    if rows.any():
        theirs = gradients(lambda a, c: masked_infonce_reference(a, c, **options)[0], anchor, candidate)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    else:
        assert loss == 0
        assert not any(gradient.any() for gradient in ours)


def test_the_clamp_ends_the_pull() -> None:
    """Above the clamp a lone pair has no gradient through the numerator: only the denominator pushes it apart."""
    z = randn(0, 1, 8)
    near = z + 0.01 * randn(1, 1, 8)
    (gradient,) = gradients(lambda c: ck.masked_infonce(z, c)[0], near)
    cosine = near.clone().requires_grad_()
    (expected,) = torch.autograd.grad(torch.cosine_similarity(z, cosine).sum() / 0.2, cosine)
    torch.testing.assert_close(gradient, expected)
