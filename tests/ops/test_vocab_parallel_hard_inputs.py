"""The LM head divided over processes, on logits far apart, columns left out, and targets that are wrong."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import carft_kernels as ck

from .checks import randn
from .ranks import Group, Run, assert_whole, logprob_case, logprob_on_rank, logprob_oracle, policy_on_rank, whole

IMPLEMENTATIONS = ["torch", "triton"]
EYE = torch.eye(6)  # hidden states that make logits of the weight, without rounding
HARD = {
    "in the thousands": randn(1, 6, 12) + torch.arange(12) % 3 - 5000,
    "far apart": randn(1, 6, 12) + torch.tensor([0.0] * 5 + [-90.0] * 5 + [3000.0] * 2),
    "one-hot": torch.eye(12, dtype=torch.float64)[:6] * 1000,
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", HARD)
def test_hard_logits(run: Run, kind: str, impl: str) -> None:
    """Nothing cancels: what depends on differences of logits is right to 1e-5, though float32 holds them to 5e-4."""
    leaves, target = [EYE, HARD[kind].T.float().contiguous()], torch.tensor([0, 11, 7, 3, 4, 10])
    up = torch.ones(2, 6)
    found = whole(run("three", logprob_on_rank, [5, 5, 2], leaves, target, up, {"with_entropy": True, "impl": impl}))
    expected = logprob_oracle(leaves, target, up, {"with_entropy": True})
    assert (found[0] <= 0).all()
    for i, (x, truth) in enumerate(zip(found, expected, strict=True)):
        size = float(HARD[kind].abs().max()) if i == 2 else 1.0  # d_hidden is a sum of the logits themselves
        torch.testing.assert_close(x.double(), truth, rtol=1e-5, atol=1e-5 * size)


EXCLUDED = {
    "a few columns": torch.arange(12) % 3 == 1,
    "a whole shard": torch.arange(12) < 5,
    "all but one shard": torch.arange(12) < 10,
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("kind", "softcap"), [("a few columns", None), ("a whole shard", 3.0), ("all but one shard", None)]
)
def test_excluded_columns(run: Run, kind: str, softcap: float | None, impl: str) -> None:
    """A vocabulary padded with a bias of -inf, to a number of rows that divides: no share, no gradient, no NaN."""
    rows, share = [5, 5, 2], torch.rand(9, generator=torch.Generator().manual_seed(3))
    leaves = [x.float() for x in (randn(1, 9, 8), randn(2, 12, 8), randn(3, 12).masked_fill(EXCLUDED[kind], -math.inf))]
    target = torch.tensor(
        [11, 11, 10, 11, -100, 10, 11, 10, 11] if kind != "a few columns" else [0, 2, 3, 5, 6, 8, 9, 11, 11]
    )
    known: dict[str, Any] = {"with_entropy": True, "with_lse": True, "logit_softcap": softcap}
    found = run("three", logprob_on_rank, rows, leaves, target, torch.ones(3, 9), known | {"impl": impl})
    assert_whole(found, logprob_oracle(leaves, target, torch.ones(3, 9), known), 1e-5)
    assert not whole(found)[-2][EXCLUDED[kind]].any()
    inputs = {"target_T": target, "advantage_T": randn(4, 9).float(), "old_logprob_T": None, "weight_T": share}
    known = {"z_loss_coef": 0.1, "logit_softcap": softcap}
    for skip_dead in (True, False):
        options = known | {"impl": impl, "skip_dead": skip_dead, "chunk_tokens": 4}
        found = run("three", policy_on_rank, rows, leaves, inputs, options)
        alone = run("one", policy_on_rank, [12], leaves, inputs, options)
        assert_whole(found, [x.double() for x in whole(alone)], 1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_group_of_one_changes_no_bit(run: Run, impl: str) -> None:
    leaves, target, up = logprob_case(3, ("one", [40]), 9, True, torch.float32)
    options: dict[str, Any] = {"with_entropy": True, "with_lse": True, "impl": impl}
    found = ck.linear_logprob(leaves[0], leaves[1], target, bias=leaves[2], **options)
    values = run("one", logprob_on_rank, [40], leaves, target, up, options)[0][0]
    assert all(map(torch.equal, values[:2], found[:2]))


def ratio_on_rank(group: Group, rows: list[int], leaves: list[Tensor], target: Tensor) -> list[bool]:
    weight, one = leaves[1].split(rows)[group.rank()], torch.ones(len(target))
    old, _ = ck.linear_logprob(leaves[0], weight, target, group=group)
    options: dict[str, Any] = {"advantage_T": one, "old_logprob_T": old, "weight_T": one, "chunk_tokens": 5}
    loss, logprob, metrics = ck.linear_policy_loss(leaves[0], weight, target, **options, group=group)
    return [torch.equal(old, logprob), float(metrics["approx_kl"]) == 0, float(loss) == -len(target)]


def test_the_ratio_of_a_policy_to_itself_is_one(run: Run) -> None:
    leaves, target, _ = logprob_case(4, ("three", [40, 7, 30]), 33, False, torch.float32)
    assert run("three", ratio_on_rank, [40, 7, 30], leaves, target) == [[True] * 3] * 3


def outside_on_rank(group: Group, impl: Any) -> list[Any]:
    """Where nothing checks indices, as on CUDA by default."""
    ck.set_index_checks(False)
    hidden, weight = torch.ones(4, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    target = torch.tensor([1, 6, -1, 5])
    logprob, _ = ck.linear_logprob(hidden, weight, target, group=group, impl=impl)
    (d_first,) = torch.autograd.grad(logprob.sum(), hidden)
    one = torch.ones(4)
    loss, _, _ = ck.linear_policy_loss(
        hidden, weight, target, advantage_T=one, old_logprob_T=None, weight_T=one, group=group, impl=impl
    )
    (d_second,) = torch.autograd.grad(loss, hidden)
    ck.set_index_checks(None)
    return [x.isnan().flatten().tolist() for x in (logprob, d_first.sum(1), d_second.sum(1), loss)]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_targets_outside_are_nan_where_nothing_checks_them(run: Run, impl: str) -> None:
    rows = [False, True, True, False]
    assert run("three", outside_on_rank, impl) == [[rows, rows, rows, [True]]] * 3


def other_tokens_on_rank(group: Group) -> list[bool]:
    """Where nothing checks indices, as on CUDA by default."""
    ck.set_index_checks(False)
    logprob, _ = ck.linear_logprob(
        torch.ones(3, 3), torch.ones(2, 3), torch.tensor([1, -100, group.rank()]), group=group
    )
    ck.set_index_checks(None)
    return logprob.isnan().tolist()


def test_tokens_that_differ_between_ranks_are_nan_where_nothing_checks_them(run: Run) -> None:
    """Such as those of FSDP's ranks: any number would be that of no batch."""
    assert run("two", other_tokens_on_rank) == [[True, False, True]] * 2
