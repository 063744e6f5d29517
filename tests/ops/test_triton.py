"""The Triton kernels against float64 references: on a GPU where there is one, in Triton's interpreter elsewhere."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import carft_kernels as ck
from carft_kernels._runtime import INTERPRETED
from carft_kernels.gae import gae_reference, kl_shaped_reward_reference, whiten_reference
from carft_kernels.lcs import lcs_mask_reference
from carft_kernels.linear_logprob import linear_logprob_reference
from carft_kernels.masked_infonce import masked_infonce_reference
from carft_kernels.policy_loss import policy_loss_reference, value_loss_reference
from carft_kernels.value_pool import value_pool_reference

from .half_precision import ProductIn

DEVICE = os.environ.get("CARFT_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
EXAMPLES = int(os.environ.get("CARFT_TEST_EXAMPLES", "15"))
# no shrinking: interpreted examples take seconds
FEW = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF]
seeds = st.integers(0, 2**31)
Scalar = Callable[..., Tensor]

if INTERPRETED:
    from .interpreter import guarded, repair

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


def randn(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64) * scale


def randint(seed: int, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=rng(seed)).to(DEVICE)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)


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


# --- log-prob ---------------------------------------------------------------------------------------------------------


def plain_logprob(logits: Tensor, target: Tensor, temperature: float, entropy: bool) -> Any:
    logp = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    logprob = logp.gather(1, target[:, None])[:, 0]
    # p log p is 0 where p is 0; entr() has an infinite derivative there
    return (logprob, -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)) if entropy else logprob


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


def plain_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: float) -> Any:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return plain_logprob(logits, target, temperature, entropy=True)


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


# --- policy loss ------------------------------------------------------------------------------------------------------


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


# --- pooling ----------------------------------------------------------------------------------------------------------


@FEW
@given(
    seed=seeds,
    lengths=st.lists(st.integers(0, 20) | st.just(140), min_size=1, max_size=4),
    width=st.integers(1, 40) | st.just(515),
    share=st.sampled_from([0.0, 0.5, 1.0, None]),
    dtype=st.sampled_from(DTYPES),
)
def test_value_pool(seed: int, lengths: list[int], width: int, share: float | None, dtype: torch.dtype) -> None:
    tokens, cu = sum(lengths), offsets(lengths)
    mask = None if share is None else (torch.rand(tokens, generator=rng(seed)) < share).to(DEVICE)

    def plain(h: Tensor, v: Tensor) -> Tensor:
        y = torch.promote_types(h.dtype, torch.float32)
        return value_pool_reference(h.to(y), v.to(y), cu, mask_T=mask)[0] + 0 * (h.sum() + v.sum()).to(y)

    compare(
        lambda h, v: ck.value_pool(h, v, cu, mask_T=mask, impl="triton")[0],
        plain,
        (randn(seed, tokens, width).to(dtype), randn(seed + 1, tokens, scale=4).to(dtype)),
    )
    value = randn(seed + 1, tokens, scale=20).float().to(DEVICE)
    hidden = torch.zeros(tokens, 3, device=DEVICE)
    ours, theirs = (ck.value_pool(hidden, value, cu, mask_T=mask, impl=impl)[1] for impl in ("triton", "torch"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_value_pool_long_sequence_whose_first_tokens_do_not_count() -> None:
    tokens = 1300
    hidden, value = randn(0, tokens, 20).float(), randn(1, tokens, scale=3).float()
    value += torch.arange(tokens) / 100  # the maximum keeps rising
    mask = (torch.arange(tokens) >= 520).to(DEVICE)
    compare(
        lambda h, v: ck.value_pool(h, v, offsets([tokens]), mask_T=mask, impl="triton")[0],
        lambda h, v: value_pool_reference(h, v, offsets([tokens]), mask_T=mask)[0],
        (hidden, value),
    )


# --- InfoNCE ----------------------------------------------------------------------------------------------------------


@FEW
@given(
    seed=seeds,
    n=st.integers(1, 40),
    extra=st.integers(0, 40),
    width=st.integers(16, 40),
    temperature=st.sampled_from([0.01, 0.2, 5.0]),
    clamp=st.sampled_from([0.1, 0.9]),
    mask_kind=st.sampled_from(["none", "columns", "pairs"]),
    dtype=st.sampled_from(DTYPES),
)
@example(565657, 1, 31, 21, 5.0, 0.9, "none", torch.bfloat16)
@example(215729, 1, 17, 16, 0.01, 0.1, "none", torch.bfloat16)
def test_masked_infonce(
    seed: int, n: int, extra: int, width: int, temperature: float, clamp: float, mask_kind: str, dtype: torch.dtype
) -> None:
    m = n + extra
    positive = randint(seed, m, n)  # repeats are allowed
    rows = (torch.rand(n, generator=rng(seed + 2)) < 0.6).to(DEVICE)
    rows[0] = True
    mask = None
    if mask_kind == "columns":
        mask = (torch.rand(m, generator=rng(seed + 3)) < 0.5).to(DEVICE)
        mask[positive] = True
    elif mask_kind == "pairs":
        mask = (torch.rand(n, m, generator=rng(seed + 3)) < 0.5).to(DEVICE)
        mask[torch.arange(n), positive] = True
    options: dict[str, Any] = {
        "positive_N": positive,
        "row_mask_N": rows,
        "candidate_mask": mask,
        "temperature": temperature,
        "positive_clamp": clamp,
    }

    def plain(a: Tensor, c: Tensor) -> Tensor:
        y = torch.promote_types(a.dtype, torch.float32)
        if dtype != torch.bfloat16 or y == torch.float64:
            loss, row_loss = masked_infonce_reference(a.to(y), c.to(y), **options)
            return loss + row_loss.mean()
        a, c = a.float(), c.float()
        x = ProductIn.apply(a, c, dtype) / (a.norm(dim=1, keepdim=True) * c.norm(dim=1)) / temperature
        pull = x.gather(1, positive[:, None])[:, 0].clamp(max=clamp / temperature)
        row_loss = (x if mask is None else x.masked_fill(~mask, -torch.inf)).logsumexp(1) - pull
        return row_loss[rows].mean() + row_loss.mean()

    def operator(a: Tensor, c: Tensor) -> Tensor:
        loss, row_loss = ck.masked_infonce(a, c, **options, impl="triton")
        return loss + row_loss.mean()

    # of one candidate p is 1 but for a rounding of 6e-8, which the temperature divides
    candidates = m if mask is None else int(mask.sum(-1).max())
    floor = max(1e-2, 0.01 / temperature) if candidates == 1 else 1e-2
    compare(operator, plain, (randn(seed, n, width).to(dtype), randn(seed + 1, m, width).to(dtype)), floor)


@pytest.mark.parametrize("upstream", ["one", "wide", "loss scale", "tiny"])
def test_masked_infonce_in_float16_holds_what_is_small(upstream: str) -> None:
    """Row by row, to what float16 rounds: small probabilities, norms and gradients over many powers of ten."""
    n, m, width = 24, 1500, 32
    anchor, candidate = randn(0, n, width), randn(1, m, width)
    anchor *= 10 ** (3 * torch.rand(n, 1, generator=rng(2), dtype=torch.float64) - 2)
    candidate *= 10 ** (3 * torch.rand(m, 1, generator=rng(3), dtype=torch.float64) - 2)
    candidate[7] = 0
    wide = 10 ** (6 * torch.rand(n, generator=rng(4), dtype=torch.float64) - 4)
    wide[3] = 0
    factor = {"one": torch.ones(n), "wide": wide, "loss scale": torch.full((n,), 30.0), "tiny": wide * 1e-3}[upstream]
    results = []
    for dtype, function in (
        (torch.float16, partial(ck.masked_infonce, impl="triton")),
        (torch.float64, ck.masked_infonce),
    ):
        leaves = [x.half().to(dtype).to(DEVICE).requires_grad_() for x in (anchor, candidate)]
        row_loss = function(*leaves, temperature=0.05)[1]
        results.append(torch.autograd.grad((row_loss * factor.to(row_loss)).sum(), leaves))
    for ours, truth in zip(*results, strict=True):
        truth = truth.clamp(-65_504, 65_504)
        error = (ours.double().clamp(-65_504, 65_504) - truth).norm(dim=1)
        assert (error <= 2**-10 * truth.norm(dim=1) + 2**-25 * width**0.5).all()


@pytest.mark.parametrize("pairs", [False, True])
def test_masked_infonce_with_whole_tiles_left_out(pairs: bool) -> None:
    mask = torch.arange(140, device=DEVICE) >= 70
    positive = randint(3, 70, 50) + 70
    options: dict[str, Any] = {"positive_N": positive, "candidate_mask": mask.expand(50, 140) if pairs else mask}
    compare(
        lambda a, c: ck.masked_infonce(a, c, **options, impl="triton")[0],
        lambda a, c: masked_infonce_reference(a, c, **options)[0],
        (randn(0, 50, 16).float(), randn(1, 140, 16).float()),
    )


def test_masked_infonce_rows_that_do_not_count() -> None:
    anchor, candidate = (randn(i, 6, 20).float().to(DEVICE).requires_grad_() for i in (0, 1))
    mask = torch.ones(6, 6, dtype=torch.bool, device=DEVICE)
    mask[4] = False  # no candidate at all
    rows = torch.tensor([True, False, True, True, False, True], device=DEVICE)
    loss, row_loss = ck.masked_infonce(anchor, candidate, row_mask_N=rows, candidate_mask=mask, impl="triton")
    assert row_loss[4] == 0
    torch.testing.assert_close(loss, row_loss[rows].mean())
    gradients = torch.autograd.grad(loss, (anchor, candidate))
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][[1, 4]].any()
    none = torch.zeros(6, dtype=torch.bool, device=DEVICE)
    loss, _ = ck.masked_infonce(anchor, candidate, row_mask_N=none, impl="triton")
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, (anchor, candidate)))


# --- advantages and LCS -----------------------------------------------------------------------------------------------


@FEW
@given(
    seed=seeds,
    lengths=st.lists(st.integers(0, 12) | st.sampled_from([512, 1100]), min_size=1, max_size=5),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_rewards_and_advantages(seed: int, lengths: list[int], gamma: float, lam: float, dtype: torch.dtype) -> None:
    tokens, cu = sum(lengths), offsets(lengths)
    score, old, ref = (randn(seed + i, n).to(dtype).to(DEVICE) for i, n in enumerate((len(lengths), tokens, tokens)))
    reward = ck.kl_shaped_reward(score, old, ref, cu, kl_coef=0.3, impl="triton")
    expected = kl_shaped_reward_reference(score.double(), old.double(), ref.double(), cu, kl_coef=0.3)
    torch.testing.assert_close(reward.double(), expected, rtol=1e-5, atol=1e-6)
    results = ck.gae(reward, old, cu, gamma=gamma, lam=lam, impl="triton")
    for ours, theirs in zip(
        results, gae_reference(reward.double(), old.double(), cu, gamma=gamma, lam=lam), strict=True
    ):
        assert ours.dtype == torch.float32
        assert tokens == 0 or (ours.double() - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)


@FEW
@given(
    seed=seeds,
    tokens=st.integers(2, 60) | st.sampled_from([2048, 4500]),
    masked=st.booleans(),
    eps=st.sampled_from([1e-8, 0.5, 40.0]),
)
def test_whiten(seed: int, tokens: int, masked: bool, eps: float) -> None:
    x = randn(seed, tokens, scale=4).float().to(DEVICE) + 3
    mask = torch.arange(tokens, device=DEVICE) % 3 < 2 if masked else None
    ours = ck.whiten(x, mask, eps=eps, impl="triton")
    torch.testing.assert_close(ours.double(), whiten_reference(x.double(), mask, eps=eps), rtol=1e-5, atol=1e-5)
    few = torch.full((4,), 2.0, device=DEVICE)
    assert not ck.whiten(few, impl="triton").any()
    assert not ck.whiten(x[:0], impl="triton").any()


@FEW
@given(
    seed=seeds,
    letters=st.sampled_from([1, 2, 5, 300]),
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 100)), min_size=1, max_size=4),
)
def test_lcs_mask(seed: int, letters: int, lengths: list[tuple[int, int]]) -> None:
    a_lengths, b_lengths = ([pair[side] for pair in lengths] for side in (0, 1))
    a, b = randint(seed, letters, sum(a_lengths)), randint(seed + 1, letters, sum(b_lengths))
    arguments = (a, offsets(a_lengths), b, offsets(b_lengths))
    for ours, expected in zip(ck.lcs_mask(*arguments, impl="triton"), lcs_mask_reference(*arguments), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("columns", [31, 32, 33, 64, 1025, 1100])
def test_lcs_mask_across_words(columns: int) -> None:
    """Carries that run through whole words and stop at their edges: one letter, two, blocks, equal, nothing equal."""
    same, period = torch.zeros(columns, dtype=torch.int64), torch.arange(columns) % 2
    blocks = torch.arange(columns) // 32 % 2
    rows = [
        same[:5],
        period[:9],
        blocks[:70],
        torch.tensor([1] * 4 + [0] * 4),
        torch.arange(columns)[-40:],
        same[:3] + 7,
    ]
    others = [same, same, blocks, 1 - blocks, torch.arange(columns), period]
    far = torch.arange(columns) % 33 == 32  # matches one above each word's edge
    rows, others = [*rows, same[:6] + 1], [*others, far.long()]
    arguments = (torch.cat(rows), offsets([*map(len, rows)]), torch.cat(others), offsets([*map(len, others)]))
    a, a_cu, b, b_cu = (x.to(DEVICE) for x in arguments)
    with guarded() if INTERPRETED else nullcontext():
        found = ck.lcs_mask(a, a_cu, b, b_cu, impl="triton")
    for ours, expected in zip(found, lcs_mask_reference(a, a_cu, b, b_cu), strict=True):
        assert torch.equal(ours, expected)


# --- offsets that are wrong -------------------------------------------------------------------------------------------

WRONG_OFFSETS = {
    "one falls": [0, 5, 3, 9],
    "negative": [0, -4, 9],
    "the first is negative": [-3, 4, 9],
    "far below": [-(1 << 30), 4, 9],
    "past the end": [0, 12, 9],
    "far past the end": [0, 1 << 30, 9],
    "the last is past the end": [0, 4, 12],
    "the first is not 0": [2, 4, 9],
    "the last is not T": [0, 4, 7],
    "reversed": [9, 4, 0],
    "all past the end": [20, 30, 40],
    "one sequence of more": [-1, 10],
    "past a whole block of them": [0] * 150 + [5, 4, 9],
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", WRONG_OFFSETS)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.usefixtures("unchecked")
def test_wrong_offsets_are_nan_and_never_an_access_outside(impl: Any, kind: str, dtype: torch.dtype) -> None:
    """Where nothing checks them. `make kernels-sanitize` watches compiled kernels, `guarded` interpreted ones."""
    cu = torch.tensor(WRONG_OFFSETS[kind], dtype=dtype, device=DEVICE)
    sequences = len(cu) - 1
    a, b = (randn(i, 9).float().to(DEVICE) for i in (0, 1))
    score = randn(2, sequences).float().to(DEVICE)
    mask = torch.arange(9, device=DEVICE) % 3 > 0
    hidden, value = (randn(*x).float().to(DEVICE).requires_grad_() for x in ((3, 9, 5), (4, 9)))
    with guarded() if INTERPRETED else nullcontext():
        found = [*ck.gae(a, b, cu, gamma=0.9, lam=0.9, impl=impl)]
        found += [ck.kl_shaped_reward(score, a, b, cu, kl_coef=0.1, impl=impl)]
        pooled, weight = ck.value_pool(hidden, value, cu, mask_T=mask, impl=impl)
        found += [weight, *torch.autograd.grad(pooled.sum(), (hidden, value))]
    for x in found:
        assert x.isnan().all()
    assert pooled.isnan().any()
    assert (pooled.isnan() | (pooled == 0)).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_wrong_offsets_are_errors_where_they_are_checked(impl: Any) -> None:
    x, hidden = torch.zeros(9, device=DEVICE), torch.zeros(9, 5, device=DEVICE)
    tokens, right = torch.zeros(9, dtype=torch.int64, device=DEVICE), offsets([4, 0, 5])
    for wrong, text in (
        ([0, 5, 3, 9], r"\[2\] = 3 comes after 5"),
        ([0, 4, -4, 9], r"\[2\] = -4 comes after 4"),
        ([0, 4, 12, 9], r"\[3\] = 9 comes after 12"),
        ([-1, 2, 3, 9], r" goes from -1 to 9: expected 0 to 9"),
        ([0, 2, 3, 12], r" goes from 0 to 12: expected 0 to 9"),
    ):
        cu = torch.tensor(wrong, device=DEVICE)
        for call in (
            lambda cu: ck.gae(x, x, cu, gamma=1.0, lam=1.0, impl=impl),
            lambda cu: ck.kl_shaped_reward(x[:3], x, x, cu, kl_coef=0.1, impl=impl),
            lambda cu: ck.value_pool(hidden, x, cu, impl=impl),
        ):
            with pytest.raises(ValueError, match="cu_seqlens" + text):
                call(cu)
        with pytest.raises(ValueError, match="a_cu" + text):
            ck.lcs_mask(tokens, cu, tokens, right, impl=impl)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.usefixtures("unchecked")
def test_lcs_mask_checks_its_offsets_in_any_case(impl: Any) -> None:
    """The host needs them anyhow, and takes its own as well as the device's."""
    tokens, right = randint(0, 3, 9), torch.tensor([0, 4, 4, 9])
    for wrong in ([0, 5, 3, 9], [0, 4, 12, 9]):
        for device in ("cpu", DEVICE):
            with pytest.raises(ValueError, match=r"b_cu.* comes after"):
                ck.lcs_mask(tokens, right, tokens, torch.tensor(wrong, device=device), impl=impl)
    arguments = tokens, right, tokens.flip(0), right
    expected = lcs_mask_reference(*arguments)
    for cu in (right, right.int(), right.to(DEVICE)):
        with guarded() if INTERPRETED else nullcontext():
            found = ck.lcs_mask(arguments[0], cu, arguments[2], cu, impl=impl)
        assert all(map(torch.equal, found, expected))


def test_lcs_mask_in_several_groups_of_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scratch holds some pairs' tables at a time; a pair that is larger than it is alone."""
    monkeypatch.setattr("carft_kernels.lcs._TABLE_BYTES", 120)
    a_lengths, b_lengths = [10, 3, 0, 20, 5, 7, 2], [10, 9, 4, 20, 6, 0, 2]
    arguments = (randint(0, 4, sum(a_lengths)), offsets(a_lengths), randint(1, 4, sum(b_lengths)), offsets(b_lengths))
    with guarded() if INTERPRETED else nullcontext():
        found = ck.lcs_mask(*arguments, impl="triton")
    assert all(map(torch.equal, found, lcs_mask_reference(*arguments)))
