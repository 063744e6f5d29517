"""What the processes of a run share. Without a process group there is one process, and nothing here communicates.

Only sampling, grading, forwards and backwards are divided; their results are gathered on every process. So all
processes compute whitening, metrics and every decision from the same numbers.
"""

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from carft_fast.core import errors

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process writes what a run writes once."""
    return rank() == 0


def join(device_type: str, timeout_s: float) -> None:
    """Join the processes that `torchrun` or `accelerate launch` started: gloo for CPU tensors, NCCL for those on GPUs.

    A collective that waits longer than `timeout_s` fails. Nothing happens in a process that was started alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or dist.is_initialized():
        return
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # else transformers leaves all weights but the first's empty
    backend, device = "gloo", None
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    # without `device_id` a barrier guesses the device from the rank
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), device_id=device)


def leave(exit_code: int = 0) -> NoReturn:
    """End a process that may have joined others, without finalizing Python's interpreter.

    FSDP2's meshes keep gloo's threads after `destroy_process_group`. Such a thread may free a tensor late. That aborts
    the process if the interpreter is being finalized (pytorch#190489).
    """
    if exit_code == 0 and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()  # after a failure it might wait for a process that is gone
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def each_rank(work: Callable[[], T]) -> list[T]:
    """Run `work` on every process. Each returns all results in rank order, or raises the first failure on any."""
    if world_size() == 1:
        return [work()]
    outcome = _attempt(work)
    outcomes: list[Any] = [None] * world_size()
    dist.all_gather_object(outcomes, _sendable(outcome))
    outcomes[rank()] = outcome
    return [_result(*found) for found in outcomes]


def on_main(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `work` on the main process alone. Every process returns its result, or raises its failure."""
    if world_size() == 1:
        return work()
    outcome = _attempt(work) if is_main() else None
    sent: list[Any] = [None if outcome is None else _sendable(outcome)]
    dist.broadcast_object_list(sent, src=0, group=group)
    return _result(*(outcome or sent[0]))


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _result(value: Any, error: Exception | None) -> Any:
    if error is not None:
        raise error
    return value


def _sendable(outcome: tuple[Any, Exception | None]) -> tuple[Any, Exception | None]:
    """Errors of other libraries may not pickle: they become their text."""
    value, error = outcome
    known = error is None or type(error).__module__ in (errors.__name__, "builtins")
    return value, error if known else RuntimeError(f"{type(error).__name__}: {error}")


def own_share(n: int) -> slice:
    """This process's contiguous part of n items; parts differ by at most one item."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def own_turns(items: Sequence[T]) -> Sequence[T]:
    """This process's items when the ranks take them in turn."""
    return items[rank() :: world_size()]


def gather_by_row(own: Tensor, dealt: Sequence[Sequence[int]], sizes: Sequence[int]) -> dict[int, Tensor]:
    """Every row's tensor from all processes, by row.

    `dealt`: groups of rows, which the ranks took in turn (`own_turns`). `own`: the results of this process's groups,
    concatenated; it may be empty. sizes[row]: a row's number of entries, so no size has to be exchanged.
    """
    size = world_size()
    by_rank = [[i for group in dealt[r::size] for i in group] for r in range(size)]
    counts = [sum(sizes[i] for i in rows) for rows in by_rank]
    pieces = [own] if size == 1 else _all_rows(own, counts).split(counts)
    return {
        i: x
        for rows, piece in zip(by_rank, pieces, strict=True)
        for i, x in zip(rows, piece.split([sizes[i] for i in rows]), strict=True)
    }


def gather_rows(
    x_BE: Tensor, counts: Sequence[int] | None, gradient: Literal["full", "local", "none"]
) -> tuple[Tensor, int]:
    """The rows of all processes in rank order, and the index of this process's first. A process may have none.

    `counts`: how many rows each process has, so that nothing is exchanged to find it; not read where there is one.
    "full": every row carries the sum of its gradients on all processes, which all have to take part in the backward
    pass. "local": only this process's rows carry gradient. "none": no row does.
    """
    if world_size() == 1:
        return (x_BE.detach() if gradient == "none" else x_BE), 0
    assert counts is not None
    assert counts[rank()] == len(x_BE)
    sizes = list(counts)
    start = sum(sizes[: rank()])
    if gradient == "full":
        return _GatherRows.apply(x_BE, sizes, start), start
    rows = _all_rows(x_BE.detach(), sizes)
    if gradient == "local":
        rows = torch.cat([rows[:start], x_BE, rows[start + len(x_BE) :]])
    return rows, start


def global_sum(x: Tensor) -> Tensor:
    """The sum over all processes; no gradient."""
    if world_size() == 1:
        return x.detach()
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def global_max(x: int) -> int:
    largest = torch.tensor(x)
    if world_size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def _all_rows(x_BE: Tensor, sizes: list[int]) -> Tensor:
    """Gathered at the largest size, since collectives want one shape."""
    padded = x_BE.new_zeros(max(sizes), *x_BE.shape[1:])
    padded[: len(x_BE)] = x_BE
    pieces = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(pieces, padded)
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BE: Tensor, sizes: list[int], start: int) -> Tensor:
        ctx.own = slice(start, start + len(x_BE))
        return _all_rows(x_BE, sizes)

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None]:
        total = d_rows.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.own], None, None
