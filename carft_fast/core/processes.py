"""What the processes of a run share. Without a process group there is one process, and nothing here communicates.

Every process knows the whole step: prompts are a function of (seed, step), completions and grades are exchanged, and
what the forwards find is gathered. So whitening, metrics and every decision are computed from the same numbers by
all, and only forwards, backwards and sampling are divided.
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
    """Join the processes that `torchrun` or `accelerate launch` started; a process started alone stays alone.

    Tensors on the CPU go by gloo, those on GPUs by NCCL. A collective that waits longer than `timeout_s` fails.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or dist.is_initialized():
        return
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # else transformers leaves all weights but the first's empty
    backend = "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def leave(exit_code: int = 0) -> NoReturn:
    """End a process that may have joined others, without taking Python's interpreter down.

    gloo's threads let go of a collective's tensors when they get to it, and FSDP2's meshes keep those threads beyond
    `destroy_process_group`: one that then needs an interpreter which is going down aborts the process, all its work
    done (pytorch#190489).
    """
    if exit_code == 0 and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()  # after a failure it might wait for a process that is gone
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def each_rank(work: Callable[[], T]) -> list[T]:
    """What `work` returned on every process, in rank order, on every process. A failure on any is raised on all."""
    if world_size() == 1:
        return [work()]
    outcome = _attempt(work)
    outcomes: list[Any] = [None] * world_size()
    dist.all_gather_object(outcomes, _sendable(outcome))
    outcomes[rank()] = outcome
    return [_result(*found) for found in outcomes]


def on_main(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What `work` returned on the main process, which alone runs it, on every process; so is its failure."""
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
    """Errors of other libraries may not survive the way: they become their text."""
    value, error = outcome
    known = error is None or type(error).__module__ in (errors.__name__, "builtins")
    return value, error if known else RuntimeError(f"{type(error).__name__}: {error}")


def own_share(n: int) -> slice:
    """This process's neighbours among n items; shares differ by one at most."""
    size, me = world_size(), rank()
    return slice(n * me // size, n * (me + 1) // size)


def own_turns(items: Sequence[T]) -> Sequence[T]:
    """This process's items when they are dealt out in turn."""
    return items[rank() :: world_size()]


def gather_by_row(own: Tensor, dealt: Sequence[Sequence[int]], sizes: Sequence[int]) -> dict[int, Tensor]:
    """Every row's tensor from all processes. `dealt` are groups of rows that the processes took in turn, `own` the
    results for this process's groups end to end (maybe none), sizes[row] a row's entries: so no size has to be asked.
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


def gather_rows(x_BE: Tensor, gradient: Literal["full", "local", "none"]) -> tuple[Tensor, int]:
    """The rows of all processes in rank order, and the place of the first own one. Processes may differ in rows, or
    have none.

    "full": gradient reaches every process's rows, summed over what all processes make of them; every process has to
    take part in the backward pass. "local": only the own rows carry gradient. "none": no row does.
    """
    if world_size() == 1:
        return (x_BE.detach() if gradient == "none" else x_BE), 0
    counts = [torch.zeros(1, dtype=torch.int64, device=x_BE.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(x_BE)], device=x_BE.device))
    sizes = [int(count) for count in counts]
    start = sum(sizes[: dist.get_rank()])
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
