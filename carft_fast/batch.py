"""Packed batches: sequences laid end to end, never padded. Pure: no I/O, no device choice.

Shape suffixes: T all tokens of the batch, C its completion tokens, B its sequences.

Worked example, two sequences with prompts (p) and completions (c):

    ids_T              p p p c c | p c c c
    position           0 1 2 3 4   5 6 7 8
    cu_seqlens         [0, 5, 9]
    completion_cu      [0, 2, 5]
    read_index_C       [3, 4, 6, 7, 8]   the completion tokens themselves (pooling reads the state here)
    predict_index_C    [2, 3, 5, 6, 7]   one before: the state that chose them (log-prob, value, reward)
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """B sequences of prompt then completion, concatenated. Index tensors are int64 on the batch's device."""

    ids_T: Tensor
    cu_seqlens: Tensor
    completion_cu: Tensor
    read_index_C: Tensor
    lengths: tuple[int, ...]

    @property
    def predict_index_C(self) -> Tensor:
        return self.read_index_C - 1

    @property
    def target_C(self) -> Tensor:
        return self.ids_T[self.read_index_C]


def pack(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], device: torch.device) -> PackedBatch:
    """Lay prompt and completion ids end to end. Every prompt needs a token: it is what predicts the first one."""
    ids: list[int] = []
    read_index: list[int] = []
    cu_seqlens, completion_cu = [0], [0]
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not prompt:
            raise ValueError(f"prompts[{row}] is empty: nothing would predict its first completion token")
        start = len(ids) + len(prompt)
        ids += [*prompt, *completion]
        read_index += range(start, len(ids))
        cu_seqlens.append(len(ids))
        completion_cu.append(len(read_index))
    return PackedBatch(
        ids_T=torch.tensor(ids, dtype=torch.int64, device=device),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int64, device=device),
        completion_cu=torch.tensor(completion_cu, dtype=torch.int64, device=device),
        read_index_C=torch.tensor(read_index, dtype=torch.int64, device=device),
        lengths=tuple(end - start for start, end in itertools.pairwise(cu_seqlens)),
    )


def sequence_mean_weights(completion_cu: Tensor, sequences: int) -> Tensor:
    """Per-token loss weights for: mean over a sequence's completion tokens, then mean over `sequences` sequences.

    Divides by length_i * sequences; `sequences` counts the whole mini-batch, of which this may be a part.
    """
    lengths_B = completion_cu.diff()
    return (1.0 / (lengths_B * sequences)).repeat_interleave(lengths_B)


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for one draw, a function of the run's seed and of what is drawn (stage, step, purpose)."""
    digest = hashlib.blake2b(repr((seed, *names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def permutation(n: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def epoch_rows(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Rows of step `step` when every epoch visits each of n rows once in its own order; a step may span epochs."""
    first, last = step * batch_size, (step + 1) * batch_size
    orders = {
        epoch: permutation(n, derive_seed(seed, "epoch", epoch)) for epoch in range(first // n, (last - 1) // n + 1)
    }
    return [orders[k // n][k % n] for k in range(first, last)]


def chunks(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]
