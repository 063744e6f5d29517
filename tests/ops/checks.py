"""Seeds, inputs and comparisons that the operators' tests share; its import puts Triton's interpreter right."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from carft_kernels._runtime import INTERPRETED

DEVICE = os.environ.get("CARFT_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
EXAMPLES = int(os.environ.get("CARFT_TEST_EXAMPLES", "15"))
# no shrinking: interpreted examples take seconds
FEW = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
FAST = settings(max_examples=25, deadline=None)
HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF]
seeds = st.integers(0, 2**31)

if INTERPRETED:
    from .interpreter import repair

    repair()
elif DEVICE == "cuda" and torch.version.cuda is None:
    # a sanitizer runs the kernels on the CPU, which has no half-precision product with a float32 result
    _aten = torch.library.Library("aten", "IMPL", "CPU")

    def _mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
        return out.copy_(a.to(out_dtype) @ b.to(out_dtype))

    def _addmm(
        c: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: int = 1, alpha: int = 1, out: Tensor
    ) -> Tensor:
        product = alpha * (a.to(out_dtype) @ b.to(out_dtype))
        return out.copy_(product + beta * c if beta else product)  # what c holds does not count with a beta of 0

    _aten.impl("mm.dtype", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    _aten.impl("mm.dtype_out", _mm)
    _aten.impl("addmm.dtype_out", _addmm)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=rng(seed), dtype=torch.float64) * scale).to(dtype)


def randint(seed: int, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=rng(seed)).to(DEVICE)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)


def offsets_of(lengths: list[int]) -> Tensor:
    """On the CPU, where randn is, too."""
    return torch.tensor([0, *lengths]).cumsum(0)


def vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves)


def weighted(outputs: Any, seed: int = 99) -> Tensor:
    """One number made of everything an operator returns, so that its gradient tests all of it."""
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(x, Tensor)]
    total = torch.zeros((), dtype=outputs[0].dtype, device=DEVICE)
    for i, x in enumerate(outputs):
        if x.requires_grad:
            total = total + (x * randn(seed + i, *x.shape).to(x)).sum()
    return total


def values_and_gradients(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    values = [x.detach() for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(x, Tensor)]
    return [*values, *torch.autograd.grad(weighted(outputs), leaves)]


def compare(
    operator: Callable[..., Any], plain: Callable[..., Any], inputs: tuple[Tensor, ...], floor: float = 1e-2
) -> None:
    """Against `plain` in float64 on the same rounded inputs.

    float32 within 1e-5 of the largest value (of `floor`, where all are small); half precision within twice the error
    of `plain` in that precision.
    """
    inputs = tuple(x.to(DEVICE) for x in inputs)
    exact = values_and_gradients(plain, tuple(x.double() for x in inputs))
    ours = values_and_gradients(operator, inputs)
    assert len(ours) == len(exact)
    for x, truth in zip(ours, exact, strict=True):
        assert x.shape == truth.shape
        assert x.isfinite().all() == truth.isfinite().all()
    if inputs[0].dtype == torch.float32:
        for i, (x, truth) in enumerate(zip(ours, exact, strict=True)):
            if x.numel():
                error = (x.double() - truth).abs().max() / truth.abs().max().clamp(min=floor if truth.ndim else 1.0)
                assert error <= 1e-5, (i, float(error))
        return
    theirs = values_and_gradients(plain, inputs)
    for i, (x, y, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        error, allowed = (x.double() - truth).norm(), 2 * (y.double() - truth).norm()
        assert error <= allowed + 1e-5 * truth.norm().clamp(min=0.2), (i, float(error), float(allowed))


def assert_float32_error(actual: Tensor, reference: Tensor) -> None:
    """At most 1e-5 of the largest reference value."""
    error = (actual.double() - reference).abs().max() / reference.abs().max().clamp(min=1e-30)
    assert error <= 1e-5, float(error)


def assert_refused(call: Callable[[], object], texts: list[str]) -> None:
    """With a ValueError whose message has all of the texts."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - every text is checked below
        call()
    for text in texts:
        assert text in str(error.value)


def plain_logprob(logits: Tensor, target: Tensor, temperature: float, entropy: bool) -> Any:
    logp = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    logprob = logp.gather(1, target[:, None])[:, 0]
    # p log p is 0 where p is 0; entr() has an infinite derivative there
    return (logprob, -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)) if entropy else logprob


def plain_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: float) -> Any:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return plain_logprob(logits, target, temperature, entropy=True)


def policy_inputs(seed: int, tokens: int, vocabulary: int, width: int) -> dict[str, Tensor]:
    hidden, weight = randn(seed, tokens, width), randn(seed + 1, vocabulary, width, scale=0.5)
    target = torch.randint(vocabulary, (tokens,), generator=rng(seed))
    logprob = (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None])[:, 0]
    share = torch.rand(tokens, generator=rng(seed + 4), dtype=torch.float64)
    share[::4] = 0
    advantage = randn(seed + 2, tokens)
    advantage[1::4] = 0
    return {
        "hidden_TD": hidden,
        "weight_VD": weight,
        "target_T": target.to(DEVICE),
        "advantage_T": advantage.to(DEVICE),
        "old_logprob_T": (logprob + randn(seed + 3, tokens, scale=0.4)).to(DEVICE),
        "weight_T": share.to(DEVICE),
        "ref_logprob_T": (logprob + randn(seed + 5, tokens, scale=0.4)).to(DEVICE),
    }
