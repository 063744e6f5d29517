"""Log-sum-exp and soft cap of the log-prob operators against plain torch in float64."""

from collections.abc import Callable
from math import inf
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import carft_kernels as ck
from carft_kernels.linear_logprob import linear_logprob_reference
from carft_kernels.token_logprob import token_logprob_reference

from .checks import DEVICE, DTYPES, FEW, compare, gradients, randint, randn, seeds, vector

Impl = Literal["torch", "triton"]
IMPLEMENTATIONS: list[Impl] = ["torch", "triton"]


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
