"""Triton kernels of pooling by value and of InfoNCE against their references in float64."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import carft_kernels as ck
from carft_kernels.masked_infonce import masked_infonce_reference
from carft_kernels.value_pool import value_pool_reference

from .checks import DEVICE, DTYPES, FEW, compare, offsets, randint, randn, rng, seeds
from .half_precision import ProductIn

# --- pooling ----------------------------------------------------------------------------------------------------------


@FEW
@given(
    seed=seeds,
    lengths=st.lists(st.integers(0, 20) | st.just(140), min_size=1, max_size=4),
    width=st.integers(1, 40) | st.just(515),
    share=st.sampled_from([0.0, 0.5, 1.0, None]),
    dtype=st.sampled_from(DTYPES),
)
def test_value_pool(seed: int, lengths: list[int], width: int, share: float | None, dtype: torch.dtype) -> None:
    tokens, cu = sum(lengths), offsets(lengths)
    mask = None if share is None else (torch.rand(tokens, generator=rng(seed)) < share).to(DEVICE)

    def plain(h: Tensor, v: Tensor) -> Tensor:
        y = torch.promote_types(h.dtype, torch.float32)
        return value_pool_reference(h.to(y), v.to(y), cu, mask_T=mask)[0] + 0 * (h.sum() + v.sum()).to(y)

    compare(
        lambda h, v: ck.value_pool(h, v, cu, mask_T=mask, impl="triton")[0],
        plain,
        (randn(seed, tokens, width).to(dtype), randn(seed + 1, tokens, scale=4).to(dtype)),
    )
    value = randn(seed + 1, tokens, scale=20).float().to(DEVICE)
    hidden = torch.zeros(tokens, 3, device=DEVICE)
    ours, theirs = (ck.value_pool(hidden, value, cu, mask_T=mask, impl=impl)[1] for impl in ("triton", "torch"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_value_pool_long_sequence_whose_first_tokens_do_not_count() -> None:
    tokens = 1300
    hidden, value = randn(0, tokens, 20).float(), randn(1, tokens, scale=3).float()
    value += torch.arange(tokens) / 100  # the maximum keeps rising
    mask = (torch.arange(tokens) >= 520).to(DEVICE)
    compare(
        lambda h, v: ck.value_pool(h, v, offsets([tokens]), mask_T=mask, impl="triton")[0],
        lambda h, v: value_pool_reference(h, v, offsets([tokens]), mask_T=mask)[0],
        (hidden, value),
    )


# --- InfoNCE ----------------------------------------------------------------------------------------------------------


@FEW
@given(
    seed=seeds,
    n=st.integers(1, 40),
    extra=st.integers(0, 40),
    width=st.integers(16, 40),
    temperature=st.sampled_from([0.01, 0.2, 5.0]),
    clamp=st.sampled_from([0.1, 0.9]),
    mask_kind=st.sampled_from(["none", "columns", "pairs"]),
    dtype=st.sampled_from(DTYPES),
)
@example(565657, 1, 31, 21, 5.0, 0.9, "none", torch.bfloat16)
@example(215729, 1, 17, 16, 0.01, 0.1, "none", torch.bfloat16)
def test_masked_infonce(
    seed: int, n: int, extra: int, width: int, temperature: float, clamp: float, mask_kind: str, dtype: torch.dtype
) -> None:
    m = n + extra
    positive = randint(seed, m, n)  # repeats are allowed
    rows = (torch.rand(n, generator=rng(seed + 2)) < 0.6).to(DEVICE)
    rows[0] = True
    mask = None
    if mask_kind == "columns":
        mask = (torch.rand(m, generator=rng(seed + 3)) < 0.5).to(DEVICE)
        mask[positive] = True
    elif mask_kind == "pairs":
        mask = (torch.rand(n, m, generator=rng(seed + 3)) < 0.5).to(DEVICE)
        mask[torch.arange(n), positive] = True
    options: dict[str, Any] = {
        "positive_N": positive,
        "row_mask_N": rows,
        "candidate_mask": mask,
        "temperature": temperature,
        "positive_clamp": clamp,
    }

    def plain(a: Tensor, c: Tensor) -> Tensor:
        y = torch.promote_types(a.dtype, torch.float32)
        if dtype != torch.bfloat16 or y == torch.float64:
            loss, row_loss = masked_infonce_reference(a.to(y), c.to(y), **options)
            return loss + row_loss.mean()
        a, c = a.float(), c.float()
        x = ProductIn.apply(a, c, dtype) / (a.norm(dim=1, keepdim=True) * c.norm(dim=1)) / temperature
        pull = x.gather(1, positive[:, None])[:, 0].clamp(max=clamp / temperature)
        row_loss = (x if mask is None else x.masked_fill(~mask, -torch.inf)).logsumexp(1) - pull
        return row_loss[rows].mean() + row_loss.mean()

    def operator(a: Tensor, c: Tensor) -> Tensor:
        loss, row_loss = ck.masked_infonce(a, c, **options, impl="triton")
        return loss + row_loss.mean()

    # of one candidate p is 1 but for a rounding of 6e-8, which the temperature divides
    candidates = m if mask is None else int(mask.sum(-1).max())
    floor = max(1e-2, 0.01 / temperature) if candidates == 1 else 1e-2
    compare(operator, plain, (randn(seed, n, width).to(dtype), randn(seed + 1, m, width).to(dtype)), floor)


@pytest.mark.parametrize("upstream", ["one", "wide", "loss scale", "tiny"])
def test_masked_infonce_in_float16_holds_what_is_small(upstream: str) -> None:
    """Row by row, to what float16 rounds: small probabilities, norms and gradients over many powers of ten."""
    n, m, width = 24, 1500, 32
    anchor, candidate = randn(0, n, width), randn(1, m, width)
    anchor *= 10 ** (3 * torch.rand(n, 1, generator=rng(2), dtype=torch.float64) - 2)
    candidate *= 10 ** (3 * torch.rand(m, 1, generator=rng(3), dtype=torch.float64) - 2)
    candidate[7] = 0
    wide = 10 ** (6 * torch.rand(n, generator=rng(4), dtype=torch.float64) - 4)
    wide[3] = 0
    factor = {"one": torch.ones(n), "wide": wide, "loss scale": torch.full((n,), 30.0), "tiny": wide * 1e-3}[upstream]
    results = []
    for dtype, function in (
        (torch.float16, partial(ck.masked_infonce, impl="triton")),
        (torch.float64, ck.masked_infonce),
    ):
        leaves = [x.half().to(dtype).to(DEVICE).requires_grad_() for x in (anchor, candidate)]
        row_loss = function(*leaves, temperature=0.05)[1]
        results.append(torch.autograd.grad((row_loss * factor.to(row_loss)).sum(), leaves))
    for ours, truth in zip(*results, strict=True):
        truth = truth.clamp(-65_504, 65_504)
        error = (ours.double().clamp(-65_504, 65_504) - truth).norm(dim=1)
        assert (error <= 2**-10 * truth.norm(dim=1) + 2**-25 * width**0.5).all()


@pytest.mark.parametrize("pairs", [False, True])
def test_masked_infonce_with_whole_tiles_left_out(pairs: bool) -> None:
    mask = torch.arange(140, device=DEVICE) >= 70
    positive = randint(3, 70, 50) + 70
    options: dict[str, Any] = {"positive_N": positive, "candidate_mask": mask.expand(50, 140) if pairs else mask}
    compare(
        lambda a, c: ck.masked_infonce(a, c, **options, impl="triton")[0],
        lambda a, c: masked_infonce_reference(a, c, **options)[0],
        (randn(0, 50, 16).float(), randn(1, 140, 16).float()),
    )


def test_masked_infonce_rows_that_do_not_count() -> None:
    anchor, candidate = (randn(i, 6, 20).float().to(DEVICE).requires_grad_() for i in (0, 1))
    mask = torch.ones(6, 6, dtype=torch.bool, device=DEVICE)
    mask[4] = False  # no candidate at all
    rows = torch.tensor([True, False, True, True, False, True], device=DEVICE)
    loss, row_loss = ck.masked_infonce(anchor, candidate, row_mask_N=rows, candidate_mask=mask, impl="triton")
    assert row_loss[4] == 0
    torch.testing.assert_close(loss, row_loss[rows].mean())
    gradients = torch.autograd.grad(loss, (anchor, candidate))
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][[1, 4]].any()
    none = torch.zeros(6, dtype=torch.bool, device=DEVICE)
    loss, _ = ck.masked_infonce(anchor, candidate, row_mask_N=none, impl="triton")
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, (anchor, candidate)))
