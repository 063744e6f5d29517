"""Ratios of whole sequences (GSPO): by hand, by references and finite differences (log-sum-exp, too), wrong offsets."""

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import carft_kernels as ck
from carft_kernels.linear_policy_loss import linear_policy_loss_reference
from carft_kernels.policy_loss import policy_loss_reference

from .checks import DEVICE, DTYPES, FAST, FEW, compare, gradients, offsets, policy_inputs, randn, seeds, vector

Impl = Literal["torch", "triton"]
IMPLEMENTATIONS: list[Impl] = ["torch", "triton"]


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


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.usefixtures("unchecked")
def test_wrong_offsets_are_nan_where_nothing_checks_them(impl: Impl) -> None:
    x = vector([-1.0] * 5).requires_grad_()
    for wrong in ([0, 3, 2, 5], [0, 7, 5], [1, 5], [0, 4]):
        cu = torch.tensor(wrong, device=DEVICE)
        loss, _ = ck.policy_loss(x, x.detach(), x.detach(), weight_T=vector([1.0] * 5), cu_seqlens=cu, impl=impl)
        assert loss.isnan()
        assert torch.autograd.grad(loss, x)[0].isnan().all()
