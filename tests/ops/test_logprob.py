"""Log-probs and entropies, of logits and of hidden states, against float64 references; what they write and hold."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import carft_kernels as ck
from carft_kernels.linear_logprob import linear_logprob_reference
from carft_kernels.token_logprob import token_logprob_reference

from .checks import FAST, assert_float32_error, gradients, randn, rng, seeds


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
