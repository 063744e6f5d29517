"""Reference log-probs from a frozen model's hidden states, found by the policy loss itself."""

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import carft_kernels as ck
from carft_kernels.linear_policy_loss import linear_policy_loss_reference

from .checks import DEVICE, DTYPES, FAST, FEW, assert_refused, compare, gradients, policy_inputs, randint, randn, seeds

Impl = Literal["torch", "triton"]
IMPLEMENTATIONS: list[Impl] = ["torch", "triton"]
T, V, D = 9, 30, 8


def log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, softcap: float | None) -> Tensor:
    """Of the targets, by plain torch in float64, at a temperature of 0.8."""
    hidden, weight, bias = (None if x is None else x.double() for x in (hidden, weight, bias))
    x = torch.nn.functional.linear(hidden, weight, bias)
    x = (x if softcap is None else softcap * (x / softcap).tanh()) / 0.8
    return x.log_softmax(-1).gather(1, target[:, None])[:, 0]


def case(
    seed: int, tokens: int, vocabulary: int, head: str, bias: bool
) -> tuple[dict[str, Tensor], tuple[Tensor, ...], dict[str, Tensor]]:
    """Vectors, the policy's states, weight and bias, and what the loss is given of a reference model like it."""
    inputs = policy_inputs(seed, tokens, vocabulary, D)
    leaves = [inputs.pop("hidden_TD"), inputs.pop("weight_VD")] + [randn(seed + 9, vocabulary)] * bias
    del inputs["ref_logprob_T"]
    frozen = {"reference_hidden_TE": leaves[0] + randn(seed + 10, tokens, D, scale=0.2)}
    if head == "own":
        frozen["reference_weight_VE"] = leaves[1] + randn(seed + 11, vocabulary, D, scale=0.2)
    elif head == "wider":
        frozen = {"reference_hidden_TE": randn(seed + 10, tokens, D + 3)}
        frozen["reference_weight_VE"] = randn(seed + 11, vocabulary, D + 3, scale=0.3)
    if bias and head != "policy's":
        frozen["reference_bias"] = leaves[2] + randn(seed + 12, vocabulary, scale=0.2)
    return inputs, tuple(leaves), frozen


def reference_head(leaves: tuple[Tensor, ...], frozen: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    if "reference_weight_VE" in frozen:
        return frozen["reference_weight_VE"], frozen.get("reference_bias")
    return leaves[1], leaves[2] if len(leaves) > 2 else None


heads = st.sampled_from(["policy's", "own", "wider"])
KL: dict[str, Any] = {"kl_coef": 0.3, "kl_estimate": "k2", "entropy_coef": 0.1, "temperature": 0.8}


@FAST
@given(
    seed=seeds,
    tokens=st.integers(1, 20),
    vocabulary=st.integers(2, 40),
    head=heads,
    bias=st.booleans(),
    softcap=st.sampled_from([None, 1.5]),
    skip_dead=st.booleans(),
)
def test_they_are_those_of_plain_torch(
    seed: int, tokens: int, vocabulary: int, head: str, bias: bool, softcap: float | None, skip_dead: bool
) -> None:
    """Loss and gradients are those with plain torch's log-probs in `ref_logprob_T`; none flows through them."""
    inputs, leaves, frozen = case(seed, tokens, vocabulary, head, bias)
    inputs, target = {name: x.cpu() for name, x in inputs.items()}, inputs["target_T"].cpu()
    ref = log_softmax(frozen["reference_hidden_TE"], *reference_head(leaves, frozen), target, softcap)
    options = KL | {"logit_softcap": softcap}

    def operator(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        extra: dict[str, Any] = {"chunk_tokens": 7, "skip_dead": skip_dead, "impl": "torch"}
        loss, _, metrics = ck.linear_policy_loss(h, w, bias=b, **inputs, **frozen, **options, **extra)
        torch.testing.assert_close(metrics["ref_logprob_T"], ref, rtol=1e-10, atol=1e-12)
        return loss

    def plain(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return linear_policy_loss_reference(h, w, bias=b, **inputs, ref_logprob_T=ref, **options)[0]

    def reference(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return linear_policy_loss_reference(h, w, bias=b, **inputs, **frozen, **options)[0]

    for function in (operator, reference):
        torch.testing.assert_close(function(*leaves), plain(*leaves), rtol=1e-10, atol=1e-12)
        found, expected = gradients(function, *leaves), gradients(plain, *leaves)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@FEW
@given(
    seed=seeds,
    tokens=st.integers(1, 9),
    vocabulary=st.integers(8, 40),
    head=heads,
    bias=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_by_triton(
    seed: int, tokens: int, vocabulary: int, head: str, bias: bool, softcap: float | None, dtype: torch.dtype
) -> None:
    inputs, leaves, frozen = case(seed, tokens, vocabulary, head, bias)
    leaves = tuple(x.to(dtype).to(DEVICE) for x in leaves)
    frozen = {name: x.to(dtype).to(DEVICE) for name, x in frozen.items()}
    rest = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    ref = log_softmax(frozen["reference_hidden_TE"], *reference_head(leaves, frozen), rest["target_T"], softcap)
    options = KL | {"logit_softcap": softcap}

    def operator(h: Tensor, w: Tensor, b: Tensor | None = None) -> Any:
        loss, logprob, metrics = ck.linear_policy_loss(
            h, w, bias=b, **rest, **frozen, **options, chunk_tokens=4, impl="triton"
        )
        torch.testing.assert_close(metrics["ref_logprob_T"].double(), ref, rtol=1e-5, atol=1e-5)
        return loss, logprob

    def plain(h: Tensor, w: Tensor, b: Tensor | None = None) -> Any:
        wide = {name: x.double() if x.is_floating_point() else x for name, x in rest.items()}
        loss, logprob = linear_policy_loss_reference(h, w, bias=b, **wide, ref_logprob_T=ref, **options)
        return loss, logprob.detach()

    compare(operator, plain, leaves)


def states(impl: Impl) -> tuple[dict[str, Any], Tensor, Tensor]:
    ones = torch.ones(T, device=DEVICE)
    options = {"advantage_T": 0 * ones, "old_logprob_T": None, "weight_T": ones, "kl_coef": 0.5, "impl": impl}
    hidden, weight = randn(1, T, D).float().to(DEVICE), randn(2, V, D).float().to(DEVICE)
    return options | {"target_T": randint(0, V, T)}, hidden, weight


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("cut", [{}, {"top_k": 9, "top_p": 0.8}])
def test_a_policy_is_no_distance_from_itself(impl: Impl, cut: dict[str, Any]) -> None:
    """Exactly: both log-probs are found in the same way, top-k and top-p included."""
    options, hidden, weight = states(impl)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    frozen: Any
    for frozen in ({}, {"reference_weight_VE": weight.clone()}):
        loss, logprob, metrics = ck.linear_policy_loss(
            *leaves, **options, reference_hidden_TE=leaves[0], **frozen, **cut, temperature=0.7
        )
        assert loss.item() == 0
        assert torch.equal(metrics["ref_logprob_T"], logprob)
        assert not metrics["ref_logprob_T"].requires_grad
        assert not any(g.any() for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_reference_model_of_another_kind_and_tokens_that_are_ignored(impl: Impl) -> None:
    """The policy's gradient goes through its own log-prob alone; an ignored token may hold anything."""
    options, hidden, weight = states(impl)
    other, kept = hidden.flip(0).clone(), torch.arange(T) != 4
    options["target_T"][4], hidden[4], other[4] = -100, math.nan, math.nan
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss, _, metrics = ck.linear_policy_loss(*leaves, **options, reference_hidden_TE=other)
    found = torch.autograd.grad(loss, leaves)
    target = options["target_T"][kept.to(DEVICE)]
    h, w = (x.detach().double().requires_grad_() for x in (hidden[kept], weight))
    ref, own = (
        x.log_softmax(-1).gather(1, target[:, None])[:, 0] for x in (other[kept].double() @ w.detach().T, h @ w.T)
    )
    expected = 0.5 * ((ref - own).exp() - (ref - own) - 1).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["ref_logprob_T"][kept].double(), ref, rtol=1e-5, atol=1e-5)
    assert metrics["ref_logprob_T"][4] == 0
    d_hidden, d_weight = torch.autograd.grad(expected, (h, w))
    torch.testing.assert_close(found[0][kept].double(), d_hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1].double(), d_weight, rtol=1e-4, atol=1e-5)
    assert not found[0][4].any()


def test_one_product_more_and_no_more_than_a_chunk_of_logits(largest_tensor: Any) -> None:
    tokens, vocabulary, width, chunk = 60, 4001, 16, 8
    hidden, weight = randn(0, tokens, width).float().requires_grad_(), randn(1, vocabulary, width).float()
    weight.requires_grad_()
    ones, target = torch.ones(tokens), torch.randint(vocabulary, (tokens,))
    with largest_tensor:
        ck.linear_policy_loss(
            hidden,
            weight,
            target,
            advantage_T=ones,
            old_logprob_T=None,
            weight_T=ones,
            reference_hidden_TE=hidden.detach() * 0.9,
            kl_coef=0.1,
            chunk_tokens=chunk,
            impl="torch",
        )
    assert largest_tensor.matmul_flops == 4 * 2 * tokens * vocabulary * width
    assert largest_tensor.numel <= max(chunk, width) * vocabulary


def test_gradcheck() -> None:
    """With a weight of its own: differences of a shared one would move the reference, too."""
    inputs, leaves, frozen = case(1, 6, 9, "own", True)
    inputs = {name: x.cpu() for name, x in inputs.items()}
    options: dict[str, Any] = {"kl_coef": 0.3, "logit_softcap": 2.0, "chunk_tokens": 4}
    assert torch.autograd.gradcheck(
        lambda h, w, b: ck.linear_policy_loss(h, w, bias=b, **inputs, **frozen, **options)[0],
        tuple(x.requires_grad_() for x in leaves),
    )


def call(**options: Any) -> Callable[[], Any]:
    x, w, t = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3)
    rest = {"advantage_T": t, "old_logprob_T": t, "weight_T": t, "reference_hidden_TE": torch.zeros(3, 4)} | options
    return lambda: ck.linear_policy_loss(x, w, torch.tensor([0, 1, 2]), **rest)


BAD_CALLS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "no reference": (
        call(reference_hidden_TE=None, kl_coef=0.1),
        ["kl_coef = 0.1", "needs ref_logprob_T or reference_hidden_TE"],
    ),
    "two": (call(ref_logprob_T=torch.zeros(3)), ["ref_logprob_T and reference_hidden_TE", "one of them"]),
    "weight alone": (
        call(reference_hidden_TE=None, reference_weight_VE=torch.zeros(5, 4)),
        ["reference_weight_VE needs reference_hidden_TE"],
    ),
    "bias alone": (
        call(reference_hidden_TE=None, reference_bias=torch.zeros(5)),
        ["reference_bias needs reference_hidden_TE"],
    ),
    "tokens": (call(reference_hidden_TE=torch.zeros(2, 4)), ["reference_hidden_TE has shape (2, 4)", "(3, 4)"]),
    "width": (call(reference_hidden_TE=torch.zeros(3, 6)), ["reference_hidden_TE has shape (3, 6)", "(3, 4)"]),
    "dimensions": (call(reference_hidden_TE=torch.zeros(3)), ["reference_hidden_TE has shape (3,)", "2 dimensions"]),
    "dtype": (call(reference_hidden_TE=torch.zeros(3, 4).double()), ["reference_hidden_TE", "float64", "float32"]),
    "vocabulary": (call(reference_weight_VE=torch.zeros(6, 4)), ["reference_weight_VE has shape (6, 4)", "(5, 4)"]),
    "weight's width": (call(reference_weight_VE=torch.zeros(5, 6)), ["reference_weight_VE has shape (5, 6)", "(5, 4)"]),
    "bias without the policy's": (
        call(reference_weight_VE=torch.zeros(5, 4), reference_bias=torch.zeros(5)),
        ["reference_bias is a tensor", "None"],
    ),
    "bias without a weight": (
        call(bias=torch.zeros(5), reference_bias=torch.zeros(5)),
        ["reference_bias is a tensor", "reference_weight_VE"],
    ),
    "no bias beside the policy's": (
        call(bias=torch.zeros(5), reference_weight_VE=torch.zeros(5, 4)),
        ["reference_bias is None", "(5,)"],
    ),
    "bias' shape": (
        call(bias=torch.zeros(5), reference_weight_VE=torch.zeros(5, 4), reference_bias=torch.zeros(4)),
        ["reference_bias has shape (4,)", "(5,)"],
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_name_the_argument(name: str) -> None:
    assert_refused(*BAD_CALLS[name])
