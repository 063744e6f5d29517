"""How sequences go through the model: packed (the fast path) or padded (`model.impl = "padded"`).

B sequences, C their completion tokens, E embedding size, P parts of a completion that are embedded.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from carft_fast.config import Config
from carft_fast.core import chunks, gather_by_row, to_device
from carft_fast.models import CarftModel, ModelCost, PackedBatch, PromptStates, balanced_batches, pack
from carft_fast.objective import padded
from carft_fast.objective.losses import (
    Normaliser,
    RolloutTargets,
    completion_logprobs,
    cot_embeddings,
    sampler_support_logprobs,
    sft_loss,
    update_loss,
)


class Rows(NamedTuple):
    """Sequences as token ids on the host."""

    prompts: Sequence[list[int]]
    completions: Sequence[list[int]]
    parts: Sequence[Tensor] | None = None
    """bool [P, CoT tokens] on the device, for each sequence: what each of its P embeddings is pooled over. One, of the
    whole CoT, when None."""
    prefix_lengths: Sequence[int] | None = None
    """Last tokens of each prompt that belong to the CoT, though they were not sampled; none when None."""

    def pick(self, rows: Sequence[int]) -> "Rows":
        parts = None if self.parts is None else [self.parts[i] for i in rows]
        prefixes = None if self.prefix_lengths is None else [self.prefix_lengths[i] for i in rows]
        return Rows([self.prompts[i] for i in rows], [self.completions[i] for i in rows], parts, prefixes)

    def pick_or_shortest(self, rows: Sequence[int]) -> "Rows":
        return self.pick(rows or [self.shortest])

    @property
    def pairs(self) -> Iterator[tuple[list[int], list[int]]]:
        """Prompt and completion of every sequence."""
        return zip(self.prompts, self.completions, strict=True)

    @property
    def lengths(self) -> list[int]:
        """Completion lengths (tokens)."""
        return [len(completion) for completion in self.completions]

    @property
    def cots(self) -> Sequence[list[int]]:
        """The completions, each after its prefix."""
        if self.prefix_lengths is None:
            return self.completions
        return [p[len(p) - n :] + c for (p, c), n in zip(self.pairs, self.prefix_lengths, strict=True)]

    @property
    def shortest(self) -> int:
        """A process without rows computes this one for nothing: collectives need every process."""
        return min(range(len(self.prompts)), key=lambda i: len(self.prompts[i]) + len(self.completions[i]))


class Want(NamedTuple):
    """Which outputs a pass without gradient shall find."""

    logprob: bool = False
    value: bool = False
    embedding: bool = False


class Outputs(NamedTuple):
    """What a pass without gradient found; None for what was not wanted. `z` is float32 [B, P, E], the rest [C]."""

    logprob_C: Tensor | None = None
    support_logprob_C: Tensor | None = None
    """On the support the sampler drew from: see `sampler_support_logprobs`."""
    value_C: Tensor | None = None
    z: Tensor | None = None

    def of_no_rows(self) -> "Outputs":
        return Outputs(*(None if x is None else x[:0] for x in self))


class Forward:
    """Sequences that have gone through the model's layers.

    Neither tuple nor dataclass, in which FSDP2 would find the states: it takes a call's arguments that carry gradient
    for the start of that call, and would divide weights again whose backward has not run.
    """

    def __init__(self, batch: Any, output: Any, prompts: PromptStates | None = None) -> None:
        """`batch` and `output` are packed or padded; the last hidden states have a graph or none. `prompts`: where
        their states were to be kept."""
        self.batch, self.output, self.prompts = batch, output, prompts


class Loss(NamedTuple):
    loss: Tensor
    logprob_C: Tensor
    """Without gradient."""
    metrics: dict[str, Tensor]
    z: Tensor | None
    """[B, P, E] with gradient, where it was asked for."""


def gathered(own: Sequence[Outputs], rows: Rows, micros: Sequence[Sequence[int]]) -> Outputs:
    """What all processes found in their micro-batches, in the order of the rows."""
    found: list[Tensor | None] = []
    for parts, sizes in zip(zip(*own, strict=True), [*[rows.lengths] * 3, [1] * len(rows.prompts)], strict=True):
        tensors = [x for x in parts if x is not None]
        by_row = gather_by_row(torch.cat(tensors), micros, sizes) if tensors else {}
        found.append(torch.cat([by_row[i] for i in sorted(by_row)]) if by_row else None)
    return Outputs(*found)


class PackedPasses:
    """Sequences end to end; micro-batches filled to a token budget and balanced by their FLOPs.

    `cross_entropy`, `outputs` and `loss` take the model first: `model(passes.loss, ...)` gathers its weights around
    them.
    """

    def __init__(self, config: Config, micro_batch_tokens: int, cost: ModelCost, *, share_prompts: bool) -> None:
        self._config, self._cost, self._budget, self._share = config, cost, micro_batch_tokens, share_prompts
        self.reuses_prompts = config.model.attention == "packed"
        """Whether a forward can start from prompts whose states an earlier one kept."""

    def micro_batches(self, rows: Rows, multiple_of: int = 1) -> list[list[int]]:
        """Indices of the sequences that go through the model together. Their number is a multiple of `multiple_of`:
        processes take them in turn, and all have as many; some may be empty."""
        units = self._units(rows)
        lengths = [(len(p), len(c)) for p, c in rows.pairs]
        tokens = [lengths[unit[0]][0] + sum(lengths[i][1] for i in unit) for unit in units]
        costs = [sum(self._cost.sequence_flops(*lengths[i]) for i in unit) for unit in units]
        batches = balanced_batches(tokens, costs, self._budget, multiple_of=multiple_of)
        if multiple_of == 1:
            batches = [batch for batch in batches if batch]
        return [[i for unit in batch for i in units[unit]] for batch in batches]

    def _units(self, rows: Rows) -> list[list[int]]:
        """Sequences that share a prompt's forward, as many as fit a micro-batch; else each by itself."""
        if not self._share:
            return [[i] for i in range(len(rows.prompts))]
        units: list[list[int]] = []
        newest: dict[tuple[int, ...], tuple[list[int], int]] = {}
        for i, (prompt, completion) in enumerate(rows.pairs):
            unit, tokens = newest.get(tuple(prompt), ([], self._budget + 1))
            if tokens + len(completion) > self._budget:
                unit, tokens = [], len(prompt)
                units.append(unit)
            unit.append(i)
            newest[tuple(prompt)] = unit, tokens + len(completion)
        return units

    def _pack(self, model: CarftModel, rows: Rows, **options: Any) -> PackedBatch:
        options |= {"share_prompts": self._share, "prefix_lengths": rows.prefix_lengths}
        return pack(rows.prompts, rows.completions, model.device, **options)

    def cross_entropy(self, model: CarftModel, rows: Rows, total_tokens: int) -> Tensor:
        """Of the completion tokens, divided by `total_tokens`."""
        batch = self._pack(model, rows)
        return sft_loss(model, model.hidden_states(batch), batch, total_tokens)

    @torch.no_grad()
    def outputs(
        self,
        model: CarftModel,
        rows: Rows,
        want: Want,
        *,
        keep_graph: bool = False,
        keep_prompts: bool = False,
        after: PromptStates | None = None,
    ) -> tuple[Outputs, Forward]:
        """`keep_graph`: the forward can serve `loss`. `keep_prompts` and `after`: see `models.pack`."""
        sampling = self._config.rollout
        batch = self._pack(model, rows, keep_prompts=keep_prompts, after=after)
        with torch.set_grad_enabled(keep_graph):
            output = model.hidden_states(batch, need_logits=want.logprob or keep_graph)
        logprob_C = support_logprob_C = None
        if want.logprob:
            logprob_C = completion_logprobs(model, output, batch, temperature=sampling.temperature)
            support_logprob_C = sampler_support_logprobs(
                model,
                output,
                batch,
                logprob_C,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
            )
        value_C = model.value(batch.predicting(output.hidden_TD)) if want.value else None
        z = cot_embeddings(model, output.hidden_TD, batch, rows.parts) if want.embedding else None
        return Outputs(logprob_C, support_logprob_C, value_C, z), Forward(batch, output, batch.segments.keep)

    def loss(
        self,
        model: CarftModel,
        rows: Rows,
        targets: RolloutTargets,
        normaliser: Normaliser,
        live: Sequence[bool],
        *,
        embedding: bool,
        forward: Forward | None = None,
    ) -> Loss:
        """Rows that are not `live` count for nothing but the normaliser. With `embedding` z comes with gradient.
        `forward`: of these rows and with its graph, where there is one already."""
        assert all(live), "rollouts without a gradient are in no micro-batch"
        batch = self._pack(model, rows) if forward is None else forward.batch
        output = model.hidden_states(batch) if forward is None else forward.output
        rl, temperature = self._config.rl, self._config.rollout.temperature
        weight_C = normaliser.weights(batch, rl.loss_mean)
        found = update_loss(model, output, batch, targets, rl, weight_C=weight_C, temperature=temperature)
        return Loss(*found, cot_embeddings(model, output.hidden_TD, batch, rows.parts) if embedding else None)


class PaddedPasses:
    """The same for rows in the order drawn, as many as fit the token budget, pads included."""

    reuses_prompts = False

    def __init__(self, config: Config, micro_batch_tokens: int) -> None:
        self._config, self._budget = config, micro_batch_tokens

    def micro_batches(self, rows: Rows, multiple_of: int = 1) -> list[list[int]]:
        longest = max(map(len, rows.prompts), default=1) + max(map(len, rows.completions), default=1)
        size = min(max(1, self._budget // longest), max(1, -(-len(rows.prompts) // multiple_of)))
        batches = chunks(range(len(rows.prompts)), size)
        return [*batches, *([] for _ in range(-len(batches) % multiple_of))]

    def cross_entropy(self, model: CarftModel, rows: Rows, total_tokens: int) -> Tensor:
        return padded.sft_loss(model, padded.pad(rows.prompts, rows.completions, model.device), total_tokens)

    @torch.no_grad()
    def outputs(
        self,
        model: CarftModel,
        rows: Rows,
        want: Want,
        *,
        keep_graph: bool = False,
        keep_prompts: bool = False,
        after: PromptStates | None = None,
    ) -> tuple[Outputs, Forward]:
        assert not keep_graph
        assert not keep_prompts
        assert after is None
        batch = padded.pad(rows.prompts, rows.completions, model.device, rows.prefix_lengths)
        output = padded.forward(model, batch)
        logprob_C = value_C = z = None
        if want.logprob:
            logprob_C = padded.logprobs(output, batch, self._config.rollout.temperature)[0][batch.predicted]
        if want.value:
            value_C = model.value(output.hidden_BLD)[:, :-1][batch.predicted]
        if want.embedding:
            z = padded.embedding(model, output.hidden_BLD, batch, rows.parts)
        return Outputs(logprob_C, logprob_C, value_C, z), Forward(batch, output)

    def loss(
        self,
        model: CarftModel,
        rows: Rows,
        targets: RolloutTargets,
        normaliser: Normaliser,
        live: Sequence[bool],
        *,
        embedding: bool,
        forward: Forward | None = None,
    ) -> Loss:
        assert forward is None, "no graph is kept"
        config = self._config
        batch = padded.pad(rows.prompts, rows.completions, model.device, rows.prefix_lengths)
        output = padded.forward(model, batch)
        live_B = to_device(live, torch.bool, model.device)
        found = padded.update_loss(
            model, output, batch, targets, config.rl, normaliser, live_B, config.rollout.temperature
        )
        return Loss(*found, padded.embedding(model, output.hidden_BLD, batch, rows.parts) if embedding else None)


Passes = PackedPasses | PaddedPasses


def build_passes(config: Config, model: CarftModel, micro_batch_tokens: int, *, share_prompts: bool = False) -> Passes:
    """By `model.impl`."""
    if config.model.impl == "padded":
        return PaddedPasses(config, micro_batch_tokens)
    return PackedPasses(config, micro_batch_tokens, ModelCost.of(model.lm), share_prompts=share_prompts)
