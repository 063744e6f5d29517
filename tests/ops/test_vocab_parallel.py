"""The LM head divided over processes: values and gradients are those of the whole vocabulary in float64."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import carft_kernels as ck
from carft_kernels._row_kernels import RowGradients
from carft_kernels._vocab_parallel import VocabShard, combine_shards_reference, own_gradients
from carft_kernels.linear_policy_loss import linear_policy_loss_reference

from .checks import FAST, FEW, randn, seeds
from .policy_case import TERMS
from .ranks import (
    GROUPS,
    RANKS,
    Group,
    Run,
    assert_whole,
    logprob_case,
    logprob_on_rank,
    logprob_oracle,
    policy_case,
    policy_on_rank,
    policy_oracle,
    whole,
)

IMPLEMENTATIONS = ["torch", "triton"]
BY_TRITON = settings(FEW, max_examples=6)


# --- values and gradients ---------------------------------------------------------------------------------------------


@st.composite
def shards(draw: Any) -> tuple[str, list[int]]:
    """A group, and rows of each of its ranks; some have none."""
    group = draw(st.sampled_from(["three", "three", "two", "one"]))
    rows = draw(st.lists(st.integers(0, 25), min_size=len(GROUPS[group]), max_size=len(GROUPS[group])))
    return group, rows if sum(rows) > 1 else [2, *rows[1:]]


LOGPROB: dict[str, Any] = {
    "seed": seeds,
    "where": shards(),
    "tokens": st.integers(0, 12),
    "bias": st.booleans(),
    "options": st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([1.0, 0.6]),
            "with_entropy": st.booleans(),
            "with_lse": st.booleans(),
            "logit_softcap": st.sampled_from([None, 2.0, 30.0]),
            "ignore_index": st.sampled_from([-100, 0, 1]),
        }
    ),
}
PRECISION = {torch.float64: 1e-9, torch.float32: 1e-5}


@FAST
@given(**LOGPROB, dtype=st.sampled_from(list(PRECISION)))
def test_linear_logprob(run: Run, options: dict[str, Any], where: Any, dtype: torch.dtype, **case: Any) -> None:
    inputs = logprob_case(where=where, **case, dtype=dtype)
    found = run(where[0], logprob_on_rank, where[1], *inputs, options | {"impl": "torch"})
    assert_whole(found, logprob_oracle(*inputs, options), PRECISION[dtype])


@BY_TRITON
@given(**LOGPROB)
def test_linear_logprob_by_triton(run: Run, options: dict[str, Any], where: Any, **case: Any) -> None:
    inputs = logprob_case(where=where, **case, dtype=torch.float32)
    found = run(where[0], logprob_on_rank, where[1], *inputs, options | {"impl": "triton"})
    assert_whole(found, logprob_oracle(*inputs, options), 1e-5)


POLICY: dict[str, Any] = {
    "seed": seeds,
    "where": shards(),
    "tokens": st.integers(1, 14),
    "bias": st.booleans(),
    "correction": st.booleans(),
    "options": st.fixed_dictionaries(
        {
            "terms": st.sampled_from(list(TERMS)),
            "temperature": st.sampled_from([1.0, 0.8]),
            "logit_softcap": st.sampled_from([None, 2.0]),
            "chunk_tokens": st.sampled_from([None, 5]),
            "skip_dead": st.booleans(),
            "ignore_index": st.sampled_from([-100, 0, 1]),
        }
    ),
}


def check_policy(run: Run, impl: str, limit: float, where: Any, options: dict[str, Any], **case: Any) -> None:
    leaves, inputs = policy_case(where=where, **case)
    options = dict(options)
    options |= TERMS[options.pop("terms")]
    found = run(where[0], policy_on_rank, where[1], leaves, inputs, options | {"impl": impl})
    metrics = found[0][0][2:]
    for values, _ in found:
        del values[2:]
    assert_whole(found, policy_oracle(leaves, inputs, options), limit)
    alone = ck.linear_policy_loss(leaves[0], leaves[1], bias=(*leaves, None)[2], **inputs, **options, impl="torch")[2]
    for x, y in zip(metrics, alone.values(), strict=True):
        torch.testing.assert_close(x, y, rtol=limit, atol=limit)


@FAST
@given(**POLICY, dtype=st.sampled_from(list(PRECISION)))
def test_linear_policy_loss(run: Run, dtype: torch.dtype, **case: Any) -> None:
    check_policy(run, "torch", PRECISION[dtype], **case, dtype=dtype)


@BY_TRITON
@given(**POLICY)
def test_linear_policy_loss_by_triton(run: Run, **case: Any) -> None:
    check_policy(run, "triton", 1e-5, **case, dtype=torch.float32)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("operator", ["linear_logprob", "linear_policy_loss"])
def test_half_precision(run: Run, operator: str, impl: str) -> None:
    """Error of every value and gradient at most twice that of plain torch in bfloat16, on the whole vocabulary."""
    rows, options = [20, 0, 33], {"impl": impl}
    if operator == "linear_logprob":
        leaves, target, up = logprob_case(1, ("three", rows), 20, True, torch.bfloat16)
        known = {"with_entropy": True, "with_lse": True}
        found = whole(run("three", logprob_on_rank, rows, leaves, target, up, known | options))
        truth = logprob_oracle(leaves, target, up, known)
        plain = logprob_plain(leaves, target, up)
    else:
        leaves, inputs = policy_case(2, ("three", rows), 20, True, True, torch.bfloat16)
        inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
        known = TERMS["z loss and entropy"]
        found = run("three", policy_on_rank, rows, leaves, inputs, known | options)
        for values, _ in found:
            del values[2:]
        found, truth = whole(found), policy_oracle(leaves, inputs, known)
        wide = [x.clone().requires_grad_() for x in leaves]
        loss, logprob = linear_policy_loss_reference(*wide[:2], bias=wide[2], **inputs, **known)
        plain = [loss.detach(), logprob.detach(), *torch.autograd.grad(3.0 * loss, wide)]
    for i, (x, y, z) in enumerate(zip(found, plain, truth, strict=True)):
        error, allowed = (x.double() - z).norm(), 2 * (y.double() - z).norm()
        assert error <= allowed + 1e-5 * z.norm(), (i, float(error), float(allowed))


def logprob_plain(leaves: list[Tensor], target: Tensor, up: Tensor) -> list[Tensor]:
    hidden, weight, bias = low = [x.clone().requires_grad_() for x in leaves]
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    logp = logits.log_softmax(-1)
    values = [logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1), logits.logsumexp(-1)]
    total = torch.stack([(u.float() * x).sum() for u, x in zip(up, values, strict=True)]).sum()
    return [*(x.detach() for x in values), *torch.autograd.grad(total + 0.1 * values[-1].square().sum(), low)]


def summed_on_rank(group: Group) -> list[float]:
    x = torch.full((RANKS,), 2.0**-8, dtype=torch.bfloat16)
    x[group.rank()] = 1
    shard = VocabShard.of(torch.zeros(1, dtype=torch.int64), 1, None, -100, group.group_name)
    return shard.sum(x).tolist()


def test_d_hidden_is_summed_in_float32(run: Run) -> None:
    """1 + 2^-8 is 1 in bfloat16, and 1 + 2 * 2^-8 is not; on each rank 1 is somewhere else."""
    assert run("three", summed_on_rank) == [[1 + 2.0**-7] * RANKS] * RANKS


# --- a reference model's hidden states --------------------------------------------------------------------------------


def reference_on_rank(
    group: Group, rows: list[int], leaves: list[Tensor], frozen: list[Tensor], inputs: dict[str, Any], as_dtensor: bool
) -> list[list[Tensor]]:
    """As policy_on_rank; the reference model's weight and bias are shards or DTensors, as the policy's are."""

    def shard(x: Tensor) -> Any:
        if as_dtensor:
            x = distribute_tensor(x, DeviceMesh.from_group(group, "cpu"), [Shard(0)]).detach()
        else:
            x = x.split(rows)[group.rank()].clone()
        return x.requires_grad_()

    hidden, *shards = leaves[0].clone().requires_grad_(), *map(shard, leaves[1:])
    names = "reference_hidden_TE", "reference_weight_VE", "reference_bias"
    given = dict(zip(names, [frozen[0], *map(shard, frozen[1:])], strict=False))
    loss, logprob, metrics = ck.linear_policy_loss(
        hidden, shards[0], bias=(*shards, None)[1], **given, **inputs, kl_coef=0.3, group=group
    )
    gradients = torch.autograd.grad(3.0 * loss, (hidden, *shards))
    local = [x.to_local() if as_dtensor and i else x for i, x in enumerate(gradients)]
    return [[loss.detach(), logprob, metrics["ref_logprob_T"]], local]


@pytest.mark.parametrize("as_dtensor", [False, True])
@pytest.mark.parametrize("head", ["policy's", "own", "own, with bias"])
def test_hidden_states_of_a_reference_model(run: Run, head: str, as_dtensor: bool) -> None:
    """Its head is divided as the policy's: values and gradients are those of one process in float64."""
    rows = [7, 6]
    leaves, inputs = policy_case(3, ("two", rows), 9, head == "own, with bias", False, torch.float64)
    del inputs["ref_logprob_T"]
    frozen = [randn(11, 9, 8)]
    if head != "policy's":
        frozen = [randn(11, 9, 5), randn(12, 13, 5), *([randn(13, 13)] if head == "own, with bias" else [])]
    found = run("two", reference_on_rank, rows, leaves, frozen, inputs, as_dtensor)
    logits = torch.nn.functional.linear(frozen[0], *(frozen[1:] or leaves[1:]))
    ref = logits.log_softmax(-1).gather(1, inputs["target_T"].clamp(min=0)[:, None])[:, 0]
    ref = torch.where(inputs["target_T"] == -100, 0.0, ref)
    loss, logprob, *gradients = policy_oracle(leaves, inputs | {"ref_logprob_T": ref}, {"kl_coef": 0.3})
    assert_whole(found, [loss, logprob, ref, *gradients], 1e-9)


# --- the formulas -----------------------------------------------------------------------------------------------------


@FAST
@given(seed=seeds, cuts=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_the_formulas_of_the_shards_are_those_of_the_whole(seed: int, cuts: list[int]) -> None:
    """The reference against all logits, and the gradients that an operator passes on against the reference's."""
    logits, start = randn(seed, 5, sum(cuts), scale=2.0), torch.tensor([0, *cuts]).cumsum(0)
    target = torch.randint(sum(cuts), (5,), generator=torch.Generator().manual_seed(seed))
    owner = torch.bucketize(target, start[1:], right=True)
    statistics = []
    for r, x in enumerate(logits.split(cuts, 1)):
        logp = x.log_softmax(-1)
        own = logp.gather(1, (target - start[r]).clamp(0, cuts[r] - 1)[:, None])[:, 0]
        statistics.append((own, -(logp.exp() * logp).sum(-1), x.logsumexp(-1)))
    leaves = [torch.stack(x).requires_grad_() for x in zip(*statistics, strict=True)]
    found = combine_shards_reference(*leaves, owner)
    logp = logits.log_softmax(-1)
    expected = logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1), logits.logsumexp(-1)
    for x, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(x.detach(), truth, rtol=1e-10, atol=1e-12)
    up = randn(seed + 1, 3, 5)
    gradients = torch.autograd.grad(found, leaves, list(up))
    for r in range(len(cuts)):
        log_share = (leaves[2][r] - found[2]).detach()
        own_entropy = leaves[1][r].detach()
        ours = own_gradients(RowGradients(*up), own_entropy, found[1].detach(), log_share, owner == r)
        for x, truth in zip(ours, gradients, strict=True):
            torch.testing.assert_close(x, truth[r], rtol=1e-9, atol=1e-12)


class Cut(torch.autograd.Function):
    """This rank's rows of what every rank has; the gradient is that of all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], group: Group) -> Tensor:
        ctx.rows, ctx.group = rows, group
        return x.split(rows)[group.rank()].clone()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        whole = d.new_zeros(sum(ctx.rows), *d.shape[1:])
        whole.split(ctx.rows)[ctx.group.rank()].copy_(d)
        dist.all_reduce(whole, group=ctx.group)
        return whole, None, None


def gradcheck_on_rank(group: Group, rows: list[int]) -> bool:
    """Finite differences of the whole weight: every rank moves the same number at the same time."""
    target = torch.tensor([1, 0, -100, 2, 8, 3])
    leaves = tuple(randn(i, *shape).requires_grad_() for i, shape in enumerate(((6, 4), (9, 4), (9,))))
    options: dict[str, Any] = {"logit_softcap": 2.0, "temperature": 0.7, "group": group}
    old, share = randn(5, 6, scale=0.2) - 2, torch.tensor([0.3, 0.0, 0.2, 0.5, 0.1, 0.7], dtype=torch.float64)
    policy: dict[str, Any] = {"advantage_T": randn(6, 6), "old_logprob_T": old, "weight_T": share, "ref_logprob_T": old}
    policy |= {"kl_coef": 0.1, "entropy_coef": 0.1, "z_loss_coef": 0.1, "chunk_tokens": 4}

    def logprob(h: Tensor, w: Tensor, b: Tensor) -> Any:
        w, b = (Cut.apply(x, rows, group) for x in (w, b))
        return ck.linear_logprob(h, w, target, bias=b, with_entropy=True, with_lse=True, **options)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        w, b = (Cut.apply(x, rows, group) for x in (w, b))
        return ck.linear_policy_loss(h, w, target, bias=b, **policy, **options)[0]

    return torch.autograd.gradcheck(logprob, leaves) and torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize(("group", "rows"), [("three", [4, 0, 5]), ("two", [1, 8]), ("one", [9])])
def test_gradcheck(run: Run, group: str, rows: list[int]) -> None:
    assert all(run(group, gradcheck_on_rank, rows))
