"""Options that make no sense, every number out of its range among them, are refused by name, value and range."""

import inspect
from collections.abc import Callable
from math import inf, nan
from typing import Any

import pytest
import torch

import carft_kernels as ck

from .checks import assert_refused

X, W, T3, I3 = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3), torch.tensor([0, 1, 2])
POLICY: dict[str, Any] = {"advantage_T": T3, "old_logprob_T": T3, "weight_T": T3}


def linear(**options: Any) -> Callable[[], Any]:
    return lambda: ck.linear_policy_loss(X, W, I3, **POLICY, **options)


def direct(**options: Any) -> Callable[[], Any]:
    return lambda: ck.policy_loss(T3, T3, T3, weight_T=T3, **options)


BAD_CALLS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "dual clip": (linear(dual_clip=1.0), ["dual_clip = 1.0", "above 1"]),
    "dual clip of cispo": (direct(dual_clip=3.0, loss="cispo"), ["dual_clip = 3.0", "loss = 'clip'", "'cispo'"]),
    "loss": (direct(loss="gspo"), ["loss = 'gspo'", "'clip' and 'cispo'"]),
    "correction": (direct(correction_T=T3[:2]), ["correction_T", "(2,)", "(3,)"]),
    "correction's dtype": (linear(correction_T=I3), ["correction_T", "int64", "float32"]),
    "offsets": (direct(cu_seqlens=torch.tensor([0, 2])), ["cu_seqlens", "0 to 2", "0 to 3"]),
    "offsets' dtype": (direct(cu_seqlens=T3), ["cu_seqlens", "float32", "int64"]),
    "sequences of cispo": (direct(cu_seqlens=I3, loss="cispo"), ["cu_seqlens", "'clip'", "'cispo'"]),
    "sequences of cispo, from states": (linear(cu_seqlens=I3, loss="cispo"), ["cu_seqlens", "'clip'", "'cispo'"]),
    "offsets from states": (linear(cu_seqlens=torch.tensor([0, 2])), ["cu_seqlens", "0 to 2", "0 to 3"]),
    "offsets' dtype from states": (linear(cu_seqlens=T3), ["cu_seqlens", "float32", "int64"]),
    "estimate": (linear(kl_estimate="k1"), ["kl_estimate = 'k1'", "'k3' and 'k2'"]),
    "clamp": (linear(kl_clamp=0.0), ["kl_clamp = 0.0", "above 0"]),
    "z loss": (linear(z_loss_coef=-1.0), ["z_loss_coef = -1.0", "at least 0"]),
    "cap": (linear(logit_softcap=0.0), ["logit_softcap = 0.0", "above 0"]),
    "cap of logits": (lambda: ck.token_logprob(X, I3, logit_softcap=inf), ["logit_softcap = inf", "finite"]),
    "cap of states": (lambda: ck.linear_logprob(X, W, I3, logit_softcap=nan), ["logit_softcap = nan", "above 0"]),
    "entropy": (linear(entropy_coef=nan), ["entropy_coef = nan", "finite"]),
    "bias": (linear(bias=T3), ["bias", "(3,)", "(5,)"]),
    "bias' dtype": (linear(bias=torch.zeros(5).double()), ["bias", "float64", "float32"]),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_name_the_argument(case: str) -> None:
    assert_refused(*BAD_CALLS[case])


def infonce(**options: Any) -> Callable[[], Any]:
    return lambda: ck.masked_infonce(X, X, **options)


# inf where it is no bound or no limit is allowed
NOT_ALLOWED: dict[tuple[str, str], tuple[Callable[..., Callable[[], Any]], list[float]]] = {
    **{("linear_policy_loss", name): (linear, [nan, inf, -1.0]) for name in ("kl_coef", "z_loss_coef", "dual_clip")},
    **{("linear_policy_loss", name): (linear, [nan, inf, 0.0]) for name in ("temperature", "logit_softcap")},
    ("linear_policy_loss", "clip_low"): (linear, [nan, inf, -0.1]),
    ("linear_policy_loss", "clip_high"): (linear, [nan, -0.1]),
    ("linear_policy_loss", "kl_clamp"): (linear, [nan, -1.0]),
    ("linear_policy_loss", "entropy_coef"): (linear, [nan, inf, -inf]),
    ("linear_policy_loss", "top_p"): (linear, [nan, inf, 0.0]),
    ("policy_loss", "clip_low"): (direct, [nan, inf, -0.1]),
    ("policy_loss", "clip_high"): (direct, [nan, -0.1]),
    ("policy_loss", "dual_clip"): (direct, [nan, inf, -1.0]),
    **{
        ("linear_logprob", name): (lambda **o: lambda: ck.linear_logprob(X, W, I3, **o), [nan, inf, -1.0])
        for name in ("temperature", "logit_softcap", "top_p")
    },
    **{
        ("token_logprob", name): (lambda **o: lambda: ck.token_logprob(X, I3, **o), [nan, inf, -1.0])
        for name in ("temperature", "logit_softcap", "top_p")
    },
    ("value_loss", "clip"): (lambda **o: lambda: ck.value_loss(T3, T3, T3, weight_T=T3, **o), [nan, -1.0]),
    ("masked_infonce", "temperature"): (infonce, [nan, inf, 0.0]),
    ("masked_infonce", "positive_clamp"): (infonce, [nan, -inf, -1.0]),
    **{
        ("gae", name): (
            lambda **o: lambda: ck.gae(T3, T3, torch.tensor([0, 3]), **{"gamma": 1.0, "lam": 1.0} | o),
            [nan, inf, -1.0],
        )
        for name in ("gamma", "lam")
    },
    ("kl_shaped_reward", "kl_coef"): (
        lambda **o: lambda: ck.kl_shaped_reward(T3[:1], T3, T3, torch.tensor([0, 3]), **o),
        [nan, inf, -1.0],
    ),
    ("whiten", "eps"): (lambda **o: lambda: ck.whiten(T3, **o), [nan, inf, 0.0]),
}


def test_every_number_is_in_the_list() -> None:
    operators = [x for name in ck.__all__ if "reference" not in name and callable(x := getattr(ck, name))]
    floats = {
        (x.__name__, name)
        for x in operators
        for name, p in inspect.signature(x).parameters.items()
        if p.annotation in (float, float | None)
    }
    assert floats == set(NOT_ALLOWED)


@pytest.mark.parametrize("name", NOT_ALLOWED, ids=" ".join)
def test_numbers_that_make_no_sense_are_refused(name: tuple[str, str]) -> None:
    call, values = NOT_ALLOWED[name]
    for value in values:
        assert_refused(call(**{name[1]: value}), [f"{name[1]} = {value}: expected"])
