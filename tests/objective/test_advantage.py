"""Advantages and returns against their formulas in float64, a token at a time, and against the published code."""

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from carft_fast.config.sections import RlConfig
from carft_fast.objective.advantage import group_advantages, ppo_advantages

from ..conftest import assert_golden

LENGTHS = [4, 1, 9, 2, 6]


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def random_rollouts(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores [B], log-probs, the reference's and values [C]."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(LENGTHS)
    score = torch.rand(len(LENGTHS), generator=generator)
    logprob, ref = (-3 * torch.rand(n, generator=generator) for _ in range(2))
    return score, logprob, ref, torch.randn(n, generator=generator)


def ppo_by_formula(
    score: Tensor, logprob: Tensor, ref: Tensor, value: Tensor, rl: RlConfig
) -> tuple[list[float], list[float], list[float]]:
    """Whitened advantages, returns and advantages as they were, in Python's floats."""
    s, p, r, v = (x.double().tolist() for x in (score, logprob, ref, value))
    advantages, start = [0.0] * len(v), 0
    for b, length in enumerate(LENGTHS):
        end = start + length
        following = 0.0
        for t in reversed(range(start, end)):
            last = t == end - 1
            reward = -rl.kl_coef * (p[t] - r[t]) + (s[b] if last else 0.0)
            delta = reward + (0.0 if last else rl.gamma * v[t + 1]) - v[t]
            following = advantages[t] = delta + rl.gamma * rl.lam * following
        start = end
    returns = [a + x for a, x in zip(advantages, v, strict=True)]
    if not rl.whiten_advantages:
        return advantages, returns, advantages
    mean, deviation = statistics.fmean(advantages), math.sqrt(statistics.variance(advantages) + rl.whiten_eps)
    return [(a - mean) / deviation for a in advantages], returns, advantages


@pytest.mark.parametrize(
    "rl",
    [
        RlConfig(),
        RlConfig(gamma=0.9, lam=0.8, kl_coef=0.3, whiten_eps=0.5),
        RlConfig(gamma=0.7, lam=1.0, kl_coef=1.5, whiten_advantages=False),
        RlConfig(gamma=1.0, lam=0.0, kl_coef=0.0),
    ],
    ids=["the paper's", "discounted", "not whitened", "no KL"],
)
def test_ppo_advantages_are_their_formula(rl: RlConfig) -> None:
    score, logprob, ref, value = random_rollouts(0)
    known = (logprob, ref) if rl.kl_coef else (None, None)
    found = ppo_advantages(score, *known, value, offsets(LENGTHS), rl)
    for ours, expected in zip(
        (found.advantage_C, found.return_C, found.raw_advantage_C),
        ppo_by_formula(score, logprob, ref, value, rl),
        strict=True,
    ):
        assert ours is not None
        torch.testing.assert_close(ours.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_ppo_advantages_of_the_published_code(golden: Any) -> None:
    """Where its masks are those of completions that end with their EOS."""
    checked = 0
    for name, params, a in golden("rollout").cases():
        if "adv_whitened" not in a:
            continue
        mask, ids = a["mask"], a["ids"]
        firsts = mask.int().argmax(1)
        lengths = mask.sum(1)
        columns = torch.arange(mask.shape[1])
        whole = torch.equal(mask, (columns >= firsts[:, None]) & (columns < (firsts + lengths)[:, None]))
        ends = (ids == params["eos_id"]).sum(1)
        if not whole or (ends > 1).any() or (ids[:, : params["prompt_len"]] == params["eos_id"]).any():
            continue

        def packed(x: Tensor, mask: Tensor = mask) -> Tensor:
            return x[mask[:, : x.shape[1]]].float()

        rl = RlConfig(kl_coef=params["kl_coef"], gamma=params["gamma"], lam=params["lam"], whiten_eps=1e-8)
        found = ppo_advantages(
            a["reward"].float(),
            packed(a["old_logprob"]),
            packed(a["ref_logprob"]),
            packed(a["value"]),
            offsets(lengths.tolist()),
            rl,
        )
        assert found.return_C is not None
        assert_golden(found.raw_advantage_C, packed(a["adv"]), loose=True, name=name)
        assert_golden(found.return_C, packed(a["ret"]), loose=True, name=name)
        assert_golden(found.advantage_C, packed(a["adv_whitened"]), loose=True, name=name)
        checked += 1
    assert checked >= 2, "too few vectors apply"


@pytest.mark.parametrize("std_eps", [None, 1e-4, 0.3], ids=["Dr.GRPO", "GRPO", "GRPO, large eps"])
def test_group_advantages_are_their_formula(std_eps: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    k, lengths = 3, [4, 1, 9, 2, 6, 3, 1, 1, 5]
    score = torch.randn(len(lengths), generator=generator)
    found = group_advantages(score, offsets(lengths), sum(lengths), samples_per_prompt=k, std_eps=std_eps)
    expected: list[float] = []
    for i, length in enumerate(lengths):
        group = score[i // k * k : i // k * k + k].double().tolist()
        advantage = float(score[i]) - statistics.fmean(group)
        if std_eps is not None:
            advantage /= statistics.stdev(group) + std_eps
        expected += [advantage] * length
    torch.testing.assert_close(
        found.advantage_C.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(found.raw_advantage_C, found.advantage_C)
    assert found.return_C is None


@pytest.mark.parametrize("sizes", [3, [3, 1, 4, 2], [1, 1, 8], [10]], ids=str)
@pytest.mark.parametrize("kind", ["Dr.GRPO", "GRPO", "RLOO"])
def test_groups_of_unequal_size_and_leaving_one_out(kind: str, sizes: int | list[int]) -> None:
    """Every sample against its own group alone; one sample alone has no advantage."""
    groups = [3, 3, 3] if isinstance(sizes, int) else sizes
    generator = torch.Generator().manual_seed(1)
    lengths = [1 + i % 4 for i in range(sum(groups))]
    score = torch.randn(len(lengths), generator=generator)
    options: dict[str, Any] = {"std_eps": 0.1 if kind == "GRPO" else None, "leave_one_out": kind == "RLOO"}
    found = group_advantages(score, offsets(lengths), sum(lengths), samples_per_prompt=sizes, **options)
    expected: list[float] = []
    ends = torch.tensor(groups).cumsum(0).tolist()
    for end, size in zip(ends, groups, strict=True):
        group = score[end - size : end].double().tolist()
        for i, own in enumerate(group):
            others = group[:i] + group[i + 1 :]
            if not others:
                advantage = 0.0
            elif kind == "RLOO":
                advantage = own - statistics.fmean(others)
            else:
                advantage = own - statistics.fmean(group)
                advantage /= statistics.stdev(group) + 0.1 if kind == "GRPO" else 1
            expected += [advantage] * lengths[end - size + i]
    torch.testing.assert_close(
        found.advantage_C.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("std_eps", [None, 1e-4], ids=["Dr.GRPO", "GRPO"])
@pytest.mark.parametrize("k", [2, 3, 7])
def test_a_group_of_one_score_has_no_advantage_and_leaves_the_others_theirs(k: int, std_eps: float | None) -> None:
    """Exactly 0, though the float32 mean of equal numbers is not always that number."""
    scores = [0.1, 1 / 3, 0.2 + 0.1 * 0.7, 1.0, 0.0, 1e-3, 123.456]
    score = torch.tensor([s for s in scores for _ in range(k)])
    if k == 7:  # the mean of two or three is exact
        means = score.view(-1, k).mean(1)
        assert (means != score.view(-1, k)[:, 0]).any(), "no mean is off by a rounding: the test tests nothing"
    lengths = [1 + i % 3 for i in range(len(score))]
    found = group_advantages(score, offsets(lengths), sum(lengths), samples_per_prompt=k, std_eps=std_eps)
    assert not found.advantage_C.any()
    score[-1] += 1.0
    found = group_advantages(score, offsets(lengths), sum(lengths), samples_per_prompt=k, std_eps=std_eps)
    varied = sum(lengths[-k:])
    assert not found.advantage_C[:-varied].any()
    assert found.advantage_C[-varied:].all()
