"""The LM head divided over real processes (gloo): values and gradients are those of the whole vocabulary in float64."""

import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import carft_kernels as ck
from carft_kernels._row_kernels import RowGradients
from carft_kernels._vocab_parallel import VocabShard, combine_shards_reference, own_gradients
from carft_kernels.linear_logprob import linear_logprob_reference
from carft_kernels.linear_policy_loss import linear_policy_loss_reference
from tests.processes import FORKS

from .checks import FAST, FEW, policy_inputs, randn, seeds
from .conftest import LargestTensor
from .policy_case import TERMS
from .test_custom_ops import Recorded

ROOT = Path(__file__).resolve().parents[2]
IMPLEMENTATIONS = ["torch", "triton"]
BY_TRITON = settings(FEW, max_examples=6)
RANKS = 3
# ranks of the world that make a group: rank 0 of the second is rank 1 of the world
GROUPS = {"three": [0, 1, 2], "two": [1, 2], "one": [0]}
Group = dist.ProcessGroup


# --- three processes that stay ----------------------------------------------------------------------------------------


def _serve(rank: int, folder: str, inbox: Any, outbox: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    groups = {name: dist.new_group(ranks) for name, ranks in GROUPS.items()}
    while (task := inbox.get()) is not None:
        name, function, arguments = task
        try:
            outbox.put(function(groups[name], *arguments))
        except Exception as error:
            outbox.put(error)
    dist.destroy_process_group()


Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """run(group, function, *arguments): what function(group, *arguments) returns on each rank of the group."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    inboxes, outboxes = ([FORKS.SimpleQueue() for _ in range(RANKS)] for _ in range(2))
    processes = [
        FORKS.Process(target=_serve, args=(rank, folder, inboxes[rank], outboxes[rank]), daemon=True)
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()

    def call(group: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for rank in GROUPS[group]:
            inboxes[rank].put((group, function, arguments))
        found = [outboxes[rank].get() for rank in GROUPS[group]]
        for result in found:
            if isinstance(result, Exception):
                raise result
        return found

    yield call
    for inbox, process in zip(inboxes, processes, strict=True):
        inbox.put(None)
        process.join()


# --- one case, on every rank ------------------------------------------------------------------------------------------


def cut(x: Tensor, rows: list[int], group: Group) -> Tensor:
    """This rank's rows, as a leaf."""
    return x.split(rows)[group.rank()].clone().requires_grad_()


def logprob_on_rank(
    group: Group, rows: list[int], leaves: list[Tensor], target: Tensor, up: Tensor, options: dict[str, Any]
) -> list[list[Tensor]]:
    """Values, and gradients of hidden, weight and bias, of `up` times every output and of the squared log-sum-exp."""
    hidden, *shards = leaves[0].clone().requires_grad_(), *(cut(x, rows, group) for x in leaves[1:])
    found = ck.linear_logprob(hidden, shards[0], target, bias=(*shards, None)[1], **options, group=group)
    values = [x for x in found if x is not None]
    total = torch.stack([(u.to(x) * x).sum() for u, x in zip(up, values, strict=False)]).sum()
    if options.get("with_lse"):
        total = total + 0.1 * values[-1].square().sum()
    return [[x.detach() for x in values], list(torch.autograd.grad(total, (hidden, *shards)))]


def policy_on_rank(
    group: Group, rows: list[int], leaves: list[Tensor], inputs: dict[str, Any], options: dict[str, Any]
) -> list[list[Tensor]]:
    """Values, and gradients of three times the loss with respect to hidden, weight and bias."""
    hidden, *shards = leaves[0].clone().requires_grad_(), *(cut(x, rows, group) for x in leaves[1:])
    loss, logprob, metrics = ck.linear_policy_loss(
        hidden, shards[0], bias=(*shards, None)[1], **inputs, **options, group=group
    )
    gradients = torch.autograd.grad(3.0 * loss, (hidden, *shards))
    return [[loss.detach(), logprob, *metrics.values()], list(gradients)]


def whole(found: list[list[list[Tensor]]]) -> list[Tensor]:
    """Values and gradient of hidden, equal to the bit on every rank, and the shards' gradients side by side."""
    (values, (d_hidden, *_)), *others = found
    for other, (other_d_hidden, *_) in others:
        assert all(map(torch.equal, [*values, d_hidden], [*other, other_d_hidden]))
    shards = zip(*(gradients[1:] for _, gradients in found), strict=True)
    return [*values, d_hidden, *(torch.cat(parts) for parts in shards)]


def assert_whole(found: list[list[list[Tensor]]], expected: list[Tensor], limit: float) -> None:
    """Within `limit` of the largest value of each."""
    ours = whole(found)
    assert len(ours) == len(expected)
    for i, (x, truth) in enumerate(zip(ours, expected, strict=True)):
        assert x.shape == truth.shape
        if x.numel():
            error = (x.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-2 if truth.ndim else 1.0)
            assert error <= limit, (i, float(error))


def logprob_oracle(leaves: list[Tensor], target: Tensor, up: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """In float64, in one process."""
    hidden, weight, *bias = wide = [x.double().requires_grad_() for x in leaves]
    counted = target != options.get("ignore_index", -100)
    x = torch.nn.functional.linear(hidden, weight, *bias)
    cap, temperature = options.get("logit_softcap"), options.get("temperature", 1.0)
    x = x if cap is None else torch.where(x == -math.inf, x, cap * (x / cap).tanh())
    logp = (x / temperature).log_softmax(-1)
    values = [torch.where(counted, logp.gather(1, torch.where(counted, target, 0)[:, None])[:, 0], 0.0)]
    if options.get("with_entropy"):  # p log p is 0 where p is 0; entr() has an infinite derivative there
        values.append(-(logp.exp() * logp.clamp(min=-1e4)).sum(-1) * counted)
    if options.get("with_lse"):
        values.append((x / temperature).logsumexp(-1) * counted)
    total = torch.stack([(u.double() * x).sum() for u, x in zip(up, values, strict=False)]).sum()
    if options.get("with_lse"):
        total = total + 0.1 * values[-1].square().sum()
    return [*(x.detach() for x in values), *torch.autograd.grad(total, wide)]


def policy_oracle(leaves: list[Tensor], inputs: dict[str, Any], options: dict[str, Any]) -> list[Tensor]:
    """Loss, log-probs and gradients in float64, in one process."""
    hidden, weight, *bias = wide = [x.double().requires_grad_() for x in leaves]
    known = {k: v for k, v in options.items() if k not in ("chunk_tokens", "skip_dead", "impl")}
    vectors = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    loss, logprob = linear_policy_loss_reference(hidden, weight, bias=(*bias, None)[0], **vectors, **known)
    return [loss.detach(), logprob.detach(), *torch.autograd.grad(3.0 * loss, wide)]


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


def logprob_case(seed: int, where: tuple[str, list[int]], tokens: int, bias: bool, dtype: torch.dtype) -> Any:
    vocabulary = sum(where[1])
    leaves = [randn(seed, tokens, 8), randn(seed + 1, vocabulary, 8, scale=0.6)]
    leaves += [randn(seed + 2, vocabulary)] * bias
    target = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    return [x.to(dtype) for x in leaves], target, randn(seed + 3, 3, tokens).to(dtype)


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


def policy_case(
    seed: int, where: tuple[str, list[int]], tokens: int, bias: bool, correction: bool, dtype: torch.dtype
) -> tuple[list[Tensor], dict[str, Any]]:
    vocabulary = sum(where[1])
    inputs = {name: x.cpu() for name, x in policy_inputs(seed, tokens, vocabulary, 8).items()}
    leaves = [inputs.pop("hidden_TD"), inputs.pop("weight_VD")] + [randn(seed + 9, vocabulary)] * bias
    if correction:
        inputs["correction_T"] = randn(seed + 8, tokens).abs() * (torch.arange(tokens) % 5 > 0)
    return [x.to(dtype) for x in leaves], {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


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


# --- hard inputs ------------------------------------------------------------------------------------------------------

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


# --- cost -------------------------------------------------------------------------------------------------------------


class Counted(LargestTensor):
    """Its collectives, too."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sent = args[1][0] if "gather" in func._name else args[0][0]
            self.collectives.append((func.overloadpacket.__name__.strip("_"), sent.numel()))
        return super().__torch_dispatch__(func, types, args, kwargs)


def cost_on_rank(group: Group, rows: list[int], tokens: int) -> list[Any]:
    leaves, target, _ = logprob_case(1, ("three", rows), tokens, False, torch.float32)
    hidden, weight = leaves[0].requires_grad_(), cut(leaves[1], rows, group)
    one, found = torch.ones(tokens), []
    calls: list[Callable[[], Tensor]] = [
        lambda: ck.linear_logprob(hidden, weight, target, group=group)[0].sum(),
        lambda: ck.linear_policy_loss(
            hidden, weight, target, advantage_T=one, old_logprob_T=None, weight_T=one, chunk_tokens=10, group=group
        )[0],
    ]
    for call in calls:
        with Counted() as counted:
            loss = call()
            forward = list(counted.collectives)
            loss.backward()
        one_matmul = 2 * tokens * rows[group.rank()] * hidden.shape[1]
        found.append((counted.matmul_flops / one_matmul, forward, counted.collectives[len(forward) :]))
    return found


def test_what_it_costs(run: Run) -> None:
    """Matmuls with the shard, as with the whole weight; collectives of a few numbers a token, and one of d_hidden."""
    sizes = ("allgather", 3)
    summed = ("allreduce", 20 * 8)
    statistics = [sizes, ("allgather", 3 * 20)]  # of all tokens in one chunk, in either pass
    logprob = (4.0, statistics, [*statistics, summed])
    policy = (3.0, [sizes, *[("allgather", 4 * 10)] * 2, summed], [])
    assert run("three", cost_on_rank, [5, 9, 30], 20) == [[logprob, policy]] * 3


def chunks_on_rank(group: Group, rows: list[int], tokens: int) -> tuple[int, float]:
    target, weight = torch.arange(tokens), torch.ones(rows[group.rank()], 4)
    vectors: dict[str, Any] = {"advantage_T": torch.ones(tokens), "old_logprob_T": None, "weight_T": torch.ones(tokens)}
    with Counted() as counted:
        loss, *_ = ck.linear_policy_loss(
            torch.ones(tokens, 4), weight, target, **vectors, entropy_coef=1.0, group=group
        )
    return len(counted.collectives), float(loss)


def test_the_largest_shard_decides_on_the_chunks(run: Run) -> None:
    """By their own sizes the ranks would not have the same number of chunks, and wait for each other."""
    rows, tokens = [3, 100_003, 0], 130
    (count, loss), *others = run("three", chunks_on_rank, rows, tokens)
    assert others == [(count, loss)] * 2
    assert count == 1 + 2  # sizes, and 2^23 / 100,003 = 83 tokens a chunk
    assert loss == pytest.approx(-tokens * (1 + math.log(sum(rows))), rel=1e-5)


def readbacks_on_rank(group: Group, impl: Any) -> set[str]:
    leaves, target, _ = logprob_case(1, ("three", [5, 9, 30]), 20, True, torch.float32)
    hidden, weight, bias = (x.requires_grad_() for x in (leaves[0], *(cut(x, [5, 9, 30], group) for x in leaves[1:])))
    one = torch.ones(20)
    policy: dict[str, Any] = {"advantage_T": one, "old_logprob_T": None, "weight_T": one, "chunk_tokens": 10}
    ck.set_index_checks(False)  # as on CUDA by default
    with Recorded(inside=True) as inside:
        options: dict[str, Any] = {"bias": bias, "group": group, "impl": impl}
        ck.linear_logprob(hidden, weight, target, with_entropy=True, chunk_tokens=10, **options)
        loss, *_ = ck.linear_policy_loss(hidden, weight, target, **policy, skip_dead=False, **options)
        loss.backward()
    ck.set_index_checks(None)
    return inside.readbacks()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_is_read_back(run: Run, impl: str) -> None:
    """Where chunks are given and all tokens take part, and no index is checked. On a CPU torch's way finds the rows
    without a gradient, to touch these alone, and counts the tokens with weight."""
    assert run("three", readbacks_on_rank, impl) == [{"nonzero", "item"} if impl == "torch" else set()] * 3


def tagged_on_rank(group: Group, chunk_tokens: int | None) -> list[tuple[str, bool, bool]]:
    """Of every operator that has collectives: whether it is cudagraph_unsafe, and reads something back."""
    leaves, target, _ = logprob_case(1, ("three", [5, 9, 30]), 20, False, torch.float32)
    hidden, weight = leaves[0].requires_grad_(), cut(leaves[1], [5, 9, 30], group)
    one, found = torch.ones(20), []
    options: dict[str, Any] = {"group": group, "chunk_tokens": chunk_tokens, "impl": "triton"}
    vectors: dict[str, Any] = {"advantage_T": one, "old_logprob_T": None, "weight_T": one, "skip_dead": False}

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace != "carft" or "scaled" in func._name:
                return func(*args, **(kwargs or {}))
            with Recorded(inside=True) as inside:
                result = OPDEFS[func._name.removesuffix(".default")]._init_fn(*args)
            found.append((func._opname, torch.Tag.cudagraph_unsafe in func.tags, bool(inside.readbacks())))
            return result

    ck.set_index_checks(False)  # as on CUDA by default
    with Calls():
        ck.linear_logprob(hidden, weight, target, **options)[0].sum().backward()
        ck.linear_policy_loss(hidden, weight, target, **vectors, **options)[0].backward()
    ck.set_index_checks(None)
    return found


@pytest.mark.parametrize("chunk_tokens", [None, 10])
def test_operators_that_read_back_say_so(run: Run, chunk_tokens: int | None) -> None:
    """`cudagraph_unsafe` is on those that ask for the largest shard."""
    unsafe = [True, True] if chunk_tokens is None else [False, False]
    found = run("three", tagged_on_rank, chunk_tokens)
    assert [[x[1:] for x in of_rank] for of_rank in found] == [[(*unsafe,)] * 3] * 3
    assert found[0][1][0].endswith("_backward")


# --- as PyTorch sees it -----------------------------------------------------------------------------------------------


def registered_on_rank(group: Group) -> list[str]:
    """opcheck of what the two operators call for a group, and torch.compile; of a group of one."""
    leaves, target, _ = logprob_case(1, ("one", [13]), 5, True, torch.float32)
    leaves = [x.requires_grad_() for x in leaves]
    one, recorded = torch.ones(5), []
    operator = type(OPDEFS["carft::gae"])
    original = operator.__call__

    def call(self: Any, *arguments: Any) -> Any:
        recorded.append((self, arguments))
        return original(self, *arguments)

    def logprob(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        found = ck.linear_logprob(h, w, target, bias=b, with_entropy=True, with_lse=True, group=group)
        return torch.stack([x.sum() for x in found if x is not None]).sum()

    def policy(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        vectors: dict[str, Any] = {"advantage_T": one, "old_logprob_T": None, "weight_T": one}
        return ck.linear_policy_loss(h, w, target, bias=b, **vectors, group=group)[0]

    operator.__call__ = call
    for function in (logprob, policy):
        function(*leaves).backward()
    operator.__call__ = original
    for definition, arguments in recorded:
        forward = not re.search(r"backward|scaled", definition._qualname)
        arguments = tuple(
            x.detach().clone().requires_grad_(forward and x.requires_grad) if isinstance(x, Tensor) else x
            for x in arguments
        )
        results = torch.library.opcheck(definition, arguments)
        assert set(results.values()) == {"SUCCESS"}
    for function in (logprob, policy):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        expected = torch.autograd.grad(function(*leaves), leaves)
        for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            torch.testing.assert_close(x, y)
    first = torch.autograd.grad(logprob(*leaves).square(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(first[0].square().sum(), leaves)
    return sorted({definition._qualname for definition, _ in recorded})


def test_registration(run: Run) -> None:
    names = ["linear_logprob_of_shards", "linear_logprob_of_shards_backward", "linear_policy_loss", "scaled_gradient"]
    assert run("one", registered_on_rank) == [[f"carft::{x}" for x in names]]


# --- DTensors ---------------------------------------------------------------------------------------------------------


def dtensor_on_rank(group: Group, leaves: list[Any], target: Tensor) -> list[Tensor]:
    """As a tensor-parallel module has them: used as they are, without a gather."""
    mesh = init_device_mesh("cpu", (RANKS,))
    hidden, weight, bias = leaves[0].requires_grad_(), *(distribute_tensor(x, mesh, [Shard(0)]) for x in leaves[1:])
    weight, bias = (x.detach().requires_grad_() for x in (weight, bias))
    with Counted() as counted:
        logprob, _ = ck.linear_logprob(hidden, weight, target, bias=bias, group=mesh.get_group())
    assert [name for name, _ in counted.collectives] == ["allgather"] * 2
    loss, _, _ = ck.linear_policy_loss(
        hidden,
        weight,
        target,
        bias=bias,
        advantage_T=target.double(),
        old_logprob_T=None,
        weight_T=target.double(),
        group=group,
    )
    gradients = torch.autograd.grad(logprob.sum() + loss, (hidden, weight, bias))
    assert all(isinstance(x, DTensor) and x.placements == (Shard(0),) for x in gradients[1:])
    return [logprob.detach(), loss.detach(), gradients[0], *(x.full_tensor() for x in gradients[1:])]


@pytest.mark.parametrize("vocabulary", [14, 4])  # 5, 5 and 4 rows; 2, 2 and none
def test_dtensors_are_used_as_shards(run: Run, vocabulary: int) -> None:
    leaves, target, _ = logprob_case(1, ("three", [vocabulary]), 6, True, torch.float64)
    hidden, weight, bias = wide = [x.clone().requires_grad_() for x in leaves]
    logprob, _ = linear_logprob_reference(hidden, weight, target, bias=bias)
    policy: dict[str, Any] = {"advantage_T": target.double(), "old_logprob_T": None, "weight_T": target.double()}
    loss, _ = linear_policy_loss_reference(hidden, weight, target, bias=bias, **policy)
    expected = [logprob.detach(), loss.detach(), *torch.autograd.grad(logprob.sum() + loss, wide)]
    for found in run("three", dtensor_on_rank, leaves, target):
        for x, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(x, truth, rtol=1e-10, atol=1e-12)


def gathered_on_rank(group: Group, leaves: list[Tensor], target: Tensor) -> Tensor:
    """As under FSDP2: every rank has hidden states of its own."""
    weight: Any = distribute_tensor(leaves[1], init_device_mesh("cpu", (RANKS,)), [Shard(0)]).requires_grad_()
    own = slice(2 * group.rank(), 2 * group.rank() + 2)
    whole = weight.full_tensor(grad_placements=[Partial()])
    ck.linear_logprob(leaves[0][own], whole, target[own])[0].sum().backward()
    return weight.grad.full_tensor()


def test_a_gathered_dtensor_has_the_gradient_of_every_rank(run: Run) -> None:
    leaves, target, _ = logprob_case(1, ("three", [14]), 6, False, torch.float64)
    weight = leaves[1].clone().requires_grad_()
    linear_logprob_reference(leaves[0], weight, target)[0].sum().backward()
    for found in run("three", gathered_on_rank, leaves, target):
        torch.testing.assert_close(found, weight.grad, rtol=1e-10, atol=1e-12)


# --- bad input --------------------------------------------------------------------------------------------------------

X, W, I3 = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 1, 14])


def messages_on_rank(group: Group) -> dict[str, str]:
    """What each call raises; those that every rank refuses only after an exchange, too."""
    line, square = init_device_mesh("cpu", (RANKS,)), init_device_mesh("cpu", (RANKS, 1))
    pair = dist.new_group([0, 1])
    tokens = X[: 2 + (group.rank() == 1)]
    vectors: dict[str, Any] = {"advantage_T": X[:, 0], "old_logprob_T": None, "weight_T": X[:, 0]}
    on_line, on_square = (distribute_tensor(W, m, [Shard(0)] * m.ndim) for m in (line, square))
    calls: dict[str, Callable[[], Any]] = {
        "kind": lambda: ck.linear_logprob(X, W, I3, group="tp"),  # type: ignore[call-overload]
        "target": lambda: ck.linear_logprob(X, W, I3 + 1, group=group),
        "negative": lambda: ck.linear_logprob(X, W, I3 - 1, group=group),
        "tokens": lambda: ck.linear_logprob(tokens, W, I3[: len(tokens)], group=group),
        "order": lambda: ck.linear_logprob(X, W, I3.roll(group.rank()), group=group),
        "data of their own": lambda: ck.linear_policy_loss(X, on_line, I3 - group.rank(), **vectors, group=group),
        "top-k": lambda: ck.linear_logprob(X, W, I3, top_k=2, group=group),
        "top-p": lambda: ck.linear_policy_loss(X, W, I3, **vectors, top_p=0.5, group=group),
        "reference's rows": lambda: ck.linear_policy_loss(
            X, W, I3, **vectors, reference_hidden_TE=X, reference_weight_VE=torch.zeros(15, 4), group=group
        ),
        "width": lambda: ck.linear_logprob(X, W[:, :3], I3, group=group),
        "bias": lambda: ck.linear_logprob(X, W, I3, bias=torch.zeros(15), group=group),
        "replicated": lambda: ck.linear_logprob(X, distribute_tensor(W, line, [Replicate()]), I3, group=group),
        "columns": lambda: ck.linear_logprob(X, distribute_tensor(W, line, [Shard(1)]), I3, group=group),
        "two meshes": lambda: ck.linear_logprob(X, on_square, I3, group=group),
        "replicated bias": lambda: ck.linear_logprob(
            X, W, I3, bias=distribute_tensor(torch.zeros(5), line, [Replicate()]), group=group
        ),
        "no group": lambda: ck.linear_logprob(X, on_line, I3),
    }
    if group.rank() < 2:
        calls["other ranks"] = lambda: ck.linear_logprob(X, on_line, I3, group=pair)
    else:
        calls["stranger"] = lambda: ck.linear_logprob(X, W, I3, group=pair)
    found = {}
    for name, call in calls.items():
        with pytest.raises(ValueError) as error:  # noqa: PT011 - every text is checked below
            call()
        found[name] = str(error.value)
    return found


MESSAGES = {
    "kind": ["group = 'tp'", "torch.distributed.ProcessGroup"],
    "target": ["target_T holds 15", "[0, 15)"],
    "negative": ["target_T holds -1", "[0, 15)"],
    "tokens": ["target_T has [2, 3, 2] elements", "the same tokens on every rank"],
    "order": ["target_T has [3, 3, 3] elements", "the same tokens on every rank", "FSDP", "weight_VD.full_tensor()"],
    "data of their own": ["the same tokens on every rank", "FSDP", "weight_VD.full_tensor()"],
    "top-k": ["top_k = 2", "top_p = 1.0", "not with a group"],
    "top-p": ["top_k = 0", "top_p = 0.5", "not with a group"],
    "reference's rows": ["reference_weight_VE has shape (15, 4)", "(5, 4)", "weight_VD"],
    "width": ["weight_VD", "(5, 3)", "(5, 4)"],
    "bias": ["bias", "(15,)", "(5,)"],
    "replicated": ["weight_VD is a DTensor", "(Replicate(),)", "(Shard(dim=0),)", "[0, 1, 2]"],
    "columns": ["weight_VD is a DTensor", "(Shard(dim=1),)", "(Shard(dim=0),)"],
    "two meshes": ["weight_VD is a DTensor", "Shard(dim=0), ", "[[0], [1], [2]]", "(Shard(dim=0),)"],
    "replicated bias": ["bias is a DTensor", "(Replicate(),)", "(Shard(dim=0),)"],
    "no group": ["weight_VD is a DTensor", "weight_VD.full_tensor()", "grad_placements=[Partial()]"],
    "other ranks": ["weight_VD is a DTensor", "ranks [0, 1, 2]", "its ranks, [0, 1]"],
    "stranger": ["group = -100", "this process belongs to"],
}


def test_bad_calls_name_the_argument(run: Run) -> None:
    found = run("three", messages_on_rank)
    assert {name for texts in found for name in texts} == set(MESSAGES)
    for texts in found:
        for name, text in texts.items():
            assert all(part in text for part in MESSAGES[name]), (name, text)


# --- the example ------------------------------------------------------------------------------------------------------


def test_the_example_runs_under_torchrun(tmp_path: Path) -> None:
    (example,) = re.findall(r"```py\n(.*?)```", (ROOT / "kernels" / "README.md").read_text(), re.S)
    (tmp_path / "tensor_parallel.py").write_text(example)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "tensor_parallel.py"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
