"""Targets that are ignored, and targets outside the vocabulary."""

from typing import Any

import pytest
import torch
from torch import Tensor

import carft_kernels as ck

from .checks import DEVICE, randint, randn

IMPLEMENTATIONS = ["torch", "triton"]
T, V, D = 9, 37, 16
IGNORED = torch.tensor([True, False, False, True, True, False, False, False, True])
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def some_ignored(ignore_index: int, dtype: torch.dtype = torch.int64) -> Tensor:
    target = (randint(0, V - 1, T) + 1).to(dtype)  # never 0
    target[IGNORED.to(DEVICE)] = ignore_index
    return target


def poisoned(x: Tensor) -> Tensor:
    """float32 of float64, its ignored rows NaN."""
    return x.float().masked_fill(IGNORED.reshape(-1, *[1] * (x.ndim - 1)), torch.nan).to(DEVICE)


def oracle(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens that count, in float64."""
    logp = logits.log_softmax(-1)
    return logp[torch.arange(len(target)), target.long().cpu()], -(logp.exp() * logp).sum(-1)


def leaves(*inputs: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in inputs]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("ignore_index", [-100, 0, V, 1 << 30])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("inplace", [False, True])
def test_token_logprob_ignores(impl: Any, inplace: bool, ignore_index: int, dtype: torch.dtype) -> None:
    target, kept, up = some_ignored(ignore_index, dtype), ~IGNORED, randn(4, 2, T)
    exact = randn(1, T, V, scale=3)
    (x,) = leaves(poisoned(exact))
    upstream = up.clone()
    upstream[:, IGNORED] = torch.inf  # whatever it is
    logprob, entropy = ck.token_logprob(
        x * 1,
        target,
        temperature=0.7,
        with_entropy=True,
        ignore_index=ignore_index,
        inplace_backward=inplace,
        impl=impl,
    )
    assert entropy is not None
    gradient = torch.autograd.grad([logprob, entropy], x, list(upstream.float().to(DEVICE)))[0].cpu()
    (y,) = leaves(exact)
    expected = oracle(y[kept] / 0.7, target[kept.to(DEVICE)])
    (expected_gradient,) = torch.autograd.grad(expected, y, [u[kept] for u in up])
    for ours, theirs in zip((logprob.cpu(), entropy.cpu()), expected, strict=True):
        torch.testing.assert_close(ours[kept].double(), theirs, **CLOSE)
        assert ours[IGNORED].tolist() == [0.0] * int(IGNORED.sum())
    torch.testing.assert_close(gradient.double(), expected_gradient, **CLOSE)
    loss = torch.nn.functional.cross_entropy(
        exact.float() / 0.7, target.long().cpu(), reduction="none", ignore_index=ignore_index
    )
    torch.testing.assert_close(logprob.detach().cpu(), -loss, **CLOSE)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_ignored_row_of_several_tiles_is_neither_read_nor_left_as_it_was(inplace: bool) -> None:
    vocabulary = 4_111
    x = randn(0, 3, vocabulary).float().to(DEVICE)
    x[1] = torch.nan
    target = torch.tensor([5, -100, vocabulary - 1], device=DEVICE)
    (logits,) = leaves(x)
    logprob, _ = ck.token_logprob(logits * 1, target, inplace_backward=inplace, impl="triton")
    (gradient,) = torch.autograd.grad(logprob.sum(), logits)
    exact = x[[0, 2]].cpu().double().requires_grad_()
    expected, _ = oracle(exact, target[[0, 2]])
    torch.testing.assert_close(logprob[[0, 2]].cpu().double(), expected, **CLOSE)
    torch.testing.assert_close(gradient[[0, 2]].cpu().double(), torch.autograd.grad(expected.sum(), exact)[0], **CLOSE)
    assert logprob[1].item() == 0
    assert not gradient[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_linear_logprob_ignores(impl: Any, dtype: torch.dtype) -> None:
    target, kept, up = some_ignored(-100), ~IGNORED, randn(4, 2, T)
    exact = [x.to(dtype).double() for x in (randn(1, T, D), randn(2, V, D, scale=0.3), randn(3, V))]
    low = leaves(poisoned(exact[0]).to(dtype), *(x.to(dtype).to(DEVICE) for x in exact[1:]))
    logprob, entropy = ck.linear_logprob(low[0], low[1], target, bias=low[2], with_entropy=True, impl=impl)
    assert entropy is not None
    gradients = torch.autograd.grad([logprob, entropy], low, list(up.float().to(DEVICE)))
    hidden, weight, bias = leaves(*exact)
    expected = oracle(hidden[kept] @ weight.T + bias, target[kept.to(DEVICE)])
    expected_gradients = torch.autograd.grad(expected, (hidden, weight, bias), [u[kept] for u in up])
    close = CLOSE if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    for ours, theirs in zip((logprob.cpu(), entropy.cpu()), expected, strict=True):
        torch.testing.assert_close(ours[kept].double(), theirs, **close)
        assert ours[IGNORED].tolist() == [0.0] * int(IGNORED.sum())
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, **close)
    assert not gradients[0].cpu()[IGNORED].any()


def policy_vectors() -> dict[str, Tensor]:
    names = ("advantage_T", "old_logprob_T", "weight_T", "ref_logprob_T")
    return {n: randn(i + 5, T) - (3.6 if "logprob" in n else 0) for i, n in enumerate(names)}


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_linear_policy_loss_ignores(impl: Any, chunk_tokens: int | None, entropy_coef: float) -> None:
    """Loss, gradients and every metric are those of the tokens that count, alone."""
    target, kept = some_ignored(-100), ~IGNORED
    exact, vectors = [randn(1, T, D), randn(2, V, D, scale=0.3)], policy_vectors()
    hidden, weight = leaves(poisoned(exact[0]), exact[1].float().to(DEVICE))
    loss, logprob, metrics = ck.linear_policy_loss(
        hidden,
        weight,
        target,
        **{name: poisoned(x) for name, x in vectors.items()},
        kl_coef=0.1,
        entropy_coef=entropy_coef,
        chunk_tokens=chunk_tokens,
        impl=impl,
    )
    gradients = torch.autograd.grad(loss, (hidden, weight))
    h, w = leaves(*exact)
    new, entropy = oracle(h[kept] @ w.T, target[kept.to(DEVICE)])
    advantage, old, share, ref = (x[kept] for x in vectors.values())
    ratio, k3 = (new - old).exp(), (ref - new).exp() - (ref - new) - 1
    terms = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)) + 0.1 * k3 - entropy_coef * entropy
    expected = (share * terms).sum()
    torch.testing.assert_close(loss.cpu().double(), expected, **CLOSE)
    torch.testing.assert_close(logprob.cpu()[kept].double(), new, **CLOSE)
    assert logprob.cpu()[IGNORED].tolist() == [0.0] * int(IGNORED.sum())
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (h, w)), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, **CLOSE)
    means = {
        "clip_fraction": ((ratio < 0.8) | (ratio > 1.2)).double().mean(),
        "approx_kl": (ratio - 1 - ratio.log()).mean(),
        "entropy": entropy.mean(),
    }
    for name, mean in means.items():
        torch.testing.assert_close(metrics[name].cpu().double(), mean.detach(), **CLOSE)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_only_ignored_tokens(impl: Any) -> None:
    target, nan = torch.full((T,), -100, device=DEVICE), torch.full((T,), torch.nan, device=DEVICE)
    logits, hidden, weight = leaves(
        torch.full((T, V), torch.nan, device=DEVICE), nan[:, None].expand(T, D), randn(2, V, D).float().to(DEVICE)
    )
    loss, _, metrics = ck.linear_policy_loss(
        hidden, weight, target, advantage_T=nan, old_logprob_T=nan, weight_T=nan, entropy_coef=0.1, impl=impl
    )
    outputs = [
        loss,
        *metrics.values(),
        ck.token_logprob(logits, target, impl=impl)[0].sum(),
        ck.linear_logprob(hidden, weight, target, impl=impl)[0].sum(),
    ]
    assert [float(x) for x in outputs] == [0.0] * len(outputs)
    total = torch.stack([x for x in outputs if x.requires_grad]).sum()
    assert not any(g.any() for g in torch.autograd.grad(total, (logits, hidden, weight)))


# 2^32 + 1 is 1 in 32 bits, 2^31 of int64 is negative there
@pytest.mark.parametrize("outside", [-1, -101, V, V + 5, (1 << 31) + 3, (1 << 32) + 1, -(1 << 40)])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.usefixtures("unchecked")
def test_a_target_outside_the_vocabulary_is_nan_where_nothing_checks_it(impl: Any, outside: int) -> None:
    """And no other token's number changes; a token that nothing weighs may hold it."""
    good = randint(0, V, T)
    bad = good.clone()
    bad[3] = outside
    others, ones = torch.arange(T) != 3, torch.ones(T, device=DEVICE)
    without = ones.clone()
    without[3] = 0
    logits, hidden, weight = (x.float().to(DEVICE) for x in (randn(1, T, V), randn(2, T, D), randn(3, V, D)))

    def policy(h: Tensor, w: Tensor, target: Tensor, share: Tensor) -> Tensor:
        options: dict[str, Any] = {"advantage_T": ones, "old_logprob_T": None, "weight_T": share, "impl": impl}
        return ck.linear_policy_loss(h, w, target, **options)[0]

    rows = {
        "token_logprob": (lambda target, x: ck.token_logprob(x, target, impl=impl)[0], (logits,)),
        "linear_logprob": (lambda target, h, w: ck.linear_logprob(h, w, target, impl=impl)[0], (hidden, weight)),
    }
    for name, (function, inputs) in rows.items():
        x, y = leaves(*inputs), leaves(*inputs)
        ours, theirs = function(bad, *x), function(good, *y)
        assert ours[3].isnan(), name
        assert torch.equal(ours[others], theirs[others]), name
        everything = torch.autograd.grad(ours.sum(), x, retain_graph=True)
        assert everything[0][3].isnan().all()
        assert not everything[0][others].isnan().any()
        for a, b in zip(torch.autograd.grad(ours, x, without), torch.autograd.grad(theirs, y, without), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
    (h, w), (other_h, other_w) = leaves(hidden, weight), leaves(hidden, weight)
    assert policy(h, w, bad, ones).isnan()
    ours, theirs = policy(h, w, bad, without), policy(other_h, other_w, good, without)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    for a, b in zip(torch.autograd.grad(ours, (h, w)), torch.autograd.grad(theirs, (other_h, other_w)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("outside", [-1, V, (1 << 32) + 1])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.usefixtures("unchecked")
def test_a_positive_outside_the_candidates_is_nan_where_nothing_checks_it(impl: Any, outside: int) -> None:
    anchor, candidate = (x.float().to(DEVICE) for x in (randn(1, T, D), randn(2, V, D)))
    good = randint(0, V, T)
    bad = good.clone()
    bad[3] = outside
    rows = torch.arange(T, device=DEVICE) != 3
    (a, c), (other_a, other_c) = leaves(anchor, candidate), leaves(anchor, candidate)
    loss, row_loss = ck.masked_infonce(a, c, positive_N=bad, impl=impl)
    assert loss.isnan()
    assert row_loss.isnan().tolist() == (~rows).tolist()
    assert torch.autograd.grad(loss, a)[0][3].isnan().all()
    ours, _ = ck.masked_infonce(a, c, positive_N=bad, row_mask_N=rows, impl=impl)
    theirs, _ = ck.masked_infonce(other_a, other_c, positive_N=good, row_mask_N=rows, impl=impl)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    for x, y in zip(torch.autograd.grad(ours, (a, c)), torch.autograd.grad(theirs, (other_a, other_c)), strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_other_targets_outside_the_vocabulary_are_errors_where_they_are_checked(impl: Any) -> None:
    x, hidden, weight, vector = (
        z.float().to(DEVICE) for z in (randn(0, T, V), randn(1, T, D), randn(2, V, D), randn(3, T))
    )
    policy = {"advantage_T": vector, "old_logprob_T": vector, "weight_T": vector}
    for outside in (-1, V):
        target = some_ignored(-100)
        target[1] = outside
        for call in (
            lambda t: ck.token_logprob(x, t, impl=impl),
            lambda t: ck.linear_logprob(hidden, weight, t, impl=impl),
            lambda t: ck.linear_policy_loss(hidden, weight, t, **policy, impl=impl),
        ):
            text = rf"target_T holds {outside}: expected values in \[0, {V}\), or ignore_index = -100"
            with pytest.raises(ValueError, match=text):
                call(target)
    with pytest.raises(ValueError, match=f"ignore_index = {1 << 40}: expected a 32-bit integer"):
        ck.token_logprob(x, some_ignored(-100), ignore_index=1 << 40, impl=impl)
