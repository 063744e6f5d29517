"""How sequences go through the model: packed (the fast path) or padded (`model.impl = "padded"`)."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from carft_fast.config import Config
from carft_fast.core import chunks, gather_by_row
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
    """bool [P, completion tokens] on the device, for each sequence: what each of its P embeddings is pooled over. One
    embedding of the whole completion when None."""

    def pick(self, rows: Sequence[int]) -> "Rows":
        parts = None if self.parts is None else [self.parts[i] for i in rows]
        return Rows([self.prompts[i] for i in rows], [self.completions[i] for i in rows], parts)

    @property
    def pairs(self) -> Iterator[tuple[list[int], list[int]]]:
        """Prompt and completion of every sequence."""
        return zip(self.prompts, self.completions, strict=True)

    def pack(self, device: torch.device, **options: Any) -> PackedBatch:
        """`options` of `batch.pack`."""
        return pack(self.prompts, self.completions, device, **options)

    def pad(self, device: torch.device) -> padded.PaddedBatch:
        return padded.pad(self.prompts, self.completions, device)

    @property
    def lengths(self) -> list[int]:
        """Completion lengths (tokens)."""
        return [len(completion) for completion in self.completions]

    @property
    def shortest(self) -> int:
        """What a process without rows of its own computes, for nothing: what processes do together needs them all."""
        return min(range(len(self.prompts)), key=lambda i: len(self.prompts[i]) + len(self.completions[i]))


class Want(NamedTuple):
    """What a look shall find."""

    logprob: bool = False
    value: bool = False
    embedding: bool = False


class Forward(NamedTuple):
    """Sequences that have gone through the model's layers."""

    rows: Rows
    batch: Any
    """PackedBatch or PaddedBatch."""
    output: Any
    """ModelOutput or PlainOutput: last hidden states, with their graph or without."""
    prompts: PromptStates | None = None
    """Where they were to be kept."""


class Look(NamedTuple):
    """No-gradient results of some sequences: per token [C], and z [B, P, E] per sequence and part."""

    logprob_C: Tensor | None
    support_logprob_C: Tensor | None
    value_C: Tensor | None
    z_BPE: Tensor | None

    @property
    def nothing(self) -> "Look":
        """What a process without rows of its own found."""
        return Look(*(None if x is None else x[:0] for x in self))


def gathered(looks: Sequence[Look], rows: Rows, micros: Sequence[Sequence[int]]) -> Look:
    """What all processes found in their micro-batches, in the order of the rows."""
    found: list[Tensor | None] = []
    for own, sizes in zip(zip(*looks, strict=True), [*[rows.lengths] * 3, [1] * len(rows.prompts)], strict=True):
        tensors = [x for x in own if x is not None]
        by_row = gather_by_row(torch.cat(tensors), micros, sizes) if tensors else {}
        found.append(torch.cat([by_row[i] for i in sorted(by_row)]) if by_row else None)
    return Look(*found)


class Loss(NamedTuple):
    loss: Tensor
    logprob_C: Tensor
    """Without gradient."""
    metrics: dict[str, Tensor]
    z_BPE: Tensor | None


class Passes(Protocol):
    """How sequences go through the model."""

    goes_on: bool
    """Whether a forward can go on from prompts that an earlier one has kept."""

    def micro_batches(self, rows: Rows, multiple_of: int = 1) -> list[list[int]]:
        """Indices of the sequences that go through the model together. Their number is a multiple of `multiple_of`:
        processes take them in turn, and all have as many; some may be empty."""
        ...

    def cross_entropy(self, model: CarftModel, rows: Rows, total_tokens: int) -> Tensor:
        """Of the completion tokens, divided by `total_tokens`."""
        ...

    def forward(
        self,
        model: CarftModel,
        rows: Rows,
        *,
        need_logits: bool = True,
        keep_prompts: bool = False,
        after: PromptStates | None = None,
    ) -> Forward:
        """`keep_prompts` and `after`, where `goes_on`: see `batch.pack`."""
        ...

    def look(self, model: CarftModel, forward: Forward, want: Want) -> Look: ...

    def loss(
        self,
        model: CarftModel,
        forward: Forward,
        targets: RolloutTargets,
        normaliser: Normaliser,
        live: Sequence[bool],
        *,
        embedding: bool,
    ) -> Loss:
        """Rows that are not `live` count for nothing but the normaliser; with `embedding` z comes with gradient."""
        ...


class PackedPasses:
    """Sequences end to end; micro-batches filled to a token budget and balanced by their FLOPs."""

    def __init__(self, config: Config, micro_batch_tokens: int, cost: ModelCost, *, share_prompts: bool) -> None:
        self._config, self._cost, self._budget, self._share = config, cost, micro_batch_tokens, share_prompts
        self.goes_on = config.model.attention == "packed"

    def micro_batches(self, rows: Rows, multiple_of: int = 1) -> list[list[int]]:
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

    def cross_entropy(self, model: CarftModel, rows: Rows, total_tokens: int) -> Tensor:
        batch = rows.pack(model.device, share_prompts=self._share)
        return sft_loss(model, model(batch), batch, total_tokens)

    def forward(
        self,
        model: CarftModel,
        rows: Rows,
        *,
        need_logits: bool = True,
        keep_prompts: bool = False,
        after: PromptStates | None = None,
    ) -> Forward:
        batch = rows.pack(model.device, share_prompts=self._share, keep_prompts=keep_prompts, after=after)
        return Forward(rows, batch, model(batch, need_logits=need_logits), batch.segments.keep)

    @torch.no_grad()
    def look(self, model: CarftModel, forward: Forward, want: Want) -> Look:
        (rows, batch, output, _), sampling = forward, self._config.rollout
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
        return Look(
            logprob_C,
            support_logprob_C,
            model.value(output.hidden_TD[batch.predict_index_C]) if want.value else None,
            cot_embeddings(model, output.hidden_TD, batch, rows.parts) if want.embedding else None,
        )

    def loss(
        self,
        model: CarftModel,
        forward: Forward,
        targets: RolloutTargets,
        normaliser: Normaliser,
        live: Sequence[bool],
        *,
        embedding: bool,
    ) -> Loss:
        assert all(live), "rollouts without a gradient are in no micro-batch"
        (rows, batch, output, _), rl = forward, self._config.rl
        weight_C = normaliser.weights(batch, rl.loss_mean)
        temperature = self._config.rollout.temperature
        found = update_loss(model, output, batch, targets, rl, weight_C=weight_C, temperature=temperature)
        return Loss(*found, cot_embeddings(model, output.hidden_TD, batch, rows.parts) if embedding else None)


class PaddedPasses:
    """Rows in the order drawn, as many as fit the token budget, pads included."""

    goes_on = False

    def __init__(self, config: Config, micro_batch_tokens: int) -> None:
        self._config, self._budget = config, micro_batch_tokens

    def micro_batches(self, rows: Rows, multiple_of: int = 1) -> list[list[int]]:
        longest = max(map(len, rows.prompts), default=1) + max(map(len, rows.completions), default=1)
        size = min(max(1, self._budget // longest), max(1, -(-len(rows.prompts) // multiple_of)))
        batches = chunks(range(len(rows.prompts)), size)
        return [*batches, *([] for _ in range(-len(batches) % multiple_of))]

    def cross_entropy(self, model: CarftModel, rows: Rows, total_tokens: int) -> Tensor:
        return padded.sft_loss(model, rows.pad(model.device), total_tokens)

    def forward(
        self,
        model: CarftModel,
        rows: Rows,
        *,
        need_logits: bool = True,
        keep_prompts: bool = False,
        after: PromptStates | None = None,
    ) -> Forward:
        assert not keep_prompts, "see goes_on"
        batch = rows.pad(model.device)
        return Forward(rows, batch, padded.forward(model, batch))

    @torch.no_grad()
    def look(self, model: CarftModel, forward: Forward, want: Want) -> Look:
        rows, batch, output, _ = forward
        logprob_C = None
        if want.logprob:
            logprob_C = padded.logprobs(output, batch, self._config.rollout.temperature)[0][batch.predicted]
        return Look(
            logprob_C,
            logprob_C,
            model.value(output.hidden_BLD)[:, :-1][batch.predicted] if want.value else None,
            padded.embedding(model, output.hidden_BLD, batch, rows.parts) if want.embedding else None,
        )

    def loss(
        self,
        model: CarftModel,
        forward: Forward,
        targets: RolloutTargets,
        normaliser: Normaliser,
        live: Sequence[bool],
        *,
        embedding: bool,
    ) -> Loss:
        (rows, batch, output, _), config = forward, self._config
        live_B = torch.tensor(live, device=model.device)
        found = padded.update_loss(
            model, output, batch, targets, config.rl, normaliser, live_B, config.rollout.temperature
        )
        return Loss(*found, padded.embedding(model, output.hidden_BLD, batch, rows.parts) if embedding else None)


def build_passes(config: Config, model: CarftModel, micro_batch_tokens: int, *, share_prompts: bool = False) -> Passes:
    """By `model.impl`."""
    if config.model.impl == "padded":
        return PaddedPasses(config, micro_batch_tokens)
    return PackedPasses(config, micro_batch_tokens, ModelCost.of(model.lm), share_prompts=share_prompts)
