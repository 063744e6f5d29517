"""Rows of all processes, with or without the others' gradient. Without a process group there is one process."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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
