"""Terms of the policy loss (clips, CISPO, KL estimates, z loss) by hand, against references and finite differences."""

import math
from collections.abc import Callable
from math import nan
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

from .checks import DEVICE, DTYPES, FAST, FEW, compare, gradients, policy_inputs, randint, randn, seeds, vector
from .policy_case import TERMS

Impl = Literal["torch", "triton"]
IMPLEMENTATIONS: list[Impl] = ["torch", "triton"]


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
