"""The annotated CoTs of a step: what they have in common with its rollouts, and the looks at them."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from carft_fast.core import world_size
from carft_fast.models import PromptStates
from carft_fast.objective.passes import Look, Passes, Rows, gathered
from carft_kernels import lcs_mask


def mark_common(rollouts: Rows, annotated: Rows, device: torch.device) -> tuple[Rows, Rows]:
    """Both with their parts: a rollout's are the whole, the tokens of a longest common subsequence of its completion
    and the annotated CoT, and the other tokens; an annotated CoT's are the whole and the same common tokens there.

    Completions only, each with its EOS. Source: paper section 3.4; the published code takes whole rows.
    """

    def packed(rows: Rows) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([token for completion in rows.completions for token in completion], device=device)
        return ids, torch.tensor([0, *itertools.accumulate(rows.lengths)], device=device)

    in_annotated, in_rollout = lcs_mask(*packed(annotated), *packed(rollouts))
    common = in_rollout.split(rollouts.lengths)
    return (
        rollouts._replace(parts=[torch.stack([torch.ones_like(c), c, ~c]) for c in common]),
        annotated._replace(parts=[torch.stack([torch.ones_like(c), c]) for c in in_annotated.split(annotated.lengths)]),
    )


class Annotated:
    """The annotated CoTs of a step, a question's once for all its samples, and the looks at them."""

    def __init__(self, rows: Rows) -> None:
        self._has_parts = rows.parts is not None
        samples: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for i, (prompt, cot) in enumerate(rows.pairs):
            samples.setdefault((tuple(prompt), tuple(cot)), []).append(i)
        self._samples = list(samples.values())
        self.unique = rows.pick([members[0] for members in self._samples])
        if rows.parts is not None:  # of one CoT the whole, then what each sample has in common with it
            most = max(map(len, self._samples))
            parts = []
            for members in self._samples:
                common = [rows.parts[i][1:] for i in members]
                padding = [torch.zeros_like(common[0])] * (most - len(members))
                parts.append(torch.cat([rows.parts[members[0]][:1], *common, *padding]))
            self.unique = self.unique._replace(parts=parts)
        self.turns: list[list[list[int]]] = []
        """Micro-batches of `unique`, dealt to the processes in turn; in a turn all have as many, some maybe empty."""
        self.looks: list[Look] = []
        """Of this process's micro-batches."""

    def follow(self, micros: Sequence[Sequence[int]], passes: Passes) -> None:
        """Each comes after the micro-batch that has the first rollout of its question."""
        of_rollout = {members[0]: k for k, members in enumerate(self._samples)}
        for turn in range(0, len(micros), world_size()):
            dealt = []
            for micro in micros[turn : turn + world_size()]:
                rows = [of_rollout[i] for i in micro if i in of_rollout]
                dealt.append([[rows[j] for j in batch] for batch in passes.micro_batches(self.unique.pick(rows))])
            most = max(map(len, dealt))
            self.turns.append([batches[k] if k < len(batches) else [] for k in range(most) for batches in dealt])

    def one_of(self, prompts: PromptStates) -> int:
        """A row with one of the prompts, for a process that has to look at some."""
        return next(k for k, prompt in enumerate(self.unique.prompts) if tuple(prompt) in prompts.at)

    def embeddings(self) -> tuple[Tensor, Tensor | None]:
        """Of every rollout's annotated CoT z_1 [N, E], and z of what the rollout has in common with it."""
        z_BPE = gathered(self.looks, self.unique, [micro for turn in self.turns for micro in turn]).z_BPE
        assert z_BPE is not None
        places = {i: (row, k) for row, members in enumerate(self._samples) for k, i in enumerate(members)}
        index_2N = torch.tensor([places[i] for i in range(len(places))], device=z_BPE.device).T
        return z_BPE[index_2N[0], 0], z_BPE[index_2N[0], 1 + index_2N[1]] if self._has_parts else None
