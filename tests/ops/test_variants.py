"""Variants of the policy losses, log-sum-exp, soft cap and bias: against plain Python, references and differences."""

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import carft_kernels as ck
from carft_kernels._policy_kernels import token_kl
from carft_kernels.linear_logprob import linear_logprob_reference
from carft_kernels.linear_policy_loss import linear_policy_loss_reference
from carft_kernels.policy_loss import policy_loss_reference
from carft_kernels.token_logprob import token_logprob_reference

from .checks import (
    DEVICE,
    DTYPES,
    FAST,
    FEW,
    assert_refused,
    compare,
    gradients,
    offsets,
    policy_inputs,
    randint,
    randn,
    seeds,
)

Impl = Literal["torch", "triton"]
IMPLEMENTATIONS: list[Impl] = ["torch", "triton"]
inf, nan = math.inf, math.nan


def vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


# --- by hand ----------------------------------------------------------------------------------------------------------

RATIOS = [0.1, 0.5, 0.95, 1.3, 2.5, 6.0]


def by_hand(kind: str, ratio: float, advantage: float, logprob: float, correction: float) -> tuple[float, float]:
    """A token's loss and its derivative by the log-prob: clip to [0.8, 1.4], dual clip at 2.5."""
    held = min(max(ratio, 0.8), 1.4)
    if kind == "cispo":
        loss = -advantage * held * logprob
        slope = -advantage * held
    else:
        stops = ratio > 1.4 if advantage > 0 else ratio < 0.8
        loss, slope = (-advantage * held, 0.0) if stops else (-advantage * ratio, -advantage * ratio)
        if kind == "dual clip" and advantage < 0 and ratio > 2.5:
            loss, slope = -advantage * 2.5, 0.0
    return correction * loss, correction * slope


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["clip", "dual clip", "cispo"])
def test_token_losses_are_those_worked_out_by_hand(kind: str, impl: Impl) -> None:
    cases = [(r, a, -0.2 - 0.3 * i, c) for i, r in enumerate(RATIOS) for a in (-1.5, 0.7) for c in (0.0, 1.0, 1.8)]
    cases = [c for c in cases if c[0] != 2.5 or kind != "dual clip"]  # on the bound the derivative is a convention
    ratio, advantage, logprob, correction = (vector(list(column)) for column in zip(*cases, strict=True))
    leaf = logprob.requires_grad_()
    options: dict[str, Any] = {"cispo": {"loss": "cispo"}, "dual clip": {"dual_clip": 2.5}}.get(kind, {})
    share = vector([0.1 * (i + 1) for i in range(len(cases))])
    loss, metrics = ck.policy_loss(
        leaf,
        leaf.detach() - ratio.log(),
        advantage,
        weight_T=share,
        clip_low=0.2,
        clip_high=0.4,
        correction_T=correction,
        **options,
        impl=impl,
    )
    expected = [by_hand(kind, r, a, p, c) for r, a, p, c in cases]
    total = sum(w * x for w, (x, _) in zip(share.tolist(), expected, strict=True))
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    (found,) = torch.autograd.grad(loss, leaf)
    slopes = [w * s for w, (_, s) in zip(share.tolist(), expected, strict=True)]
    assert found.tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-6)
    outside = sum(not 0.8 <= r <= 1.4 for r, *_ in cases) / len(cases)
    assert float(metrics["clip_fraction"]) == pytest.approx(outside)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_factor_of_zero_leaves_a_token_out_whatever_its_ratio(impl: Impl) -> None:
    logprob, old = vector([-1.0, -2.0, -3.0]).requires_grad_(), vector([-1.0, -200.0, -3.0])  # the second ratio is inf
    loss, _ = ck.policy_loss(
        logprob, old, vector([1.0, -1.0, 1.0]), weight_T=vector([0.5] * 3), correction_T=vector([1, 0, 1]), impl=impl
    )
    assert float(loss.detach()) == pytest.approx(-1.0)
    assert torch.autograd.grad(loss, logprob)[0].tolist() == [-0.5, 0.0, -0.5]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("estimate", ["k3", "k2"])
@pytest.mark.parametrize("clamp", [None, 0.4])
def test_kl_estimates_are_those_worked_out_by_hand(estimate: Any, clamp: float | None, impl: Impl) -> None:
    """With no advantage the loss is the KL term alone; two tokens are far beyond the bound, one of them beyond exp."""
    differences = [-30.0, -1.2, -0.3, 0.0, 0.4, 1.1, 95.0]
    if clamp is None:
        differences = differences[1:-1]
    n, vocabulary = len(differences), 7
    logits = randn(1, n, vocabulary).float().to(DEVICE).requires_grad_()
    target, eye = randint(2, vocabulary, n), torch.eye(vocabulary, device=DEVICE)
    own = [math.log(math.exp(row[t]) / sum(map(math.exp, row))) for row, t in zip(logits.tolist(), target, strict=True)]
    loss, *_ = ck.linear_policy_loss(
        logits,
        eye,
        target,
        advantage_T=torch.zeros(n, device=DEVICE),
        old_logprob_T=None,
        weight_T=torch.ones(n, device=DEVICE),
        ref_logprob_T=vector([p + d for p, d in zip(own, differences, strict=True)]),
        kl_coef=0.3,
        kl_estimate=estimate,
        kl_clamp=clamp,
        impl=impl,
    )
    values, slopes = [], []
    for d in differences:
        value, slope = (0.5 * d * d, -d) if estimate == "k2" else (math.exp(min(d, 700)) - d - 1, 1 - math.exp(d))
        beyond = clamp is not None and value > clamp
        values.append(0.3 * (clamp if beyond else value))
        slopes.append(0.0 if beyond else 0.3 * slope)
    assert float(loss.detach()) == pytest.approx(sum(values), rel=1e-5)
    (found,) = torch.autograd.grad(loss, logits)
    for row, t, gradient, slope in zip(logits.tolist(), target.tolist(), found.tolist(), slopes, strict=True):
        total = sum(map(math.exp, row))
        expected = [slope * ((v == t) - math.exp(x) / total) for v, x in enumerate(row)]
        assert gradient == pytest.approx(expected, rel=1e-4, abs=1e-5)


SMALL = [sign * 10.0**-k for k in range(1, 6) for sign in (1, -1)]


@pytest.mark.parametrize("x", SMALL)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_estimates_of_small_divergences_keep_their_digits(impl: Impl, x: float) -> None:
    """exp(x) - 1 - x of a float32 number, by a series in float64: a difference of float32 numbers of the size of x has
    lost 3e-4 of it at 1e-4. So has torch's `approx_kl`, a mean of such numbers, by at most one rounding of x a token.
    One token of a vocabulary of one: its log-prob is 0."""
    x, one = float(torch.tensor(x)), vector([1.0])
    truth = math.fsum(x**n / math.factorial(n) for n in range(2, 18))
    _, metrics = ck.policy_loss(vector([x]), 0 * one, one, weight_T=one, impl=impl)
    rounding = torch.finfo(torch.float32).eps * abs(x) if impl == "torch" else 0.0
    assert float(metrics["approx_kl"]) == pytest.approx(truth, rel=1e-6, abs=rounding)
    options: dict[str, Any] = {"advantage_T": 0 * one, "old_logprob_T": None, "weight_T": one, "kl_coef": 1.0}
    token = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    loss, *_ = ck.linear_policy_loss(one[:, None], one[:, None], token, **options, ref_logprob_T=vector([x]), impl=impl)
    assert float(loss) == pytest.approx(truth, rel=1e-6)
    difference = vector([x]).requires_grad_()
    estimate = token_kl(difference, "k3", None)
    assert float(estimate.detach()) == pytest.approx(truth, rel=1e-6)
    assert float(torch.autograd.grad(estimate.sum(), difference)[0]) == pytest.approx(math.expm1(x), rel=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ratios_of_sequences_are_those_worked_out_by_hand(impl: Impl) -> None:
    """Two sequences and one without tokens. The second has a token without weight, which is not in the mean."""
    logprob = vector([-1.0, -2.0, -3.0, -1.5, -0.5]).requires_grad_()
    old = vector([-1.3, -1.6, -2.6, -9.0, -1.1])
    advantage, share = vector([2.0, 2.0, 2.0, -1.0, -1.0]), vector([0.1, 0.2, 0.3, 0.0, 0.4])
    means = [(0.3 - 0.4 - 0.4) / 3, 0.6]
    loss, metrics = ck.policy_loss(
        logprob, old, advantage, weight_T=share, cu_seqlens=offsets([3, 0, 2]), clip_high=0.2, impl=impl
    )
    s = [math.exp(m) for m in means]
    # the first sequence is inside the clip, the second beyond it on the side that has a gradient
    assert float(loss.detach()) == pytest.approx(-2 * s[0] * 0.6 + s[1] * 0.4, rel=1e-6)
    (found,) = torch.autograd.grad(loss, logprob)
    each = -2 * s[0] * 0.6 / 3
    assert found.tolist() == pytest.approx([each, each, each, 0.0, s[1] * 0.4], rel=1e-5)
    assert float(metrics["clip_fraction"]) == pytest.approx(1 / 4)
    terms = [s[0] - 1 - means[0]] * 3 + [s[1] - 1 - means[1]]
    assert float(metrics["approx_kl"]) == pytest.approx(sum(terms) / 4, rel=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_z_loss_and_a_soft_cap_worked_out_by_hand(impl: Impl) -> None:
    """One token of three logits: 0.5 * 2.0 * lse^2, with the cap of 3 and the temperature of 0.7."""
    hidden, bias = vector([1.0, -2.0]).view(1, 2), vector([0.1, -0.3, 4.0])
    weight = vector([0.5, 1.0, -0.7, 0.2, 2.0, 0.4]).view(3, 2)
    raw = [0.5 - 2.0 + 0.1, -0.7 - 0.4 - 0.3, 2.0 - 0.8 + 4.0]
    x = [3 * math.tanh(r / 3) / 0.7 for r in raw]
    lse = math.log(sum(map(math.exp, x)))
    loss, logprob, _ = ck.linear_policy_loss(
        hidden,
        weight,
        torch.tensor([2], device=DEVICE),
        bias=bias,
        advantage_T=vector([0.0]),
        old_logprob_T=None,
        weight_T=vector([2.0]),
        z_loss_coef=0.5,
        logit_softcap=3.0,
        temperature=0.7,
        impl=impl,
    )
    assert float(loss) == pytest.approx(lse**2, rel=1e-5)
    assert float(logprob) == pytest.approx(x[2] - lse, abs=1e-6)


# --- against the references -------------------------------------------------------------------------------------------

TERMS: dict[str, dict[str, Any]] = {
    "dual clip": {"dual_clip": 1.3},
    "cispo": {"loss": "cispo", "clip_low": 1.0},
    "k2": {"kl_coef": 0.3, "kl_estimate": "k2"},
    "k2, bounded": {"kl_coef": 0.3, "kl_estimate": "k2", "kl_clamp": 0.05},
    "k3, bounded": {"kl_coef": 0.3, "kl_clamp": 0.05, "dual_clip": 1.5},
    "entropy": {"entropy_coef": 0.1, "kl_coef": 0.2},
    "z loss": {"z_loss_coef": 0.03},
    "z loss and entropy": {"z_loss_coef": 0.03, "entropy_coef": 0.1, "loss": "cispo"},
}


@FAST
@given(
    seed=seeds,
    tokens=st.integers(1, 30),
    vocabulary=st.integers(2, 50),
    chunk=st.sampled_from([None, 7]),
    terms=st.sampled_from(list(TERMS)),
    correction=st.booleans(),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 1.5, 30.0]),
    skip_dead=st.booleans(),
)
def test_linear_policy_loss(
    seed: int,
    tokens: int,
    vocabulary: int,
    chunk: int | None,
    terms: str,
    correction: bool,
    bias: bool,
    softcap: float | None,
    skip_dead: bool,
) -> None:
    inputs = {name: x.cpu() for name, x in policy_inputs(seed, tokens, vocabulary, 6).items()}
    leaves = [inputs.pop("hidden_TD"), inputs.pop("weight_VD")] + [randn(seed + 9, vocabulary)] * bias
    options = TERMS[terms] | {"logit_softcap": softcap, "temperature": 0.8}
    if correction:
        options["correction_T"] = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)).double() * 2
        options["correction_T"][::5] = 0

    def fused(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        extra = {"chunk_tokens": chunk, "skip_dead": skip_dead, "impl": "torch"}
        return 3.0 * ck.linear_policy_loss(h, w, bias=b, **inputs, **options, **extra)[0]

    def reference(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return 3.0 * linear_policy_loss_reference(h, w, bias=b, **inputs, **options)[0]

    torch.testing.assert_close(fused(*leaves), reference(*leaves), rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(gradients(fused, *leaves), gradients(reference, *leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@FEW
@given(
    seed=seeds,
    tokens=st.integers(1, 20),
    vocabulary=st.integers(8, 60),
    chunk=st.sampled_from([None, 7]),
    terms=st.sampled_from(list(TERMS)),
    correction=st.booleans(),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_linear_policy_loss_by_triton(
    seed: int,
    tokens: int,
    vocabulary: int,
    chunk: int | None,
    terms: str,
    correction: bool,
    bias: bool,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    inputs = policy_inputs(seed, tokens, vocabulary, 8)
    leaves = [inputs.pop("hidden_TD"), inputs.pop("weight_VD")] + [randn(seed + 9, vocabulary)] * bias
    if correction:
        inputs["correction_T"] = (randn(seed + 8, tokens).abs() * (torch.arange(tokens) % 5 > 0)).to(DEVICE)
    rest = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    options: dict[str, Any] = TERMS[terms] | {"logit_softcap": softcap, "temperature": 0.8}

    def operator(h: Tensor, w: Tensor, b: Tensor | None = None) -> Any:
        return ck.linear_policy_loss(h, w, bias=b, **rest, **options, chunk_tokens=chunk, impl="triton")[:2]

    def plain(h: Tensor, w: Tensor, b: Tensor | None = None) -> Any:
        wide = {k: v.double() if v.is_floating_point() else v for k, v in rest.items()}
        loss, logprob = linear_policy_loss_reference(h, w, bias=b, **wide, **options)
        return loss, logprob.detach()

    compare(operator, plain, tuple(x.to(dtype) for x in leaves))


@FEW
@given(
    seed=seeds,
    lengths=st.lists(st.integers(0, 9) | st.sampled_from([600]), min_size=1, max_size=5),
    dual_clip=st.sampled_from([None, 1.1]),
    correction=st.booleans(),
    dtype=st.sampled_from([torch.float64, *DTYPES]),
)
def test_ratios_of_sequences(
    seed: int, lengths: list[int], dual_clip: float | None, correction: bool, dtype: torch.dtype
) -> None:
    tokens, cu = sum(lengths), offsets(lengths)
    logprob, old = randn(seed, tokens), randn(seed, tokens) + randn(seed + 1, tokens, scale=0.4)
    share = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)).double() / max(tokens, 1)
    share[::4] = 0
    options: dict[str, Any] = {"clip_low": 0.1, "clip_high": 0.05, "dual_clip": dual_clip}
    if correction:
        options["correction_T"] = randn(seed + 3, tokens).abs().to(DEVICE)
    old, advantage, share = (x.to(dtype).to(DEVICE) for x in (old, randn(seed + 2, tokens), share))
    impl: Any = "torch" if dtype == torch.float64 else "triton"

    def plain(x: Tensor) -> Tensor:
        y = torch.promote_types(x.dtype, torch.float32)
        wide = (x.to(y) for x in (x, old, advantage))
        return policy_loss_reference(*wide, weight_T=share.to(y), cu_seqlens=cu, **options)

    def operator(x: Tensor) -> Tensor:
        return ck.policy_loss(x, old, advantage, weight_T=share, cu_seqlens=cu, **options, impl=impl)[0]

    if dtype != torch.float64:
        compare(operator, plain, (logprob.to(dtype),))
        return
    x = logprob.to(DEVICE)
    torch.testing.assert_close(operator(x), plain(x), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients(operator, x), gradients(plain, x), rtol=1e-10, atol=1e-14)


OF_SEQUENCES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dual clip": {"dual_clip": 1.1},
    "KL": {"kl_coef": 0.3, "kl_clamp": 0.4},
    "k2, entropy and z loss": {"kl_coef": 0.3, "kl_estimate": "k2", "entropy_coef": 0.1, "z_loss_coef": 0.03},
}


def sequences_case(seed: int, lengths: list[int], correction: bool) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Leaves and vectors, with tokens that are ignored, and others without weight."""
    tokens = sum(lengths)
    inputs: dict[str, Any] = policy_inputs(seed, tokens, 11, 6)
    inputs["weight_T"][::4], inputs["target_T"][2::5] = 0, -100
    inputs |= {"cu_seqlens": offsets(lengths), "clip_low": 0.1, "clip_high": 0.05}
    if correction:
        inputs["correction_T"] = randn(seed + 3, tokens).abs().to(DEVICE)
    return (inputs.pop("hidden_TD"), inputs.pop("weight_VD"), randn(seed + 9, 11).to(DEVICE)), inputs


@FAST
@given(
    seed=seeds,
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    terms=st.sampled_from(list(OF_SEQUENCES)),
    correction=st.booleans(),
)
def test_ratios_of_sequences_from_hidden_states(seed: int, lengths: list[int], terms: str, correction: bool) -> None:
    """Loss and gradients are those of the reference on all logits, in float64."""
    leaves, inputs = sequences_case(seed, lengths, correction)
    options = inputs | OF_SEQUENCES[terms] | {"temperature": 0.8, "logit_softcap": 2.0}

    def operator(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return 3.0 * ck.linear_policy_loss(h, w, bias=b, **options, chunk_tokens=7, impl="torch")[0]

    def reference(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return 3.0 * linear_policy_loss_reference(h, w, bias=b, **options)[0]

    torch.testing.assert_close(operator(*leaves), reference(*leaves), rtol=1e-10, atol=1e-12)
    found, expected = gradients(operator, *leaves), gradients(reference, *leaves)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ratios_of_sequences_from_hidden_states_are_those_of_two_calls(impl: Impl) -> None:
    """To the bit: loss, log-probs, metrics and gradients."""
    wide, inputs = sequences_case(2, [4, 0, 7], True)
    leaves = [x.float().requires_grad_() for x in wide]
    inputs = {k: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in inputs.items()}
    hidden, weight, bias = leaves
    target = inputs["target_T"]
    del inputs["ref_logprob_T"]
    loss, logprob, metrics = ck.linear_policy_loss(hidden, weight, bias=bias, **inputs, impl=impl)
    found = [loss, *torch.autograd.grad(loss, leaves), logprob, metrics["clip_fraction"], metrics["approx_kl"]]
    assert not logprob.requires_grad
    share = inputs.pop("weight_T").masked_fill(inputs.pop("target_T") == -100, 0.0)
    logprob, entropy = ck.linear_logprob(hidden, weight, target, bias=bias, with_entropy=True, impl=impl)
    assert entropy is not None
    loss, of_two = ck.policy_loss(logprob, weight_T=share, **inputs, impl=impl)
    expected = [loss, *torch.autograd.grad(loss, leaves), logprob, of_two["clip_fraction"], of_two["approx_kl"]]
    assert all(map(torch.equal, found, expected))
    torch.testing.assert_close(metrics["entropy"], entropy[share != 0].mean())
    loss, _, metrics = ck.linear_policy_loss(
        hidden, weight, target, bias=bias, **inputs | {"old_logprob_T": None}, weight_T=share, impl=impl
    )
    assert float(metrics["approx_kl"]) == 0
    torch.testing.assert_close(loss, -(share * inputs["advantage_T"] * inputs["correction_T"]).sum())


@FEW
@given(
    seed=seeds,
    tokens=st.integers(1, 6),
    vocabulary=st.integers(2, 60),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    with_entropy=st.booleans(),
    dtype=st.sampled_from([torch.float64, *DTYPES]),
)
def test_log_sum_exp_and_soft_cap(
    seed: int, tokens: int, vocabulary: int, softcap: float | None, with_entropy: bool, dtype: torch.dtype
) -> None:
    """Both log-prob operators: every output takes part in the gradient, log-sum-exp with its square."""
    target = randint(seed, vocabulary, tokens)
    impl: Any = "torch" if dtype == torch.float64 else "triton"
    options: dict[str, Any] = {"with_entropy": with_entropy, "temperature": 0.7, "logit_softcap": softcap}
    more: dict[str, Any] = {"with_lse": True, "impl": impl}

    def present(outputs: Any) -> tuple[Tensor, ...]:
        *others, lse = outputs
        return (*(x for x in others if x is not None), lse, lse.square())

    def capped(x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x if softcap is None else softcap * (x / softcap).tanh()

    def plain(pair: Any, logits: Tensor) -> tuple[Tensor, ...]:
        return present((*pair, (capped(logits) / 0.7).logsumexp(-1)))

    logits = randn(seed, tokens, vocabulary, scale=3).to(dtype)
    inputs = [randn(seed + 1, tokens, 8), randn(seed + 2, vocabulary, 8), randn(seed + 3, vocabulary)]
    calls: list[tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]] = [
        (
            lambda x: present(ck.token_logprob(x * 1, target, **options, **more)),
            lambda x: plain(token_logprob_reference(x, target, **options), x),
            (logits,),
        ),
        (
            lambda h, w, b: present(ck.linear_logprob(h, w, target, bias=b, **options, **more)),
            lambda h, w, b: plain(
                linear_logprob_reference(h, w, target, bias=b, **options), torch.nn.functional.linear(h, w, b)
            ),
            tuple(x.to(dtype) for x in inputs),
        ),
    ]
    for operator, reference, leaves in calls:
        if dtype != torch.float64:
            compare(operator, reference, leaves)
            continue
        leaves = tuple(x.to(DEVICE) for x in leaves)
        for ours, theirs in zip(operator(*leaves), reference(*leaves), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        found = []
        for function in (operator, reference):
            found.append(gradients(lambda *x, f=function: torch.stack([y.sum() for y in f(*x)]).sum(), *leaves))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_log_sum_exp_and_soft_cap_of_a_row_of_several_tiles() -> None:
    target = torch.tensor([4096, 7], device=DEVICE)
    options: dict[str, Any] = {"with_entropy": True, "logit_softcap": 5.0}
    compare(
        lambda x: ck.token_logprob(x * 1, target, **options, with_lse=True, impl="triton"),
        lambda x: (*token_logprob_reference(x, target, **options), (5 * (x / 5).tanh()).logsumexp(-1)),
        (randn(0, 2, 4099, scale=3).float(),),
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_is_minus_infinity_stays_so_under_a_soft_cap(impl: Impl) -> None:
    """A column that is left out by its bias: no share in the sum, no gradient."""
    target = torch.tensor([0, 2, 3], device=DEVICE)
    bias = vector([0.5, -inf, 0.0, 1.0]).requires_grad_()
    hidden, weight = (randn(i, n, 5).float().to(DEVICE).requires_grad_() for i, n in ((0, 3), (1, 4)))
    rest = {name: torch.ones(3, device=DEVICE) for name in ("advantage_T", "weight_T")}
    outputs = [
        ck.linear_logprob(hidden, weight, target, bias=bias, logit_softcap=2.0, impl=impl)[0],
        ck.token_logprob(torch.nn.functional.linear(hidden, weight, bias), target, logit_softcap=2.0, impl=impl)[0],
        ck.linear_policy_loss(
            hidden, weight, target, bias=bias, **rest, old_logprob_T=None, logit_softcap=2.0, impl=impl
        )[1],
    ]
    kept = [0, 2, 3]
    logits = torch.nn.functional.linear(hidden, weight, bias)[:, kept].double()
    expected = (2 * (logits / 2).tanh()).log_softmax(-1)[range(3), range(3)]
    for found in outputs:
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for gradient in torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), (hidden, weight, bias)):
        assert gradient.isfinite().all()
    assert not torch.autograd.grad(
        ck.linear_logprob(hidden, weight, target, bias=bias, logit_softcap=2.0, impl=impl)[0].sum(), weight
    )[0][1].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ignored_tokens_have_no_part_in_the_new_terms(impl: Impl) -> None:
    """Whatever their states and vectors hold: NaN here."""
    target = torch.tensor([3, -100, 1], device=DEVICE)
    hidden = randn(0, 3, 5).float().to(DEVICE)
    hidden[1] = nan
    ones = vector([1.0, nan, 1.0])
    weight = randn(1, 6, 5).float().to(DEVICE)
    options: dict[str, Any] = {"z_loss_coef": 0.1, "logit_softcap": 3.0, "loss": "cispo"}

    def loss(h: Tensor, w: Tensor, b: Tensor, rows: list[int]) -> Tensor:
        rest: Any = dict.fromkeys(("advantage_T", "old_logprob_T", "correction_T", "weight_T"), ones[rows])
        return ck.linear_policy_loss(h[rows], w, target[rows], bias=b, **rest, **options, impl=impl)[0]

    bias = vector([0.1 * i for i in range(6)])
    whole = gradients(lambda h, w, b: loss(h, w, b, [0, 1, 2]), hidden, weight, bias)
    few = gradients(lambda h, w, b: loss(h, w, b, [0, 2]), hidden, weight, bias)
    for ours, expected in zip(whole, few, strict=True):
        torch.testing.assert_close(ours, expected)
    logprob, entropy, lse = ck.linear_logprob(hidden, weight, target, with_entropy=True, with_lse=True, impl=impl)
    assert entropy is not None
    assert (float(logprob[1]), float(entropy[1]), float(lse[1])) == (0.0, 0.0, 0.0)


# --- finite differences -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", TERMS)
def test_gradcheck(terms: str) -> None:
    inputs = {name: x.cpu() for name, x in policy_inputs(1, 6, 9, 5).items()}
    leaves = (inputs.pop("hidden_TD"), inputs.pop("weight_VD"), randn(4, 9))
    options: dict[str, Any] = TERMS[terms] | {"correction_T": randn(5, 6).abs(), "logit_softcap": 2.0}

    def loss(*x: Tensor) -> Tensor:
        return ck.linear_policy_loss(*x[:2], bias=x[2], **inputs, **options, chunk_tokens=4)[0]

    def logprob(*x: Tensor) -> Tensor:
        return linear_logprob_reference(*x[:2], inputs["target_T"], bias=x[2], logit_softcap=2.0)[0]

    function: Callable[..., Tensor] = loss
    if options.get("loss") == "cispo":  # its ratio is held: differences of the loss itself would move it
        held = (logprob(*leaves) - inputs["old_logprob_T"]).exp().clamp(1 - options.get("clip_low", 0.2), 1.2)
        factor = -inputs["weight_T"] * options["correction_T"] * inputs["advantage_T"] * held

        class Held(torch.autograd.Function):
            """The loss with its ratio held at `leaves`; the gradient is the operator's."""

            @staticmethod
            def forward(ctx: Any, *x: Tensor) -> Tensor:
                ctx.save_for_backward(*x)
                others = inputs | {"advantage_T": torch.zeros(6).double()}
                rest = ck.linear_policy_loss(*x[:2], bias=x[2], **others, **options)[0]
                return rest + (factor * logprob(*x)).sum()

            @staticmethod
            def backward(ctx: Any, d: Tensor) -> tuple[Tensor, ...]:
                with torch.enable_grad():
                    return tuple(d * g for g in gradients(loss, *ctx.saved_tensors))

        function = Held.apply
    assert torch.autograd.gradcheck(function, tuple(x.requires_grad_() for x in leaves))


def test_gradcheck_of_log_sum_exp_and_of_ratios_of_sequences() -> None:
    target, cu = torch.tensor([1, 0, 4, 2, 8, 3]), torch.tensor([0, 2, 2, 6])
    hidden, weight, bias = (randn(i, *shape).requires_grad_() for i, shape in enumerate(((6, 5), (9, 5), (9,))))
    options: dict[str, Any] = {"with_entropy": True, "with_lse": True, "logit_softcap": 2.0, "temperature": 0.7}
    check = torch.autograd.gradcheck
    assert check(lambda x: ck.token_logprob(x, target, **options), randn(5, 6, 9).requires_grad_())
    assert check(lambda h, w, b: ck.linear_logprob(h, w, target, bias=b, **options), (hidden, weight, bias))
    share = torch.tensor([0.3, 0.0, 0.2, 0.5, 0.1, 0.7], dtype=torch.float64)
    old = randn(6, 6)
    x = (old + randn(7, 6, scale=0.2)).requires_grad_()
    assert check(lambda x: ck.policy_loss(x, old, randn(8, 6), weight_T=share, cu_seqlens=cu, dual_clip=3.0)[0], x)
    leaves, inputs = sequences_case(1, [2, 0, 4], True)
    inputs |= {"clip_low": 0.9, "clip_high": 9.0, "kl_coef": 0.3, "entropy_coef": 0.1, "z_loss_coef": 0.1}
    assert check(
        lambda h, w, b: ck.linear_policy_loss(h, w, bias=b, **inputs, impl="torch")[0],
        tuple(x.requires_grad_() for x in leaves),
    )


# --- bad input --------------------------------------------------------------------------------------------------------

X, W, T3, I3 = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3), torch.tensor([0, 1, 2])
POLICY: dict[str, Any] = {"advantage_T": T3, "old_logprob_T": T3, "weight_T": T3}


def linear(**options: Any) -> Callable[[], Any]:
    return lambda: ck.linear_policy_loss(X, W, I3, **POLICY, **options)


def direct(**options: Any) -> Callable[[], Any]:
    return lambda: ck.policy_loss(T3, T3, T3, weight_T=T3, **options)


BAD_CALLS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "dual clip": (linear(dual_clip=1.0), ["dual_clip = 1.0", "above 1"]),
    "dual clip of cispo": (direct(dual_clip=3.0, loss="cispo"), ["dual_clip = 3.0", "loss = 'clip'", "'cispo'"]),
    "loss": (direct(loss="gspo"), ["loss = 'gspo'", "'clip' and 'cispo'"]),
    "correction": (direct(correction_T=T3[:2]), ["correction_T", "(2,)", "(3,)"]),
    "correction's dtype": (linear(correction_T=I3), ["correction_T", "int64", "float32"]),
    "offsets": (direct(cu_seqlens=torch.tensor([0, 2])), ["cu_seqlens", "0 to 2", "0 to 3"]),
    "offsets' dtype": (direct(cu_seqlens=T3), ["cu_seqlens", "float32", "int64"]),
    "sequences of cispo": (direct(cu_seqlens=I3, loss="cispo"), ["cu_seqlens", "'clip'", "'cispo'"]),
    "sequences of cispo, from states": (linear(cu_seqlens=I3, loss="cispo"), ["cu_seqlens", "'clip'", "'cispo'"]),
    "offsets from states": (linear(cu_seqlens=torch.tensor([0, 2])), ["cu_seqlens", "0 to 2", "0 to 3"]),
    "offsets' dtype from states": (linear(cu_seqlens=T3), ["cu_seqlens", "float32", "int64"]),
    "estimate": (linear(kl_estimate="k1"), ["kl_estimate = 'k1'", "'k3' and 'k2'"]),
    "clamp": (linear(kl_clamp=0.0), ["kl_clamp = 0.0", "above 0"]),
    "z loss": (linear(z_loss_coef=-1.0), ["z_loss_coef = -1.0", "at least 0"]),
    "cap": (linear(logit_softcap=0.0), ["logit_softcap = 0.0", "above 0"]),
    "cap of logits": (lambda: ck.token_logprob(X, I3, logit_softcap=inf), ["logit_softcap = inf", "finite"]),
    "cap of states": (lambda: ck.linear_logprob(X, W, I3, logit_softcap=nan), ["logit_softcap = nan", "above 0"]),
    "entropy": (linear(entropy_coef=nan), ["entropy_coef = nan", "finite"]),
    "bias": (linear(bias=T3), ["bias", "(3,)", "(5,)"]),
    "bias' dtype": (linear(bias=torch.zeros(5).double()), ["bias", "float64", "float32"]),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_name_the_argument(case: str) -> None:
    assert_refused(*BAD_CALLS[case])


def infonce(**options: Any) -> Callable[[], Any]:
    return lambda: ck.masked_infonce(X, X, **options)


# inf where it is no bound or no limit is allowed
NOT_ALLOWED: dict[tuple[str, str], tuple[Callable[..., Callable[[], Any]], list[float]]] = {
    **{("linear_policy_loss", name): (linear, [nan, inf, -1.0]) for name in ("kl_coef", "z_loss_coef", "dual_clip")},
    **{("linear_policy_loss", name): (linear, [nan, inf, 0.0]) for name in ("temperature", "logit_softcap")},
    ("linear_policy_loss", "clip_low"): (linear, [nan, inf, -0.1]),
    ("linear_policy_loss", "clip_high"): (linear, [nan, -0.1]),
    ("linear_policy_loss", "kl_clamp"): (linear, [nan, -1.0]),
    ("linear_policy_loss", "entropy_coef"): (linear, [nan, inf, -inf]),
    ("linear_policy_loss", "top_p"): (linear, [nan, inf, 0.0]),
    ("policy_loss", "clip_low"): (direct, [nan, inf, -0.1]),
    ("policy_loss", "clip_high"): (direct, [nan, -0.1]),
    ("policy_loss", "dual_clip"): (direct, [nan, inf, -1.0]),
    **{
        ("linear_logprob", name): (lambda **o: lambda: ck.linear_logprob(X, W, I3, **o), [nan, inf, -1.0])
        for name in ("temperature", "logit_softcap", "top_p")
    },
    **{
        ("token_logprob", name): (lambda **o: lambda: ck.token_logprob(X, I3, **o), [nan, inf, -1.0])
        for name in ("temperature", "logit_softcap", "top_p")
    },
    ("value_loss", "clip"): (lambda **o: lambda: ck.value_loss(T3, T3, T3, weight_T=T3, **o), [nan, -1.0]),
    ("masked_infonce", "temperature"): (infonce, [nan, inf, 0.0]),
    ("masked_infonce", "positive_clamp"): (infonce, [nan, -inf, -1.0]),
    **{
        ("gae", name): (
            lambda **o: lambda: ck.gae(T3, T3, torch.tensor([0, 3]), **{"gamma": 1.0, "lam": 1.0} | o),
            [nan, inf, -1.0],
        )
        for name in ("gamma", "lam")
    },
    ("kl_shaped_reward", "kl_coef"): (
        lambda **o: lambda: ck.kl_shaped_reward(T3[:1], T3, T3, torch.tensor([0, 3]), **o),
        [nan, inf, -1.0],
    ),
    ("whiten", "eps"): (lambda **o: lambda: ck.whiten(T3, **o), [nan, inf, 0.0]),
}


def test_every_number_is_in_the_list() -> None:
    operators = [x for name in ck.__all__ if "reference" not in name and callable(x := getattr(ck, name))]
    floats = {
        (x.__name__, name)
        for x in operators
        for name, p in inspect.signature(x).parameters.items()
        if p.annotation in (float, float | None)
    }
    assert floats == set(NOT_ALLOWED)


@pytest.mark.parametrize("name", NOT_ALLOWED, ids=" ".join)
def test_numbers_that_make_no_sense_are_refused(name: tuple[str, str]) -> None:
    call, values = NOT_ALLOWED[name]
    for value in values:
        assert_refused(call(**{name[1]: value}), [f"{name[1]} = {value}: expected"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.usefixtures("unchecked")
def test_wrong_offsets_are_nan_where_nothing_checks_them(impl: Impl) -> None:
    x = vector([-1.0] * 5).requires_grad_()
    for wrong in ([0, 3, 2, 5], [0, 7, 5], [1, 5], [0, 4]):
        cu = torch.tensor(wrong, device=DEVICE)
        loss, _ = ck.policy_loss(x, x.detach(), x.detach(), weight_T=vector([1.0] * 5), cu_seqlens=cu, impl=impl)
        assert loss.isnan()
        assert torch.autograd.grad(loss, x)[0].isnan().all()
