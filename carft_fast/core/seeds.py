"""Every draw of a run as a function of its seed: which rows a step takes, in which order, with what noise."""

import hashlib
from collections.abc import Sequence

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for one draw, a function of the run's seed and of what is drawn (stage, step, purpose)."""
    digest = hashlib.blake2b(repr((seed, *names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def permutation(n: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def epoch_rows(n: int, batch_size: int, step: int, seed: int) -> list[tuple[int, int]]:
    """(row, epoch) of step `step` when every epoch visits each of n rows once in its own order; a step may span
    epochs."""
    first, last = step * batch_size, (step + 1) * batch_size
    orders = {
        epoch: permutation(n, derive_seed(seed, "epoch", epoch)) for epoch in range(first // n, (last - 1) // n + 1)
    }
    return [(orders[k // n][k % n], k // n) for k in range(first, last)]


def chunks(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]
