"""Policy and value losses, of log-probs and of hidden states, against float64 references; their metrics and cost."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import carft_kernels as ck
from carft_kernels.linear_logprob import linear_logprob_reference
from carft_kernels.linear_policy_loss import linear_policy_loss_reference
from carft_kernels.policy_loss import policy_loss_reference, value_loss_reference

from .checks import DEVICE, FAST, gradients, randn, rng, seeds
from .policy_case import TOKENS, VOCABULARY, WIDTH, _without, policy_inputs

# --- policy loss from hidden states -----------------------------------------------------------------------------------


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
