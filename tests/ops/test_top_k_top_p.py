"""Top-k and top-p of the log-prob operators and the policy loss: against plain Python, references and differences."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import carft_kernels as ck
from carft_kernels import _head, _row_kernels
from carft_kernels._policy_kernels import TokenTerms, policy_terms_reference
from carft_kernels.linear_logprob import linear_logprob_reference
from carft_kernels.linear_policy_loss import linear_policy_loss_reference
from carft_kernels.token_logprob import token_logprob_reference

from .checks import DEVICE, DTYPES, FAST, FEW, assert_refused, compare, gradients, policy_inputs, randint, randn, seeds

Impl = Literal["torch", "triton"]
IMPLEMENTATIONS: list[Impl] = ["torch", "triton"]
top_ks, top_ps = (
    st.sampled_from([0, 1, 3, 12, 1000]),
    st.sampled_from([1.0, 0.91, 0.53, 0.012]),
)  # no share of equal tokens


def kept_columns(logits: list[float], target: int, top_k: int, top_p: float) -> list[int]:
    """The k most likely, of these the most likely until their mass is there; what is as likely as the last; the target.

    So rollouts are sampled, too (carft_fast/rollout/coupled.py).
    """
    best = sorted(logits, reverse=True)[: top_k or None]
    share = [math.exp(x - best[0]) for x in best]
    kept = [x for i, x in enumerate(best) if top_p == 1 or sum(share[:i]) < top_p * sum(share)]
    return [v for v, x in enumerate(logits) if x >= kept[-1] or v == target]


def plain(
    logits: Tensor, target: Tensor, top_k: int, top_p: float, softcap: float | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and log-sum-exp by torch, row by row, over the kept columns alone."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    x = (x if softcap is None else softcap * (x / softcap).tanh()) / temperature
    outputs = []
    for row, wanted in zip(x, target.tolist(), strict=True):
        columns = kept_columns(row.tolist(), wanted, top_k, top_p)
        logp = row[columns].log_softmax(-1)
        outputs.append((logp[columns.index(wanted)], -(logp.exp() * logp).sum(), row[columns].logsumexp(-1)))
    return tuple(torch.stack(column) for column in zip(*outputs, strict=True))


def plain_policy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, inputs: dict[str, Tensor], terms: TokenTerms, **options: Any
) -> tuple[Tensor, Tensor]:
    z_loss_coef = options.pop("z_loss_coef")
    logprob, entropy, lse = plain(torch.nn.functional.linear(hidden, weight, bias), inputs["target_T"].cpu(), **options)
    old, advantage, share, ref = (
        inputs[name].to(logprob) for name in ("old_logprob_T", "advantage_T", "weight_T", "ref_logprob_T")
    )
    loss = policy_terms_reference(logprob, old, advantage, terms, ref_logprob_T=ref)
    loss = loss - terms.entropy_coef * entropy + z_loss_coef * lse.square()
    return (share * loss).sum(), logprob.detach()


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("top_k", "top_p", "logits", "target", "kept"),
    [
        (2, 1.0, [0.0, 3.0, 1.0, 2.0], 1, [1, 3]),
        (2, 1.0, [0.0, 3.0, 2.0, 2.0], 2, [1, 2, 3]),  # as likely as the second
        (1, 1.0, [0.0, 3.0, 2.0, 2.0], 0, [0, 1]),  # the target stays
        (9, 1.0, [0.0, 3.0, 2.0, 2.0], 0, [0, 1, 2, 3]),
        (0, 0.5, [1.0] * 4, 2, [0, 1, 2, 3]),  # as likely as the second, which has the mass
        (0, 0.6, [0.0, 2.0, 1.0, 1.0], 1, [1, 2, 3]),  # 7.389 of 13.825 is less
        (0, 0.5, [0.0, 2.0, 1.0, 1.0], 0, [0, 1]),
        (0, 1e-6, [0.0, 3.0, 2.0, 2.0], 1, [1]),  # never none
        (3, 0.6, [0.0, 2.0, 1.0, 1.0, 1.0], 1, [1, 2, 3, 4]),  # 7.389 of the best three's 12.825 is less
        (3, 0.55, [0.0, 2.0, 1.0, 1.0, 1.0], 1, [1]),
        (1, 0.5, [0.0, 2.0, 1.0, 1.0, 1.0], 1, [1]),  # behind top-k that is all
        (0, 0.9, [-math.inf, 2.0, -math.inf, 2.0], 1, [1, 3]),
        (3, 0.9, [-math.inf, 2.0, -math.inf, 2.0], 1, [1, 3]),
    ],
)
def test_kept_tokens_worked_out_by_hand(
    impl: Impl, top_k: int, top_p: float, logits: list[float], target: int, kept: list[int]
) -> None:
    assert [v for v in kept_columns(logits, target, top_k, top_p) if logits[v] > -math.inf] == kept
    x = torch.tensor([logits], device=DEVICE, requires_grad=True)
    exp = {v: math.exp(logits[v]) for v in kept}
    total = sum(exp.values())
    logprob, entropy, lse = ck.token_logprob(
        x * 1,
        torch.tensor([target], device=DEVICE),
        with_entropy=True,
        with_lse=True,
        top_k=top_k,
        top_p=top_p,
        impl=impl,
    )
    assert entropy is not None
    assert logprob.item() == pytest.approx(logits[target] - math.log(total), abs=1e-6)
    assert entropy.item() == pytest.approx(-sum(e / total * math.log(e / total) for e in exp.values()), abs=1e-6)
    assert lse.item() == pytest.approx(math.log(total), abs=1e-6)
    (found,) = torch.autograd.grad(logprob, x)
    slopes = [(v == target) - exp.get(v, 0.0) / total for v in range(len(logits))]
    assert found[0].tolist() == pytest.approx(slopes, abs=1e-6)


# --- against the oracle -----------------------------------------------------------------------------------------------


@FAST
@given(
    seed=seeds,
    tokens=st.integers(1, 12),
    vocabulary=st.integers(1, 40),
    top_k=top_ks,
    top_p=top_ps,
    softcap=st.sampled_from([None, 1.5]),
    whole=st.booleans(),
)
def test_logprobs(
    seed: int, tokens: int, vocabulary: int, top_k: int, top_p: float, softcap: float | None, whole: bool
) -> None:
    """In float64, references too; `whole`: logits of few values, so that many tokens are equally likely."""
    target = randint(seed, vocabulary, tokens).cpu()
    options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "logit_softcap": softcap, "temperature": 0.7}
    inputs = [randn(seed + 1, tokens, 5), randn(seed + 2, vocabulary, 5), randn(seed + 3, vocabulary)]
    if whole:
        inputs = [x.round() for x in inputs]

    def oracle(x: Tensor) -> tuple[Tensor, ...]:
        return plain(x, target, top_k, top_p, softcap, 0.7)

    def linear(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return oracle(torch.nn.functional.linear(h, w, b))

    logits = torch.nn.functional.linear(*inputs)
    more: dict[str, Any] = {"with_entropy": True, "with_lse": True, "impl": "torch"}
    calls: list[tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]] = [
        (lambda x: ck.token_logprob(x, target, **options, **more), oracle, [logits]),
        (lambda x: token_logprob_reference(x, target, with_entropy=True, **options), oracle, [logits]),
        (lambda h, w, b: ck.linear_logprob(h, w, target, bias=b, **options, **more), linear, inputs),
        (
            lambda h, w, b: linear_logprob_reference(h, w, target, bias=b, with_entropy=True, **options),
            linear,
            inputs,
        ),
    ]
    up = randn(seed + 4, 3, tokens)
    for function, expected, leaves in calls:
        for ours, theirs in zip(function(*leaves), expected(*leaves), strict=False):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        outputs = len(function(*leaves))

        def combined(f: Callable[..., Any], *x: Tensor, outputs: int = outputs) -> Tensor:
            return torch.stack([(a * b).sum() for a, b in zip(f(*x)[:outputs], up, strict=False)]).sum()

        pair = [gradients(functools.partial(combined, f), *leaves) for f in (function, expected)]
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-11)


TERMS: dict[str, dict[str, Any]] = {
    "clip": {},
    "entropy and KL": {"entropy_coef": 0.1, "kl_coef": 0.2},
    "z loss": {"z_loss_coef": 0.03, "entropy_coef": 0.1},
}


@FAST
@given(
    seed=seeds,
    tokens=st.integers(1, 12),
    vocabulary=st.integers(2, 40),
    top_k=top_ks,
    top_p=top_ps,
    softcap=st.sampled_from([None, 1.5]),
    terms=st.sampled_from(list(TERMS)),
    skip_dead=st.booleans(),
)
def test_linear_policy_loss(
    seed: int,
    tokens: int,
    vocabulary: int,
    top_k: int,
    top_p: float,
    softcap: float | None,
    terms: str,
    skip_dead: bool,
) -> None:
    inputs = {name: x.cpu() for name, x in policy_inputs(seed, tokens, vocabulary, 6).items()}
    leaves = (inputs.pop("hidden_TD"), inputs.pop("weight_VD"), randn(seed + 9, vocabulary))
    cut = {"top_k": top_k, "top_p": top_p}
    options = TERMS[terms] | cut | {"logit_softcap": softcap, "temperature": 0.8}
    kinds = {k: v for k, v in TERMS[terms].items() if k != "z_loss_coef"}

    def oracle(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        more: dict[str, Any] = {"z_loss_coef": TERMS[terms].get("z_loss_coef", 0.0), "softcap": softcap, **cut}
        return plain_policy(h, w, b, inputs, TokenTerms(**kinds), temperature=0.8, **more)

    def operator(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        extra: dict[str, Any] = {"chunk_tokens": 5, "skip_dead": skip_dead, "impl": "torch"}
        return ck.linear_policy_loss(h, w, bias=b, **inputs, **options, **extra)[:2]

    def reference(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return linear_policy_loss_reference(h, w, bias=b, **inputs, **options)

    exact, exact_gradients = oracle(*leaves), gradients(lambda *x: oracle(*x)[0], *leaves)
    for function in (operator, reference):
        for ours, theirs in zip(function(*leaves), exact, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        found = gradients(lambda *x, f=function: f(*x)[0], *leaves)
        torch.testing.assert_close(found, exact_gradients, rtol=1e-9, atol=1e-11)


@FEW
@given(
    seed=seeds,
    tokens=st.integers(6, 9),
    vocabulary=st.integers(2, 60),
    top_k=top_ks,
    top_p=top_ps,
    softcap=st.sampled_from([None, 2.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_by_triton(
    seed: int, tokens: int, vocabulary: int, top_k: int, top_p: float, softcap: float | None, dtype: torch.dtype
) -> None:
    target = randint(seed, vocabulary, tokens)
    cut = {"top_k": top_k, "top_p": top_p}
    options: dict[str, Any] = {**cut, "logit_softcap": softcap, "temperature": 0.7, "impl": "triton"}
    head = tuple(
        x.to(dtype) for x in (randn(seed + 1, tokens, 16), randn(seed + 2, vocabulary, 16), randn(seed + 3, vocabulary))
    )

    def oracle(x: Tensor) -> tuple[Tensor, ...]:
        return plain(x, target, top_k, top_p, softcap, 0.7)

    compare(
        lambda x: ck.token_logprob(x * 1, target, with_entropy=True, with_lse=True, **options),
        oracle,
        (randn(seed, tokens, vocabulary, scale=3).to(dtype),),
    )
    compare(
        lambda h, w, b: ck.linear_logprob(h, w, target, bias=b, with_entropy=True, with_lse=True, **options),
        lambda h, w, b: oracle(torch.nn.functional.linear(h, w, b)),
        head,
    )
    inputs = policy_inputs(seed, tokens, vocabulary, 16)
    del inputs["hidden_TD"], inputs["weight_VD"]
    own = oracle(torch.nn.functional.linear(*(x.double() for x in head)))[0].to(DEVICE)
    for name in ("old_logprob_T", "ref_logprob_T"):  # ratios near 1: no token outweighs all others
        inputs[name] = own + randn(seed + len(name), tokens, scale=0.3).to(DEVICE)
    rest = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    terms = TokenTerms(kl_coef=0.2, entropy_coef=0.1)
    more: dict[str, Any] = {"kl_coef": 0.2, "entropy_coef": 0.1, "z_loss_coef": 0.03, "chunk_tokens": 4}
    compare(
        lambda h, w, b: ck.linear_policy_loss(h, w, bias=b, **rest, **options, **more)[:2],
        lambda h, w, b: plain_policy(h, w, b, rest, terms, z_loss_coef=0.03, softcap=softcap, temperature=0.7, **cut),
        head,
    )


def calls(impl: Impl, **options: Any) -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    """Each operator on nine tokens, one ignored with NaN for its numbers; the policy loss with all its terms."""
    target, ones = randint(0, 30, 9), torch.ones(9, device=DEVICE)
    target[4] = -100
    hidden, weight = randn(1, 9, 8).float().to(DEVICE), randn(2, 30, 8).float().to(DEVICE)
    logits = hidden @ weight.T
    logits[4], hidden[4] = math.nan, math.nan
    policy: dict[str, Any] = {"advantage_T": ones, "old_logprob_T": None, "weight_T": ones, "ref_logprob_T": -ones}
    more: dict[str, Any] = {"kl_coef": 0.1, "entropy_coef": 0.1, "z_loss_coef": 0.1}
    both: dict[str, Any] = {"with_entropy": True, "with_lse": True, "impl": impl}
    return {
        "token_logprob": (lambda x: ck.token_logprob(x * 1, target, **both, **options), (logits,)),
        "in place": (
            lambda x: ck.token_logprob(x * 1, target, inplace_backward=True, **both, **options),
            (logits,),
        ),
        "linear_logprob": (lambda h, w: ck.linear_logprob(h, w, target, **both, **options), (hidden, weight)),
        "linear_policy_loss": (
            lambda h, w: ck.linear_policy_loss(h, w, target, **policy, **more, **options, impl=impl)[:2],
            (hidden, weight),
        ),
    }


def values_and_gradients(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    total = torch.stack([x.sum() for x in outputs if x.requires_grad]).sum()
    return [*(x.detach() for x in outputs), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_pieces_and_chunks_change_nothing_and_an_ignored_token_has_no_part(
    impl: Impl, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {name: values_and_gradients(*call) for name, call in calls(impl, top_k=9, top_p=0.8).items()}
    monkeypatch.setattr(_row_kernels, "_SORTED_LOGITS", 70)  # two rows of 30
    for module in (_row_kernels, _head):
        monkeypatch.setattr(module, "chunk_size", lambda *_: 5)
    for name, call in calls(impl, top_k=9, top_p=0.8).items():
        for ours, whole in zip(values_and_gradients(*call), found[name], strict=True):
            assert ours.isfinite().all(), name
            torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-6)
            if ours.ndim and len(ours) == 9:
                assert not ours[4].any()
    torch.testing.assert_close(found["in place"], found["token_logprob"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["token_logprob", "linear_logprob", "linear_policy_loss"])
def test_what_keeps_every_token_gives_the_numbers_without_it(name: str, impl: Impl) -> None:
    """With Triton a cut has its statistics from the rows, and the LM head without one has them from the product."""
    without = values_and_gradients(*calls(impl)[name])
    tolerance = 0.0 if name == "token_logprob" or impl == "torch" else 1e-5
    for top_k in (30, 31):
        for ours, theirs in zip(values_and_gradients(*calls(impl, top_k=top_k)[name]), without, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["linear_logprob", "linear_policy_loss"])
def test_no_more_than_a_chunk_of_logits(
    name: str, impl: Impl, largest_tensor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, vocabulary, chunk = 80, 1001, 8
    hidden, weight = (randn(i, n, 16).bfloat16().to(DEVICE).requires_grad_() for i, n in ((0, tokens), (1, vocabulary)))
    target, ones = randint(2, vocabulary, tokens), torch.ones(tokens, device=DEVICE)
    monkeypatch.setattr(_head, "chunk_size", lambda *_: chunk)
    options: dict[str, Any] = {"top_k": 50, "top_p": 0.9, "impl": impl}
    with largest_tensor:
        if name == "linear_logprob":
            ck.linear_logprob(hidden, weight, target, **options)[0].sum().backward()
        else:
            policy: dict[str, Any] = {"advantage_T": ones, "old_logprob_T": None, "weight_T": ones}
            ck.linear_policy_loss(hidden, weight, target, **policy, **options)[0].backward()
    # the interpreter copies a scratch by its bytes: four an element
    assert largest_tensor.numel <= 4 * max(chunk, 16) * (vocabulary + 16) < tokens * vocabulary


# --- finite differences, bad input ------------------------------------------------------------------------------------


def test_gradcheck() -> None:
    target, hidden, weight, bias = torch.tensor([1, 0, 4, 2, 8, -100]), randn(1, 6, 5), randn(2, 9, 5), randn(3, 9)
    leaves = tuple(x.requires_grad_() for x in (hidden, weight, bias))
    options: dict[str, Any] = {"top_k": 5, "top_p": 0.8, "logit_softcap": 2.0, "temperature": 0.7}
    both: dict[str, Any] = {"with_entropy": True, "with_lse": True}
    check = torch.autograd.gradcheck
    assert check(lambda x: ck.token_logprob(x, target, **both, **options), randn(4, 6, 9).requires_grad_())
    assert check(lambda h, w, b: ck.linear_logprob(h, w, target, bias=b, **both, **options), leaves)
    vectors = {name: randn(i, 6) - 1.5 for i, name in enumerate(("advantage_T", "weight_T", "ref_logprob_T"))}
    vectors["old_logprob_T"] = ck.linear_logprob(hidden, weight, target, bias=bias, **options)[0].detach() - 0.1
    terms: dict[str, Any] = {"kl_coef": 0.2, "entropy_coef": 0.1, "z_loss_coef": 0.1, "chunk_tokens": 4}
    assert check(lambda h, w, b: ck.linear_policy_loss(h, w, target, bias=b, **vectors, **terms, **options)[0], leaves)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"top_k": -1}, ["top_k = -1", "at least 0", "0 keeps every token"]),
        ({"top_k": 2.0}, ["top_k = 2.0", "integer"]),
        ({"top_p": 0.0}, ["top_p = 0.0", "above 0", "1 keeps every token"]),
        ({"top_p": 1.1}, ["top_p = 1.1", "at most 1"]),
        ({"top_p": math.nan}, ["top_p = nan", "at most 1"]),
    ],
)
def test_bad_calls_name_the_argument(options: dict[str, Any], texts: list[str]) -> None:
    for name in ("token_logprob", "linear_logprob", "linear_policy_loss"):
        function, inputs = calls("torch", **options)[name]
        assert_refused(lambda f=function, x=inputs: f(*x), texts)
