"""The annotated CoTs of a step: what they have in common with its rollouts, and their embeddings."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from carft_fast.core import to_device, world_size
from carft_fast.models import PromptStates
from carft_fast.objective.passes import Outputs, Passes, Rows, gathered
from carft_kernels import lcs_mask


def mark_common(rollouts: Rows, annotated: Rows, device: torch.device) -> tuple[Rows, Rows]:
    """Both with their parts: a rollout's are the whole, the tokens of a longest common subsequence of its completion
    and the annotated CoT, and the other tokens; an annotated CoT's are the whole and the same common tokens there.

    CoTs only, each with its EOS. Source: paper section 3.4; the published code takes whole rows.
    """

    def packed(cots: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        ids = to_device([token for cot in cots for token in cot], torch.int64, device)
        return ids, torch.tensor([0, *itertools.accumulate(map(len, cots))])  # the host's: nothing has to be read back

    cots, texts = rollouts.cots, annotated.cots
    in_annotated, in_rollout = lcs_mask(*packed(texts), *packed(cots))
    common = in_rollout.split([len(cot) for cot in cots])
    there = in_annotated.split([len(text) for text in texts])
    return (
        rollouts._replace(parts=[torch.stack([torch.ones_like(c), c, ~c]) for c in common]),
        annotated._replace(parts=[torch.stack([torch.ones_like(c), c]) for c in there]),
    )


def mark_answers(
    rollouts: Rows, annotated: Rows, answers: Sequence[tuple[int | None, int | None]], device: torch.device
) -> tuple[Rows, Rows]:
    """Both with their parts: the whole CoT, and its last token before the answer phrase.

    `answers`: for each rollout, the index of the token with which the phrase begins in its CoT, and in its annotated
    CoT. Where one of the two has no phrase, or nothing before it, both second parts are empty.
    """

    def with_parts(rows: Rows, at: Sequence[int | None]) -> Rows:
        starts = [0, *itertools.accumulate(map(len, rows.cots))]
        before = torch.zeros(starts[-1], dtype=torch.bool)
        before[[start + i - 1 for start, i in zip(starts, at, strict=False) if i is not None]] = True
        own = to_device(before, torch.bool, device).split([len(cot) for cot in rows.cots])
        return rows._replace(parts=[torch.stack([torch.ones_like(x), x]) for x in own])

    both = [pair if all(pair) else (None, None) for pair in answers]
    return with_parts(rollouts, [i for i, _ in both]), with_parts(annotated, [i for _, i in both])


class Annotated:
    """The annotated CoTs of a step, each once for all samples of its question."""

    def __init__(self, rows: Rows) -> None:
        """`rows`: the annotated CoT of every rollout."""
        self._has_parts = rows.parts is not None
        samples: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for i, (prompt, cot) in enumerate(rows.pairs):
            samples.setdefault((tuple(prompt), tuple(cot)), []).append(i)
        self._samples = list(samples.values())
        self.rows = rows.pick([members[0] for members in self._samples])
        if rows.parts is not None:  # of one CoT the whole, then what each sample has in common with it
            most = max(map(len, self._samples))
            parts = []
            for members in self._samples:
                common = [rows.parts[i][1:] for i in members]
                padding = [torch.zeros_like(common[0])] * (most - len(members))
                parts.append(torch.cat([rows.parts[members[0]][:1], *common, *padding]))
            self.rows = self.rows._replace(parts=parts)

    def micro_batches_after(self, micros: Sequence[Sequence[int]], passes: Passes) -> list[list[list[int]]]:
        """For each turn of the processes over the rollouts' `micros`, the micro-batches of `rows` that follow it.

        A CoT follows the micro-batch with the first rollout of its question, whose prompt states it goes on from. The
        processes take a turn's micro-batches in turn, as many each; some may be empty.
        """
        of_rollout = {members[0]: k for k, members in enumerate(self._samples)}
        turns = []
        for start in range(0, len(micros), world_size()):
            dealt = []
            for micro in micros[start : start + world_size()]:
                rows = [of_rollout[i] for i in micro if i in of_rollout]
                dealt.append([[rows[j] for j in batch] for batch in passes.micro_batches(self.rows.pick(rows))])
            most = max(map(len, dealt))
            turns.append([batches[k] if k < len(batches) else [] for k in range(most) for batches in dealt])
        return turns

    def one_of(self, prompts: PromptStates) -> int:
        """A row with one of the prompts, for a process whose micro-batch is empty."""
        return next(k for k, prompt in enumerate(self.rows.prompts) if tuple(prompt) in prompts.at)

    def embeddings(self, own: Sequence[Outputs], micros: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """For every rollout z_1 [N, E], and z [N, E] of the second part of its annotated CoT (None without parts),
        from this process's outputs for its share of `micros`."""
        z = gathered(own, self.rows, micros).z
        assert z is not None
        places = {i: (row, k) for row, members in enumerate(self._samples) for k, i in enumerate(members)}
        row_N, sample_N = to_device([places[i] for i in range(len(places))], torch.int64, z.device).T
        return z[row_N, 0], z[row_N, 1 + sample_N] if self._has_parts else None
