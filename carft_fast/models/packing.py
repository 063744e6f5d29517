"""Packed batches: sequences laid end to end, never padded. Pure: no I/O, no device choice.

Shape suffixes: T all tokens of the batch, C its completion tokens, B its sequences, K the tokens of its CoTs: those of
the completions, each after the last tokens of its prompt that belong to the CoT (mostly none).

Worked example, two sequences with prompts (p) and completions (c):

    ids_T              p p p c c | p c c c
    position_T         0 1 2 3 4   0 1 2 3
    completion_cu      [0, 2, 5]
    read_index_C       [3, 4, 6, 7, 8]   the completion tokens themselves (pooling reads the state here)
    predict_index_C    [2, 3, 5, 6, 7]   one before: the state that chose them (log-prob, value, reward)

With a shared prompt, two completions of `p p p`: the prompt is there once, and both first tokens are predicted by its
last state.

    ids_T              p p p | c c | c c c
    position_T         0 1 2   3 4   3 4 5
    read_index_C       [3, 4, 5, 6, 7]
    predict_index_C    [2, 3, 2, 5, 6]

After an earlier forward that kept the states of `p p p`: its last token alone is laid again, for its state predicts the
first one.

    ids_T              p c c | p c c c
    position_T         2 3 4   2 3 4 5
    read_index_C       [1, 2, 4, 5, 6]
    predict_index_C    [0, 1, 3, 4, 5]
"""

import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carft_fast.core import to_device
from carft_fast.models.attention import PromptStates, Segments, take_rows


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """B sequences of prompt then completion, concatenated. Index tensors are int64 on the batch's device."""

    ids_T: Tensor
    position_T: Tensor
    segments: Segments
    completion_cu: Tensor
    read_index_C: Tensor
    predict_index_C: Tensor
    cot_cu: Tensor
    cot_index_K: Tensor

    @property
    def target_C(self) -> Tensor:
        return self.ids_T[self.read_index_C]

    def predicting(self, states_TD: Tensor) -> Tensor:
        """[C, D]: the state before each completion token; of a shared prompt the last one several times."""
        return take_rows(states_TD, self.predict_index_C)


def pack(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    device: torch.device,
    *,
    share_prompts: bool = False,
    keep_prompts: bool = False,
    after: PromptStates | None = None,
    prefix_lengths: Sequence[int] | None = None,
) -> PackedBatch:
    """Lay prompt and completion ids end to end. Every prompt needs a token: it is what predicts the first one.

    `prefix_lengths`: last tokens of each prompt that belong to the CoT, not with `after`; none when None.
    `share_prompts` lays a prompt that several sequences have only once. `keep_prompts` has the forward keep all
    prompts' states (`segments.keep`), and `after` goes on from such states: of a prompt only the last token is laid.
    All three need an attention that knows `Segments`.
    """
    assert after is None or not (keep_prompts or prefix_lengths)
    ids: list[int] = []
    position: list[int] = []
    read: list[int] = []
    predict: list[int] = []
    keys: list[int] = []
    kept: list[int] = []
    cots: list[int] = []
    kept_at: dict[tuple[int, ...], int] = {}
    first_key = after.tokens if after is not None else 0
    q_lengths: list[int] = []
    k_lengths: list[int] = []
    uses = Counter(map(tuple, prompts)) if share_prompts and after is None else Counter()
    shared_at: dict[tuple[int, ...], int] = {}

    def lay(tokens: Sequence[int], before: Iterable[int] = ()) -> int:
        """A segment of its own, after the keys `before`; returns its start."""
        seen = list(before)
        start = len(ids)
        ids.extend(tokens)
        position.extend(range(len(seen), len(seen) + len(tokens)))
        keys.extend([*seen, *range(first_key + start, first_key + len(ids))])
        q_lengths.append(len(tokens))
        k_lengths.append(len(seen) + len(tokens))
        return start

    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not prompt:
            raise ValueError(f"prompts[{row}] is empty: nothing would predict its first completion token")
        key = tuple(prompt)
        if uses[key] > 1 and completion:
            at = shared_at[key] if key in shared_at else shared_at.setdefault(key, lay(prompt))
            start = lay(completion, range(at, at + len(prompt)))
            predict += [at + len(prompt) - 1, *range(start, start + len(completion) - 1)]
        else:
            if after is None:
                at = lay([*prompt, *completion])
                start = at + len(prompt)
            else:
                seen = after.at[key]
                start = lay([prompt[-1], *completion], range(seen, seen + len(prompt) - 1)) + 1
            predict += range(start - 1, start + len(completion) - 1)
        if keep_prompts and key not in kept_at:
            kept_at[key] = len(kept)
            kept += range(at, at + len(prompt))
        read += range(start, start + len(completion))
        if prefix_lengths is not None:
            end = at + len(prompt)
            cots += [*range(end - prefix_lengths[row], end), *range(start, start + len(completion))]
    lengths = [len(completion) for completion in completions]
    columns = [ids, position, read, predict, _offsets(lengths), _offsets(q_lengths), _offsets(k_lengths), kept]
    indexed = bool(shared_at) or after is not None
    columns += [keys] * indexed
    if prefix_lengths is not None:
        columns += [_offsets([n + length for n, length in zip(prefix_lengths, lengths, strict=True)]), cots]
    shipped = _columns_on(columns, device)
    return PackedBatch(
        ids_T=shipped[0],
        position_T=shipped[1],
        segments=Segments(
            shipped[5].int(),
            shipped[6].int(),
            shipped[8] if indexed else None,
            tuple(q_lengths),
            tuple(k_lengths),
            before=after,
            keep=PromptStates(kept_at, len(kept)) if keep_prompts else None,
            keep_index=shipped[7],
        ),
        completion_cu=shipped[4],
        read_index_C=shipped[2],
        predict_index_C=shipped[3],
        cot_cu=shipped[4] if prefix_lengths is None else shipped[-2],
        cot_index_K=shipped[2] if prefix_lengths is None else shipped[-1],
    )


def _offsets(lengths: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def _columns_on(columns: Sequence[list[int]], device: torch.device) -> tuple[Tensor, ...]:
    """int64 tensors, by one copy."""
    host = torch.frombuffer(array("q", list(itertools.chain.from_iterable(columns))), dtype=torch.int64)
    return to_device(host, torch.int64, device).split([len(column) for column in columns])


def balanced_batches(
    tokens: Sequence[int], costs: Sequence[float], budget: int, *, multiple_of: int = 1
) -> list[list[int]]:
    """Items in as few batches of at most `budget` tokens as fit, their costs alike; a function of its arguments.

    Longest first, each into the cheapest batch with room. The number of batches is a multiple of `multiple_of`, so
    that rank r of R takes batches r, r + R, ... and all have as many; then some may be empty. An item above the
    budget raises ValueError.
    """
    if too_long := [n for n in tokens if n > budget]:
        raise ValueError(f"a sequence of {max(too_long)} tokens does not fit a micro-batch of {budget} tokens")
    order = sorted(range(len(tokens)), key=lambda i: (-costs[i], i))
    groups = -(-sum(tokens) // (budget * multiple_of))
    while True:
        batches: list[list[int]] = [[] for _ in range(max(groups, 1) * multiple_of)]
        room, load = [budget] * len(batches), [0.0] * len(batches)
        for i in order:
            fitting = [b for b in range(len(batches)) if room[b] >= tokens[i]]
            if not fitting:
                break
            best = min(fitting, key=lambda b: (load[b], b))
            batches[best].append(i)
            room[best] -= tokens[i]
            load[best] += costs[i]
        else:
            return [sorted(batch) for batch in batches]
        groups += 1


def sequence_mean_weights(batch: PackedBatch, sequences: int) -> Tensor:
    """float32 [C] loss weights for: mean over a sequence's completion tokens, then mean over `sequences` sequences.

    Divides by length_i * sequences; `sequences` counts the whole mini-batch, of which this may be a part.
    """
    lengths_B = batch.completion_cu.diff()
    return (1.0 / (lengths_B * sequences)).repeat_interleave(lengths_B, output_size=len(batch.read_index_C))
