"""Operators against float64 references and finite differences: hard values, odd shapes, half precision, bad input."""

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import carft_kernels as ck
from carft_kernels import _runtime
from carft_kernels.gae import gae_reference, kl_shaped_reward_reference, whiten_reference
from carft_kernels.linear_logprob import linear_logprob_reference
from carft_kernels.linear_policy_loss import linear_policy_loss_reference
from carft_kernels.masked_infonce import masked_infonce_reference
from carft_kernels.policy_loss import policy_loss_reference, value_loss_reference
from carft_kernels.token_logprob import token_logprob_reference
from carft_kernels.value_pool import value_pool_reference
from tests.processes import spawn

from .checks import DEVICE

FAST = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
TOKENS, WIDTH, VOCABULARY = 37, 19, 53  # nothing a power of two


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=rng(seed), dtype=torch.float64) * scale).to(dtype)


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves)


def assert_float32_error(actual: Tensor, reference: Tensor) -> None:
    """At most 1e-5 of the largest reference value."""
    error = (actual.double() - reference).abs().max() / reference.abs().max().clamp(min=1e-30)
    assert error <= 1e-5, float(error)


# --- log-prob ---------------------------------------------------------------------------------------------------------


@FAST
@given(
    seed=seeds, tokens=st.integers(0, 40), vocabulary=st.integers(1, 70), temperature=st.sampled_from([0.3, 1.0, 2.5])
)
def test_logprob_values_and_gradients(seed: int, tokens: int, vocabulary: int, temperature: float) -> None:
    hidden, weight = randn(seed, tokens, 5), randn(seed + 1, vocabulary, 5, scale=2.0)
    bias, target = randn(seed + 2, vocabulary), torch.randint(vocabulary, (tokens,), generator=rng(seed))
    up = randn(seed + 3, 2, tokens)

    def combine(pair: tuple[Tensor, Tensor | None]) -> Tensor:
        assert pair[1] is not None
        return (pair[0] * up[0].to(pair[0].dtype) + pair[1] * up[1].to(pair[0].dtype)).sum()

    options = {"temperature": temperature, "with_entropy": True}
    reference = gradients(
        lambda h, w, b: combine(linear_logprob_reference(h, w, target, bias=b, **options)), hidden, weight, bias
    )
    fused = gradients(lambda h, w, b: combine(ck.linear_logprob(h, w, target, bias=b, **options)), hidden, weight, bias)
    for ours, theirs in zip(fused, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    expected = gradients(lambda x: combine(token_logprob_reference(x, target, **options)), logits)[0]
    torch.testing.assert_close(
        gradients(lambda x: combine(ck.token_logprob(x, target, **options)), logits)[0],
        expected,
        rtol=1e-10,
        atol=1e-12,
    )
    assert tokens == 0 or expected.sum(-1).abs().max() < 1e-10  # rows of d_logits sum to 0


@pytest.mark.parametrize(
    "logits",
    [
        randn(0, 6, 11) - 300,
        randn(0, 6, 11) * 200,
        torch.eye(11, dtype=torch.float64)[:6] * 1000,
        randn(0, 6, 11).masked_fill(torch.arange(11) % 3 == 0, float("-inf")),
    ],
    ids=["at -300", "times 200", "one-hot", "-inf columns"],
)
def test_logprob_hard_values(logits: Tensor) -> None:
    target = torch.tensor([1, 2, 4, 5, 7, 8])
    logprob, entropy = ck.token_logprob(logits.float(), target, with_entropy=True)
    expected, expected_entropy = token_logprob_reference(logits.float().double(), target, with_entropy=True)
    assert expected_entropy is not None
    assert entropy is not None
    assert (logprob <= 0).all()
    assert_float32_error(logprob, expected)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-5)
    x = logits.float().requires_grad_()
    pair = ck.token_logprob(x, target, with_entropy=True)
    assert pair[1] is not None
    (gradient,) = torch.autograd.grad(pair[0].sum() + pair[1].sum(), x)
    assert gradient.isfinite().all()
    shifted, _ = ck.token_logprob(logits.float() + 7.0, target)
    torch.testing.assert_close(shifted, logprob, rtol=1e-5, atol=1e-4)


def test_inplace_backward_writes_into_the_logits() -> None:
    target = torch.tensor([3, 1, 0])
    leaf = randn(0, 3, 7).requires_grad_()
    expected = gradients(lambda x: ck.token_logprob(x, target)[0].sum(), leaf)[0]
    logits = leaf * 1.0
    storage = logits.data_ptr()
    logprob, _ = ck.token_logprob(logits, target, inplace_backward=True)
    (gradient,) = torch.autograd.grad(logprob.sum(), logits)
    assert gradient.data_ptr() == storage
    torch.testing.assert_close(gradient, expected)


def test_linear_logprob_never_holds_all_logits(largest_tensor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocabulary = 300, 70_001
    hidden = randn(0, tokens, 4, dtype=torch.float32).requires_grad_()
    weight = randn(1, vocabulary, 4, dtype=torch.float32).requires_grad_()
    target = torch.randint(vocabulary, (tokens,), generator=rng(2))
    with largest_tensor:
        ck.linear_logprob(hidden, weight, target)[0].sum().backward()
    assert largest_tensor.numel <= tokens * vocabulary / 2


# --- policy loss from hidden states -----------------------------------------------------------------------------------


def policy_inputs(seed: int, tokens: int, vocabulary: int) -> dict[str, Any]:
    hidden, weight = randn(seed, tokens, WIDTH), randn(seed + 1, vocabulary, WIDTH, scale=0.4)
    target = torch.randint(vocabulary, (tokens,), generator=rng(seed))
    logprob, _ = linear_logprob_reference(hidden, weight, target)
    return {
        "hidden_TD": hidden,
        "weight_VD": weight,
        "target_T": target,
        "advantage_T": randn(seed + 2, tokens),
        "old_logprob_T": logprob + randn(seed + 3, tokens, scale=0.3),
        "weight_T": torch.rand(tokens, generator=rng(seed + 4), dtype=torch.float64),
        "ref_logprob_T": logprob + randn(seed + 5, tokens, scale=0.3),
    }


@FAST
@given(
    seed=seeds,
    tokens=st.integers(1, 40),
    vocabulary=st.integers(2, 60),
    chunk=st.sampled_from([None, 1, 7]),
    kl_coef=st.sampled_from([0.0, 0.1]),
    entropy_coef=st.sampled_from([0.0, 0.05]),
    temperature=st.sampled_from([0.7, 1.0]),
    on_policy=st.booleans(),
)
def test_linear_policy_loss(
    seed: int,
    tokens: int,
    vocabulary: int,
    chunk: int | None,
    kl_coef: float,
    entropy_coef: float,
    temperature: float,
    on_policy: bool,
) -> None:
    inputs = policy_inputs(seed, tokens, vocabulary)
    if on_policy:
        inputs["old_logprob_T"] = None
    inputs["weight_T"][::3] = 0
    inputs["advantage_T"][1::3] = 0
    hidden, weight = inputs.pop("hidden_TD"), inputs.pop("weight_VD")
    options = {
        "clip_low": 0.1,
        "clip_high": 0.3,
        "kl_coef": kl_coef,
        "entropy_coef": entropy_coef,
        "temperature": temperature,
    }

    def fused(h: Tensor, w: Tensor) -> Tensor:
        return 3.0 * ck.linear_policy_loss(h, w, **inputs, **options, chunk_tokens=chunk)[0]

    def reference(h: Tensor, w: Tensor) -> Tensor:
        return 3.0 * linear_policy_loss_reference(h, w, **inputs, **options)[0]

    torch.testing.assert_close(fused(hidden, weight), reference(hidden, weight), rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(gradients(fused, hidden, weight), gradients(reference, hidden, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_without_old_logprobs_every_ratio_is_one(impl: Any) -> None:
    inputs = {
        name: (x.float() if x.is_floating_point() else x).to(DEVICE)
        for name, x in policy_inputs(0, TOKENS, VOCABULARY).items()
    }
    leaves = [inputs.pop(name) for name in ("hidden_TD", "weight_VD")]
    _, own, _ = ck.linear_policy_loss(*leaves, **inputs, impl=impl)

    def loss(old: Tensor | None) -> Callable[..., Tensor]:
        return lambda h, w: ck.linear_policy_loss(h, w, **(inputs | {"old_logprob_T": old}), impl=impl)[0]

    for ours, expected in zip(gradients(loss(None), *leaves), gradients(loss(own), *leaves), strict=True):
        assert torch.equal(ours, expected)
    _, _, metrics = ck.linear_policy_loss(*leaves, **(inputs | {"old_logprob_T": None}), impl=impl)
    assert (float(metrics["clip_fraction"]), float(metrics["approx_kl"])) == (0.0, 0.0)


def test_linear_policy_loss_metrics() -> None:
    inputs = policy_inputs(0, TOKENS, VOCABULARY)
    inputs["weight_T"][5:] = 0
    _, logprob, metrics = ck.linear_policy_loss(**inputs)
    _, expected = linear_policy_loss_reference(**inputs)
    torch.testing.assert_close(logprob, expected)
    ratio = (expected - inputs["old_logprob_T"])[:5].exp()
    assert float(metrics["clip_fraction"]) == pytest.approx(float(((ratio < 0.8) | (ratio > 1.2)).double().mean()))
    torch.testing.assert_close(metrics["approx_kl"], (ratio - 1 - ratio.log()).mean())
    _, entropy = linear_logprob_reference(
        inputs["hidden_TD"], inputs["weight_VD"], inputs["target_T"], with_entropy=True
    )
    assert entropy is not None
    torch.testing.assert_close(metrics["entropy"], entropy[:5].mean())


def test_linear_policy_loss_spends_three_matmuls_and_none_on_dead_tokens(largest_tensor: Any) -> None:
    inputs = policy_inputs(0, 64, VOCABULARY)
    inputs["old_logprob_T"] = linear_policy_loss_reference(**inputs)[1]  # ratio 1: nothing is clipped
    inputs["advantage_T"][: 64 // 4] = 0
    for name in ("hidden_TD", "weight_VD"):
        inputs[name].requires_grad_()
    del inputs["ref_logprob_T"]
    forward = 2 * 64 * VOCABULARY * WIDTH
    with largest_tensor:
        ck.linear_policy_loss(**inputs)[0].backward()
    assert largest_tensor.matmul_flops == forward * (1 + 2 * 3 / 4)
    largest_tensor.matmul_flops = 0
    with largest_tensor, torch.no_grad():
        ck.linear_policy_loss(**inputs)
    assert largest_tensor.matmul_flops == forward


@pytest.mark.parametrize("broken", [float("-inf"), float("nan"), -200.0])
def test_tokens_without_weight_take_no_part_whatever_their_ratio(broken: float) -> None:
    inputs = policy_inputs(2, 20, VOCABULARY)
    inputs["weight_T"][4:9] = 0
    clean = gradients(lambda h, w: ck.linear_policy_loss(h, w, **_without(inputs))[0], *_leaves(inputs))
    logprob = inputs["old_logprob_T"] + 0.1
    (clean_direct,) = gradients(lambda x: _direct(x, inputs), logprob)
    inputs["old_logprob_T"] = inputs["old_logprob_T"].masked_fill(inputs["weight_T"] == 0, broken)
    assert ck.linear_policy_loss(**inputs)[0].isfinite()
    dirty = gradients(lambda h, w: ck.linear_policy_loss(h, w, **_without(inputs))[0], *_leaves(inputs))
    torch.testing.assert_close(dirty, clean)
    torch.testing.assert_close(gradients(lambda x: _direct(x, inputs), logprob)[0], clean_direct)


def _leaves(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return inputs["hidden_TD"], inputs["weight_VD"]


def _direct(logprob: Tensor, inputs: dict[str, Any]) -> Tensor:
    return ck.policy_loss(logprob, inputs["old_logprob_T"], inputs["advantage_T"], weight_T=inputs["weight_T"])[0]


# --- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_at_most_twice_that_of_plain_torch(dtype: torch.dtype) -> None:
    inputs = policy_inputs(3, 96, 211)
    exact = gradients(
        lambda h, w: linear_policy_loss_reference(h, w, **_without(inputs))[0],
        inputs["hidden_TD"].to(dtype).double(),
        inputs["weight_VD"].to(dtype).double(),
    )
    low = [inputs["hidden_TD"].to(dtype), inputs["weight_VD"].to(dtype)]
    rest = {k: v.float() if v.is_floating_point() else v for k, v in _without(inputs).items()}
    plain = gradients(lambda h, w: linear_policy_loss_reference(h, w, **rest)[0], *low)
    fused = gradients(lambda h, w: ck.linear_policy_loss(h, w, **rest, chunk_tokens=17)[0], *low)
    for ours, theirs, truth in zip(fused, plain, exact, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - truth).norm() <= 2 * (theirs.double() - truth).norm()
    logprob, _ = ck.linear_logprob(*low, inputs["target_T"])
    truth, _ = linear_logprob_reference(low[0].double(), low[1].double(), inputs["target_T"])
    naive, _ = linear_logprob_reference(*low, inputs["target_T"])
    assert logprob.dtype == torch.float32
    assert (logprob.double() - truth).norm() <= 2 * (naive.double() - truth).norm()


def _without(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k not in ("hidden_TD", "weight_VD")}


@pytest.mark.parametrize("name", ["linear_logprob", "linear_policy_loss", "value_pool", "masked_infonce"])
def test_float32_error(name: str) -> None:
    """At most 1e-5 relative, values and gradients, against float64."""
    inputs = policy_inputs(7, TOKENS, VOCABULARY)
    cu = offsets_of([5, 12, 20])
    calls: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "linear_logprob": (
            lambda h, w: ck.linear_logprob(h, w, inputs["target_T"])[0].sum(),
            (inputs["hidden_TD"], inputs["weight_VD"]),
        ),
        "linear_policy_loss": (
            lambda h, w: ck.linear_policy_loss(
                h, w, **{k: v.to(h.dtype) if v.is_floating_point() else v for k, v in _without(inputs).items()}
            )[0],
            (inputs["hidden_TD"], inputs["weight_VD"]),
        ),
        "value_pool": (
            lambda h, v: ck.value_pool(h, v, cu)[0].square().sum(),
            (inputs["hidden_TD"], inputs["advantage_T"]),
        ),
        "masked_infonce": (lambda a, c: ck.masked_infonce(a, c)[0], (inputs["hidden_TD"], inputs["weight_VD"])),
    }
    function, arguments = calls[name]
    low = tuple(x.float() for x in arguments)
    exact_arguments = tuple(x.double() for x in low)
    assert_float32_error(function(*low), function(*exact_arguments))
    for ours, exact in zip(gradients(function, *low), gradients(function, *exact_arguments), strict=True):
        assert_float32_error(ours, exact)


# --- pooling ----------------------------------------------------------------------------------------------------------


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


# --- InfoNCE ----------------------------------------------------------------------------------------------------------


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


# --- advantages -------------------------------------------------------------------------------------------------------


@FAST
@given(
    seed=seeds,
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=7),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_rewards_and_advantages(seed: int, lengths: list[int], gamma: float, lam: float) -> None:
    tokens, cu = sum(lengths), offsets_of(lengths)
    score, old, ref = randn(seed, len(lengths)), randn(seed + 1, tokens), randn(seed + 2, tokens)
    reward = ck.kl_shaped_reward(score, old, ref, cu, kl_coef=0.3)
    torch.testing.assert_close(reward, kl_shaped_reward_reference(score, old, ref, cu, kl_coef=0.3))
    advantage, return_ = ck.gae(reward, old, cu, gamma=gamma, lam=lam)
    expected = gae_reference(reward, old, cu, gamma=gamma, lam=lam)
    torch.testing.assert_close((advantage, return_), expected)


def test_whiten() -> None:
    x, mask = randn(0, 50, scale=4.0) + 3, torch.arange(50) % 3 > 0
    whitened = ck.whiten(x, mask)
    torch.testing.assert_close(whitened, whiten_reference(x, mask))
    assert abs(float(whitened[mask].mean())) < 1e-12
    assert float(whitened[mask].var()) == pytest.approx(1, abs=1e-6)
    for few in (torch.zeros(0), torch.tensor([3.0]), torch.full((4,), 2.0)):
        assert not ck.whiten(few).any()  # zeros, not NaN
    assert not ck.whiten(x, torch.zeros(50, dtype=torch.bool)).any()


@pytest.mark.parametrize("eps", [1e-8, 0.5, 40.0])
def test_whiten_adds_eps_to_the_variance(eps: float) -> None:
    """Eps far below, about and above the variance; both dtypes of the torch path."""
    x, mask = randn(0, 50, scale=2.0) + 3, torch.arange(50) % 3 > 0
    expected = (x - x[mask].mean()) / (x[mask].var() + eps).sqrt() * mask
    torch.testing.assert_close(ck.whiten(x, mask, eps=eps), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whiten_reference(x, mask, eps=eps), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ck.whiten(x.float(), mask, eps=eps).double(), expected, rtol=1e-5, atol=1e-5)


def _whiten_on_rank(rank: int, x: Tensor, sizes: list[int], eps: float, port: int, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=len(sizes))
    results[rank] = ck.whiten(x.split(sizes)[rank], group=dist.group.WORLD, eps=eps).tolist()
    dist.destroy_process_group()


def test_whiten_over_ranks_of_unequal_size() -> None:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    x, sizes, eps = randn(0, 11), [7, 4, 0], 0.5
    with mp.Manager() as manager:
        results = manager.dict()
        spawn(_whiten_on_rank, (x, sizes, eps, port, results), len(sizes))
        together = [value for rank in range(len(sizes)) for value in results[rank]]
    torch.testing.assert_close(torch.tensor(together, dtype=torch.float64), whiten_reference(x, eps=eps))


# --- losses on log-probs ----------------------------------------------------------------------------------------------


def test_policy_and_value_loss() -> None:
    logprob, old, advantage = randn(0, 40), randn(0, 40) + randn(1, 40, scale=0.3), randn(2, 40)
    weight = torch.rand(40, generator=rng(3), dtype=torch.float64)
    weight[30:] = 0
    loss, metrics = ck.policy_loss(logprob, old, advantage, weight_T=weight, clip_low=0.1, clip_high=0.3)
    torch.testing.assert_close(
        loss, policy_loss_reference(logprob, old, advantage, weight_T=weight, clip_low=0.1, clip_high=0.3)
    )
    ratio = (logprob - old)[:30].exp()
    assert float(metrics["clip_fraction"]) == pytest.approx(float(((ratio < 0.9) | (ratio > 1.3)).double().mean()))
    value_result, value_metrics = ck.value_loss(logprob, old, advantage, weight_T=weight, clip=0.25)
    torch.testing.assert_close(value_result, value_loss_reference(logprob, old, advantage, weight_T=weight, clip=0.25))
    assert float(value_metrics["clip_fraction"]) == pytest.approx(
        float(((logprob - old)[:30].abs() > 0.25).double().mean())
    )


# --- finite differences -----------------------------------------------------------------------------------------------


def test_gradcheck() -> None:
    inputs = policy_inputs(1, 6, 9)
    hidden, weight = inputs["hidden_TD"].requires_grad_(), inputs["weight_VD"].requires_grad_()
    target, cu = inputs["target_T"], offsets_of([2, 0, 4])
    bias, value = randn(8, 9).requires_grad_(), randn(9, 6).requires_grad_()
    check = torch.autograd.gradcheck
    assert check(
        lambda x: ck.token_logprob(x, target, temperature=0.7, with_entropy=True), randn(5, 6, 9).requires_grad_()
    )
    assert check(lambda h, w, b: ck.linear_logprob(h, w, target, bias=b, with_entropy=True), (hidden, weight, bias))
    rest = _without(inputs)
    assert check(
        lambda h, w: ck.linear_policy_loss(h, w, **rest, kl_coef=0.1, entropy_coef=0.1, chunk_tokens=4)[0],
        (hidden, weight),
    )
    assert check(lambda h, v: ck.value_pool(h, v, cu)[0], (hidden, value))
    assert check(lambda a, c: ck.masked_infonce(a, c)[0], (hidden, weight))
    ones = torch.ones(6, dtype=torch.float64)
    assert check(lambda x: ck.policy_loss(x, inputs["old_logprob_T"], inputs["advantage_T"], weight_T=ones)[0], value)
    assert check(lambda x: ck.value_loss(x, inputs["old_logprob_T"], inputs["advantage_T"], weight_T=ones)[0], value)


# --- bad input --------------------------------------------------------------------------------------------------------

X, W, T3 = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3)
I3 = torch.tensor([0, 1, 2])
C3 = torch.tensor([0, 3])
POLICY: dict[str, Any] = {"advantage_T": T3, "old_logprob_T": T3, "weight_T": T3}
BAD_CALLS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "dimensions": (lambda: ck.token_logprob(T3, I3), ["logits_TV", "(3,)", "2 dimensions"]),
    "dtype": (lambda: ck.token_logprob(X.long(), I3), ["logits_TV", "int64", "float32"]),
    "length": (lambda: ck.token_logprob(X, I3[:2]), ["target_T", "(2,)", "(3,)"]),
    "target dtype": (lambda: ck.token_logprob(X, T3), ["target_T", "float32", "int64"]),
    "target range": (lambda: ck.token_logprob(X, torch.tensor([0, 1, 4])), ["target_T", "holds 4", "[0, 4)"]),
    "negative target": (lambda: ck.linear_logprob(X, W, torch.tensor([0, -1, 4])), ["target_T", "-1", "[0, 5)"]),
    "temperature": (lambda: ck.token_logprob(X, I3, temperature=0.0), ["temperature = 0.0", "above 0"]),
    "width": (lambda: ck.linear_logprob(X, W[:, :3], I3), ["weight_VD", "(5, 3)", "(5, 4)"]),
    "mixed dtypes": (lambda: ck.linear_logprob(X, W.double(), I3), ["weight_VD", "float64", "float32"]),
    "bias": (lambda: ck.linear_logprob(X, W, I3, bias=T3), ["bias", "(3,)", "(5,)"]),
    "device": (lambda: ck.linear_logprob(X, W.to("meta"), I3), ["weight_VD", "meta", "cpu"]),
    "kl without reference": (
        lambda: ck.linear_policy_loss(X, W, I3, **POLICY, kl_coef=0.1),
        ["kl_coef = 0.1", "ref_logprob_T"],
    ),
    "clip": (lambda: ck.linear_policy_loss(X, W, I3, **POLICY, clip_low=1.5), ["clip_low = 1.5", "[0, 1]"]),
    "chunk": (lambda: ck.linear_policy_loss(X, W, I3, **POLICY, chunk_tokens=0), ["chunk_tokens = 0"]),
    "offsets end": (lambda: ck.value_pool(X, T3, torch.tensor([0, 2])), ["cu_seqlens", "0 to 2", "0 to 3"]),
    "offsets fall": (lambda: ck.value_pool(X, T3, torch.tensor([0, 2, 1, 3])), ["cu_seqlens", "must not fall"]),
    "no sequence": (lambda: ck.gae(T3, T3, C3[:1], gamma=1.0, lam=1.0), ["cu_seqlens", "(1,)", "3 tokens"]),
    "negative offset": (
        lambda: ck.kl_shaped_reward(T3[:2], T3, T3, torch.tensor([0, -2, 3]), kl_coef=1.0),
        ["cu_seqlens[1] = -2", "after 0"],
    ),
    "offset past the end": (
        lambda: ck.gae(T3, T3, torch.tensor([0, 7, 3]), gamma=1.0, lam=1.0),
        ["cu_seqlens[2] = 3", "after 7"],
    ),
    "mask dtype": (lambda: ck.value_pool(X, T3, torch.tensor([0, 3]), mask_T=T3), ["mask_T", "float32", "bool"]),
    "too few candidates": (lambda: ck.masked_infonce(X, X[:2]), ["positive_N", "3 anchors", "2 candidates"]),
    "positive range": (lambda: ck.masked_infonce(X, X, positive_N=I3 + 1), ["positive_N", "holds 3", "[0, 3)"]),
    "positive masked out": (
        lambda: ck.masked_infonce(X, X, candidate_mask=torch.tensor([True, False, True])),
        ["candidate_mask", "candidate 1", "row 1"],
    ),
    "gamma": (lambda: ck.gae(T3, T3, torch.tensor([0, 3]), gamma=1.5, lam=1.0), ["gamma = 1.5", "[0, 1]"]),
    "kl_coef": (lambda: ck.kl_shaped_reward(T3[:1], T3, T3, torch.tensor([0, 3]), kl_coef=-1.0), ["kl_coef = -1.0"]),
    "value clip": (lambda: ck.value_loss(T3, T3, T3, weight_T=T3, clip=0.0), ["clip = 0.0"]),
    "eps": (lambda: ck.whiten(T3, eps=0.0), ["eps = 0.0", "above 0"]),
    "implementation": (lambda: ck.whiten(T3, impl="cuda"), ["impl = 'cuda'", "whiten", "'torch'"]),
    "other dtype": (lambda: ck.lcs_mask(I3, C3, I3.int(), C3), ["b is torch.int32", "torch.int64"]),
    "other count": (lambda: ck.lcs_mask(I3, C3, I3, torch.tensor([0, 1, 3])), ["b_cu", "(3,)", "(2,)"]),
    "offsets of the other side": (lambda: ck.lcs_mask(I3, C3, I3, C3 + 1), ["b_cu", "1 to 4", "0 to 3"]),
}


def assert_refused(call: Callable[[], object], texts: list[str]) -> None:
    """With a ValueError whose message has all of the texts."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - every text is checked below
        call()
    for text in texts:
        assert text in str(error.value)


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_name_the_argument(case: str) -> None:
    assert_refused(*BAD_CALLS[case])


def test_index_checks_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runtime, "_index_checks", None)  # given back at the end
    ck.set_index_checks(False)
    ck.whiten(T3)
    assert ck.value_pool(X, T3, torch.tensor([0, 2, 1, 3]))[1].isnan().all()
    assert ck.gae(T3, T3, torch.tensor([0, 3]), gamma=1.0, lam=1.0)[0].tolist() == [0, 0, 0]
    ck.set_index_checks(None)
    with pytest.raises(ValueError, match="must not fall"):
        ck.value_pool(X, T3, torch.tensor([0, 2, 1, 3]))
