"""Triton kernels of log-probs and entropies, of logits and of hidden states, against plain torch in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import carft_kernels as ck
from carft_kernels.linear_logprob import linear_logprob_reference

from .checks import DEVICE, DTYPES, FEW, HALF, compare, plain_linear, plain_logprob, randint, randn, seeds


def check_token_logprob(
    logits: Tensor, target: Tensor, temperature: float, entropy: bool, inplace: bool, floor: float = 1e-2
) -> None:
    def operator(x: Tensor) -> Any:
        # a copy, so that an in-place backward does not overwrite the leaf
        result = ck.token_logprob(
            x * 1, target, temperature=temperature, with_entropy=entropy, inplace_backward=inplace, impl="triton"
        )
        return result if entropy else result[0]

    compare(operator, lambda x: plain_logprob(x, target, temperature, entropy), (logits,), floor)


@FEW
@given(
    seed=seeds,
    rows=st.integers(1, 5),
    vocabulary=st.integers(1, 40) | st.sampled_from([2048, 4096, 4099, 8193]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    entropy=st.booleans(),
    inplace=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_token_logprob(
    seed: int, rows: int, vocabulary: int, temperature: float, entropy: bool, inplace: bool, dtype: torch.dtype
) -> None:
    logits = randn(seed, rows, vocabulary, scale=3).to(dtype)
    check_token_logprob(logits, randint(seed, vocabulary, rows), temperature, entropy, inplace)


HARD: dict[str, Callable[[Tensor], Tensor]] = {
    "at -300": lambda x: x - 300,
    "at 300": lambda x: x + 300,
    "times 200": lambda x: x * 200,
    "one-hot": lambda x: torch.eye(x.shape[1])[: len(x)].to(x) * 1000,
    "-inf columns": lambda x: x.masked_fill(torch.arange(x.shape[1]) % 3 == 1, float("-inf")),
    "first half -inf": lambda x: x.masked_fill(torch.arange(x.shape[1]) < x.shape[1] // 2, float("-inf")),
    "one finite": lambda x: x.masked_fill(torch.arange(x.shape[1]) != x.shape[1] - 2, float("-inf")),
    "all equal": torch.zeros_like,
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("vocabulary", [11, 4111])
def test_token_logprob_hard_values(kind: str, vocabulary: int) -> None:
    logits = HARD[kind](randn(0, 4, vocabulary)).float()
    target = torch.full((4,), vocabulary - 2, device=DEVICE)
    check_token_logprob(logits, target, 1.0, True, False)
    check_token_logprob(logits, target, 0.05, True, False, floor=1.0)
    x = logits.to(DEVICE).requires_grad_()
    logprob, _ = ck.token_logprob(x, target, impl="triton")
    assert (logprob <= 0).all()
    (gradient,) = torch.autograd.grad(logprob.sum(), x)
    assert gradient.sum(-1).abs().max() < 1e-5  # rows of d_logits sum to 0
    shifted, _ = ck.token_logprob(x.detach() + 8, target, impl="triton")  # exact in float32 at these sizes
    torch.testing.assert_close(shifted, logprob, rtol=1e-5, atol=1e-4)


def test_nan_logits_are_not_hidden() -> None:
    logits = randn(0, 2, 4100).float().to(DEVICE)
    logits[1, 4096] = float("nan")
    for entropy in (False, True):
        logprob, _ = ck.token_logprob(logits, torch.tensor([1, 2], device=DEVICE), with_entropy=entropy, impl="triton")
        assert logprob.isnan().tolist() == [False, True]


def test_rows_apart_and_rows_out_of_order() -> None:
    """A view with a gap between rows works; a transposed one is refused by name."""
    wide = randn(0, 3, 50).float().to(DEVICE)
    target = randint(1, 37, 3)
    expected, _ = ck.token_logprob(wide[:, 5:42].contiguous(), target, impl="triton")
    torch.testing.assert_close(ck.token_logprob(wide[:, 5:42], target, impl="triton")[0], expected)
    compare(
        lambda x: ck.token_logprob(x[:, 5:42], target, with_entropy=True, impl="triton"),
        lambda x: plain_logprob(x[:, 5:42], target, 1.0, True),
        (wide,),
    )
    weight, spread = randn(2, 70, 12).float(), randn(3, 70, 2).float()
    compare(  # every hidden state the same memory, a bias with a gap between its numbers
        lambda h, w, b: ck.linear_logprob(h.expand(5, 12), w, target[:1].expand(5), bias=b[:, 0], impl="triton")[0],
        lambda h, w, b: plain_linear(h.expand(5, 12), w, b[:, 0], target[:1].expand(5), 1.0)[0],
        (randn(4, 1, 12).float(), weight, spread),
    )
    with pytest.raises(ValueError, match=r"logits_TV has strides \(1, 50\).*contiguous"):
        ck.token_logprob(wide[:, :3].T, target, impl="triton")


@FEW
@given(
    seed=seeds,
    tokens=st.integers(1, 40),
    vocabulary=st.integers(1, 70),
    width=st.integers(8, 40),
    temperature=st.sampled_from([0.3, 1.0]),
    with_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_linear_logprob(
    seed: int, tokens: int, vocabulary: int, width: int, temperature: float, with_bias: bool, dtype: torch.dtype
) -> None:
    inputs = (randn(seed, tokens, width), randn(seed + 1, vocabulary, width), randn(seed + 2, vocabulary))
    target = randint(seed, vocabulary, tokens)

    def operator(h: Tensor, w: Tensor, b: Tensor | None = None) -> Any:
        return ck.linear_logprob(h, w, target, bias=b, temperature=temperature, with_entropy=True, impl="triton")

    compare(
        operator,
        lambda h, w, b=None: plain_linear(h, w, b, target, temperature),
        tuple(x.to(dtype) for x in inputs[: 2 + with_bias]),
        # of one token p is 1 but for a rounding of 6e-8, and what cancels against it is up to 9 / temperature
        floor=0.05 / temperature if vocabulary == 1 else 1e-2,
    )


@pytest.mark.parametrize("kind", ["at -300", "times 200", "-inf columns"])
def test_linear_logprob_hard_values(kind: str) -> None:
    hidden, weight, bias = randn(0, 9, 8), randn(1, 67, 8), torch.zeros(67, dtype=torch.float64)
    target = randint(2, 67, 9)
    if kind == "at -300":
        bias -= 300
    elif kind == "times 200":
        weight = weight.mul(200).round()  # whole numbers: both matmuls are exact, so only the softmax is tested
        hidden = hidden.mul(8).round() / 8
    else:
        bias[[v for v in range(67) if v not in target.tolist()]] = float("-inf")
    logprob, _ = ck.linear_logprob(
        *(x.float().to(DEVICE) for x in (hidden, weight)), target, bias=bias.float().to(DEVICE), impl="triton"
    )
    assert (logprob <= 0).all()
    compare(
        lambda h, w, b: ck.linear_logprob(h, w, target, bias=b, with_entropy=True, impl="triton"),
        lambda h, w, b: plain_linear(h, w, b, target, 1.0),
        (hidden.float(), weight.float(), bias.float()),
    )


def test_linear_logprob_of_more_than_a_group_of_rows_and_of_tiles() -> None:
    target = randint(2, 600, 300)
    compare(
        lambda h, w: ck.linear_logprob(h, w, target, with_entropy=True, impl="triton"),
        lambda h, w: plain_linear(h, w, None, target, 1.0),
        (randn(0, 300, 16).float(), randn(1, 600, 16).float()),
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("vocabulary", [5, 2048, 4103])
def test_gradients_over_their_own_logits(vocabulary: int, dtype: torch.dtype) -> None:
    """Rows of several tiles, and of none: half precision overwrites the float32 row that it is made of."""
    target = randint(2, vocabulary, 3)
    target[1] = -100
    inputs = tuple(randn(i, n, 16, scale=0.7).to(dtype) for i, n in enumerate((3, vocabulary)))

    def plain(h: Tensor, w: Tensor) -> Tensor:
        logprob, _ = linear_logprob_reference(h, w, target)
        return logprob.to(torch.promote_types(h.dtype, torch.float32))

    compare(lambda h, w: ck.linear_logprob(h, w, target, impl="triton")[0], plain, inputs)
