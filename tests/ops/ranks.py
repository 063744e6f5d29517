"""An LM head divided over three processes (gloo): cases, what a rank computes, and the whole vocabulary in float64."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import carft_kernels as ck
from carft_kernels.linear_policy_loss import linear_policy_loss_reference
from tests.processes import FORKS

from .checks import policy_inputs, randn
from .conftest import LargestTensor

RANKS = 3
# ranks of the world that make a group: rank 0 of the second is rank 1 of the world
GROUPS = {"three": [0, 1, 2], "two": [1, 2], "one": [0]}
Group = dist.ProcessGroup
Run = Callable[..., list[Any]]


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


@contextmanager
def ranks(folder: str) -> Iterator[Run]:
    """run(group, function, *arguments): what function(group, *arguments) returns on each rank of the group."""
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


def logprob_case(seed: int, where: tuple[str, list[int]], tokens: int, bias: bool, dtype: torch.dtype) -> Any:
    vocabulary = sum(where[1])
    leaves = [randn(seed, tokens, 8), randn(seed + 1, vocabulary, 8, scale=0.6)]
    leaves += [randn(seed + 2, vocabulary)] * bias
    target = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    return [x.to(dtype) for x in leaves], target, randn(seed + 3, 3, tokens).to(dtype)


def policy_case(
    seed: int, where: tuple[str, list[int]], tokens: int, bias: bool, correction: bool, dtype: torch.dtype
) -> tuple[list[Tensor], dict[str, Any]]:
    vocabulary = sum(where[1])
    inputs = {name: x.cpu() for name, x in policy_inputs(seed, tokens, vocabulary, 8).items()}
    leaves = [inputs.pop("hidden_TD"), inputs.pop("weight_VD")] + [randn(seed + 9, vocabulary)] * bias
    if correction:
        inputs["correction_T"] = randn(seed + 8, tokens).abs() * (torch.arange(tokens) % 5 > 0)
    return [x.to(dtype) for x in leaves], {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


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


# --- the whole vocabulary, in one process -----------------------------------------------------------------------------


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


# --- what it sends ----------------------------------------------------------------------------------------------------


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
