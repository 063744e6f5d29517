"""Bad input is refused with a message that names the argument, what it is and what is allowed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import carft_kernels as ck
from carft_kernels import _runtime

from .checks import assert_refused

X, W, T3 = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3)
I3 = torch.tensor([0, 1, 2])
C3 = torch.tensor([0, 3])
POLICY: dict[str, Any] = {"advantage_T": T3, "old_logprob_T": T3, "weight_T": T3}
BAD_CALLS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "dimensions": (lambda: ck.token_logprob(T3, I3), ["logits_TV", "(3,)", "2 dimensions"]),
    "dtype": (lambda: ck.token_logprob(X.long(), I3), ["logits_TV", "int64", "float32"]),
    "length": (lambda: ck.token_logprob(X, I3[:2]), ["target_T", "(2,)", "(3,)"]),
    "target dtype": (lambda: ck.token_logprob(X, T3), ["target_T", "float32", "int64"]),
    "target range": (lambda: ck.token_logprob(X, torch.tensor([0, 1, 4])), ["target_T", "holds 4", "[0, 4)"]),
    "negative target": (lambda: ck.linear_logprob(X, W, torch.tensor([0, -1, 4])), ["target_T", "-1", "[0, 5)"]),
    "temperature": (lambda: ck.token_logprob(X, I3, temperature=0.0), ["temperature = 0.0", "above 0"]),
    "width": (lambda: ck.linear_logprob(X, W[:, :3], I3), ["weight_VD", "(5, 3)", "(5, 4)"]),
    "mixed dtypes": (lambda: ck.linear_logprob(X, W.double(), I3), ["weight_VD", "float64", "float32"]),
    "bias": (lambda: ck.linear_logprob(X, W, I3, bias=T3), ["bias", "(3,)", "(5,)"]),
    "device": (lambda: ck.linear_logprob(X, W.to("meta"), I3), ["weight_VD", "meta", "cpu"]),
    "kl without reference": (
        lambda: ck.linear_policy_loss(X, W, I3, **POLICY, kl_coef=0.1),
        ["kl_coef = 0.1", "ref_logprob_T"],
    ),
    "clip": (lambda: ck.linear_policy_loss(X, W, I3, **POLICY, clip_low=1.5), ["clip_low = 1.5", "[0, 1]"]),
    "chunk": (lambda: ck.linear_policy_loss(X, W, I3, **POLICY, chunk_tokens=0), ["chunk_tokens = 0"]),
    "offsets end": (lambda: ck.value_pool(X, T3, torch.tensor([0, 2])), ["cu_seqlens", "0 to 2", "0 to 3"]),
    "offsets fall": (lambda: ck.value_pool(X, T3, torch.tensor([0, 2, 1, 3])), ["cu_seqlens", "must not fall"]),
    "no sequence": (lambda: ck.gae(T3, T3, C3[:1], gamma=1.0, lam=1.0), ["cu_seqlens", "(1,)", "3 tokens"]),
    "negative offset": (
        lambda: ck.kl_shaped_reward(T3[:2], T3, T3, torch.tensor([0, -2, 3]), kl_coef=1.0),
        ["cu_seqlens[1] = -2", "after 0"],
    ),
    "offset past the end": (
        lambda: ck.gae(T3, T3, torch.tensor([0, 7, 3]), gamma=1.0, lam=1.0),
        ["cu_seqlens[2] = 3", "after 7"],
    ),
    "mask dtype": (lambda: ck.value_pool(X, T3, torch.tensor([0, 3]), mask_T=T3), ["mask_T", "float32", "bool"]),
    "too few candidates": (lambda: ck.masked_infonce(X, X[:2]), ["positive_N", "3 anchors", "2 candidates"]),
    "positive range": (lambda: ck.masked_infonce(X, X, positive_N=I3 + 1), ["positive_N", "holds 3", "[0, 3)"]),
    "positive masked out": (
        lambda: ck.masked_infonce(X, X, candidate_mask=torch.tensor([True, False, True])),
        ["candidate_mask", "candidate 1", "row 1"],
    ),
    "gamma": (lambda: ck.gae(T3, T3, torch.tensor([0, 3]), gamma=1.5, lam=1.0), ["gamma = 1.5", "[0, 1]"]),
    "kl_coef": (lambda: ck.kl_shaped_reward(T3[:1], T3, T3, torch.tensor([0, 3]), kl_coef=-1.0), ["kl_coef = -1.0"]),
    "value clip": (lambda: ck.value_loss(T3, T3, T3, weight_T=T3, clip=0.0), ["clip = 0.0"]),
    "eps": (lambda: ck.whiten(T3, eps=0.0), ["eps = 0.0", "above 0"]),
    "implementation": (lambda: ck.whiten(T3, impl="cuda"), ["impl = 'cuda'", "whiten", "'torch'"]),
    "other dtype": (lambda: ck.lcs_mask(I3, C3, I3.int(), C3), ["b is torch.int32", "torch.int64"]),
    "other count": (lambda: ck.lcs_mask(I3, C3, I3, torch.tensor([0, 1, 3])), ["b_cu", "(3,)", "(2,)"]),
    "offsets of the other side": (lambda: ck.lcs_mask(I3, C3, I3, C3 + 1), ["b_cu", "1 to 4", "0 to 3"]),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_name_the_argument(case: str) -> None:
    assert_refused(*BAD_CALLS[case])


def test_index_checks_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runtime, "_index_checks", None)  # given back at the end
    ck.set_index_checks(False)
    ck.whiten(T3)
    assert ck.value_pool(X, T3, torch.tensor([0, 2, 1, 3]))[1].isnan().all()
    assert ck.gae(T3, T3, torch.tensor([0, 3]), gamma=1.0, lam=1.0)[0].tolist() == [0, 0, 0]
    ck.set_index_checks(None)
    with pytest.raises(ValueError, match="must not fall"):
        ck.value_pool(X, T3, torch.tensor([0, 2, 1, 3]))
