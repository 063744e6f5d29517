"""The LM head divided over processes: its matmuls, collectives, chunks and read-backs, and how it is registered."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

import carft_kernels as ck

from .ranks import Counted, Group, Run, cut, logprob_case
from .test_custom_ops import Recorded

IMPLEMENTATIONS = ["torch", "triton"]


# --- cost -------------------------------------------------------------------------------------------------------------


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
