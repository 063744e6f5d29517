"""Triton kernels of the policy and value losses against plain torch in float64 and the torch implementation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import carft_kernels as ck
from carft_kernels.policy_loss import policy_loss_reference, value_loss_reference

from .checks import (
    DEVICE,
    DTYPES,
    FEW,
    compare,
    plain_linear,
    policy_inputs,
    randint,
    randn,
    rng,
    seeds,
    values_and_gradients,
)

Scalar = Callable[..., Tensor]


def plain_policy(hidden: Tensor, weight: Tensor, inputs: dict[str, Tensor], kl_coef: float, entropy_coef: float) -> Any:
    logprob, entropy = plain_linear(hidden, weight, None, inputs["target_T"], 0.8)
    ratio = (logprob - inputs["old_logprob_T"].to(logprob)).exp()
    advantage = inputs["advantage_T"].to(logprob)
    loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.9, 1.3))
    difference = inputs["ref_logprob_T"].to(logprob) - logprob
    loss = loss + kl_coef * (difference.exp() - difference - 1) - entropy_coef * entropy
    return (inputs["weight_T"].to(logprob) * loss).sum(), logprob.detach()


@FEW
@given(
    seed=seeds,
    tokens=st.integers(1, 40),
    vocabulary=st.integers(2, 60),
    width=st.integers(8, 24),
    chunk=st.sampled_from([None, 1, 7]),
    kl_coef=st.sampled_from([0.0, 0.1]),
    entropy_coef=st.sampled_from([0.0, 0.05]),
    dtype=st.sampled_from(DTYPES),
)
def test_linear_policy_loss(
    seed: int,
    tokens: int,
    vocabulary: int,
    width: int,
    chunk: int | None,
    kl_coef: float,
    entropy_coef: float,
    dtype: torch.dtype,
) -> None:
    inputs = policy_inputs(seed, tokens, vocabulary, width)
    rest = {
        k: v.float() if v.is_floating_point() else v for k, v in inputs.items() if k not in ("hidden_TD", "weight_VD")
    }
    options: dict[str, Any] = {"kl_coef": kl_coef, "entropy_coef": entropy_coef, "chunk_tokens": chunk}

    def operator(h: Tensor, w: Tensor) -> Any:
        return ck.linear_policy_loss(
            h, w, **rest, clip_low=0.1, clip_high=0.3, temperature=0.8, **options, impl="triton"
        )[:2]

    plain = {k: v.double() if v.is_floating_point() else v for k, v in rest.items()}
    compare(
        operator,
        lambda h, w: plain_policy(h, w, plain, kl_coef, entropy_coef),
        (inputs["hidden_TD"].to(dtype), inputs["weight_VD"].to(dtype)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_operators_have_the_same_logits_to_the_bit(dtype: torch.dtype) -> None:
    """The ratio of a policy to itself is 1, also where chunks begin at other rows of tiles."""
    hidden, weight = (randn(i, n, 40, scale=2.0).to(dtype).to(DEVICE) for i, n in enumerate((48, 90)))
    target, ones = randint(2, 90, 48), torch.ones(48, device=DEVICE)
    old, _ = ck.linear_logprob(hidden, weight, target, impl="triton")
    vectors = {"advantage_T": ones, "old_logprob_T": old, "weight_T": ones}
    for chunk in (None, 16):  # rows of the interpreter's tiles, whose products depend on where a row is in one
        _, logprob, metrics = ck.linear_policy_loss(
            hidden.requires_grad_(), weight, target, **vectors, chunk_tokens=chunk, impl="triton"
        )
        assert torch.equal(logprob, old)
        assert metrics["approx_kl"] == 0


@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True), (False, False)])
def test_both_implementations_agree_on_gradients_and_metrics(need: tuple[bool, bool]) -> None:
    inputs = policy_inputs(0, 30, 41, 12)
    rest = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    results = []
    for impl in ("triton", "torch"):
        hidden = rest["hidden_TD"].to(DEVICE).requires_grad_(need[0])
        weight = rest["weight_VD"].to(DEVICE).requires_grad_(need[1])
        tensors = {k: v for k, v in rest.items() if k not in ("hidden_TD", "weight_VD")}
        loss, logprob, metrics = ck.linear_policy_loss(
            hidden,
            weight,
            **tensors,
            kl_coef=0.1,
            entropy_coef=0.01,
            impl=impl,  # type: ignore[arg-type]
        )
        wanted = [x for x in (hidden, weight) if x.requires_grad]
        gradients = torch.autograd.grad(loss, wanted) if wanted else ()
        results.append([loss, logprob, *metrics.values(), *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@FEW
@given(seed=seeds, tokens=st.integers(0, 40) | st.sampled_from([1024, 2500]), dtype=st.sampled_from(DTYPES))
def test_policy_and_value_loss(seed: int, tokens: int, dtype: torch.dtype) -> None:
    a, b, c = randn(seed, tokens), randn(seed + 1, tokens, scale=0.3), randn(seed + 2, tokens)
    share = torch.rand(tokens, generator=rng(seed), dtype=torch.float64) / max(tokens, 1)
    share[::3] = 0
    old = (a + b).to(dtype).to(DEVICE)
    c, share, a = (x.to(dtype).to(DEVICE) for x in (c, share, a))
    # exactly on the clip of the value loss the derivative is a convention, and torch 2.15 has another than 2.13
    share = share.masked_fill((a.double() - old.double()).abs() == 0.25, 0.0)
    wide = torch.promote_types(dtype, torch.float32)

    def plain(reference: Scalar, **options: float) -> Scalar:
        def run(x: Tensor) -> Tensor:
            y = torch.promote_types(x.dtype, wide)
            return reference(x.to(y), old.to(y), c.to(y), weight_T=share.to(y), **options)

        return run

    compare(
        lambda x: ck.policy_loss(x, old, c, weight_T=share, clip_low=0.1, clip_high=0.3, impl="triton")[0],
        plain(policy_loss_reference, clip_low=0.1, clip_high=0.3),
        (a,),
    )
    compare(
        lambda x: ck.value_loss(x, old, c, weight_T=share, clip=0.25, impl="triton")[0],
        plain(value_loss_reference, clip=0.25),
        (a,),
    )
    for operator in (ck.policy_loss, ck.value_loss):
        ours, theirs = (operator(a, old, c, weight_T=share, impl=impl)[1] for impl in ("triton", "torch"))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [65_536, 65_537, 100_000])
def test_policy_and_value_loss_of_several_programs(tokens: int) -> None:
    """Sums of programs that are added in their order: right, and the same bits in every run."""
    a, c, share = (randn(i, tokens) for i in range(3))
    inputs = [x.float().to(DEVICE) for x in (a, a + randn(3, tokens, scale=0.3), c, share.abs() / tokens)]
    for operator, reference in ((ck.policy_loss, policy_loss_reference), (ck.value_loss, value_loss_reference)):
        runs = []
        for function, impl, dtype in (
            (operator, {"impl": "triton"}, torch.float32),
            (operator, {"impl": "triton"}, torch.float32),
            (operator, {"impl": "torch"}, torch.float64),
            (reference, {}, torch.float64),
        ):
            x, old, third, weight = (y.to(dtype) for y in inputs)
            result = function(x.requires_grad_(), old, third, weight_T=weight, **impl)  # type: ignore[operator]
            loss, metrics = result if isinstance(result, tuple) else (result, {})
            runs.append([loss, *torch.autograd.grad(loss, x), *metrics.values()])
        assert all(map(torch.equal, *runs[:2]))
        for wanted in runs[2:]:
            for ours, truth in zip(runs[0], wanted, strict=False):  # the plain expression has no metrics
                assert (ours.double() - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("broken", [float("-inf"), float("nan"), -200.0])
def test_tokens_without_weight_take_no_part(broken: float) -> None:
    x, old, advantage, share = randn(0, 40), randn(1, 40), randn(2, 40), torch.ones(40, dtype=torch.float64)
    share[3:9] = 0
    clean = (old, advantage, share)
    dirty = (old.masked_fill(share == 0, broken), advantage, share)
    for operator in (ck.policy_loss, ck.value_loss):
        results = []
        for rest in (clean, dirty):
            a, b, w = (y.float().to(DEVICE) for y in rest)
            results.append(
                values_and_gradients(
                    lambda z, a=a, b=b, w=w, f=operator: f(z, a, b, weight_T=w, impl="triton")[0],
                    (x.float().to(DEVICE),),
                )
            )
        assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))
