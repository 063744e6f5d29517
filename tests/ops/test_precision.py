"""Finite differences of every operator, and errors in float32 and in half precision."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import carft_kernels as ck
from carft_kernels.linear_logprob import linear_logprob_reference
from carft_kernels.linear_policy_loss import linear_policy_loss_reference

from .checks import assert_float32_error, gradients, offsets_of, randn
from .policy_case import TOKENS, VOCABULARY, _without, policy_inputs


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
