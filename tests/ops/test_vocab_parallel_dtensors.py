"""The LM head divided over processes, given DTensors; what is refused of DTensors, groups and shards, by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import carft_kernels as ck
from carft_kernels.linear_logprob import linear_logprob_reference
from carft_kernels.linear_policy_loss import linear_policy_loss_reference

from .ranks import RANKS, Counted, Group, Run, logprob_case

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
