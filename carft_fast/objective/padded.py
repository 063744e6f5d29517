"""The padded path, `model.impl = "padded"`: padded rows, float32 logits of every position, losses in plain torch.

What the published trainers compute, rows as wide as theirs (the longest prompt plus the longest completion of a
micro-batch), written to be read next to the paper. The fast path has to equal it, and is timed against it.

B rows, L their width (tokens), V vocabulary, D hidden, E embedding size, P parts of a completion. A quantity
[B, L - 1] belongs to tokens 1 to L - 1: column t is that of token t + 1, which the state at t predicts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from carft_fast.config import RlConfig
from carft_fast.core import to_device
from carft_fast.models import CarftModel
from carft_fast.objective.losses import Normaliser, RolloutTargets
from carft_kernels._policy_kernels import exp_less_linear


class PaddedBatch(NamedTuple):
    """Rows padded on the right: under causal attention no real token sees a pad, so no attention mask is needed."""

    ids_BL: Tensor
    completion_BL: Tensor
    """bool: tokens of the completion."""
    cot_BL: Tensor
    """bool: the same and those of its prefix."""

    @property
    def predicted(self) -> Tensor:
        """bool [B, L - 1]: columns that predict a completion token."""
        return self.completion_BL[:, 1:]

    def spread(self, per_token_C: Tensor) -> Tensor:
        """[B, L - 1] with a packed batch's completion tokens in their places, 0 elsewhere."""
        return torch.zeros_like(self.predicted, dtype=per_token_C.dtype).masked_scatter(self.predicted, per_token_C)


class PaddedOutput(NamedTuple):
    hidden_BLD: Tensor
    logits_BLV: Tensor


def pad(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    device: torch.device,
    prefix_lengths: Sequence[int] | None = None,
) -> PaddedBatch:
    """`prefix_lengths`: last tokens of each prompt that belong to the CoT; none when None."""
    width = max(map(len, prompts)) + max(map(len, completions))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    completion, cot = (torch.zeros_like(ids, dtype=torch.bool) for _ in range(2))
    for row, (p, c, n) in enumerate(zip(prompts, completions, prefix_lengths or [0] * len(prompts), strict=True)):
        ids[row, : len(p) + len(c)] = torch.tensor([*p, *c])
        completion[row, len(p) : len(p) + len(c)] = True
        cot[row, len(p) - n : len(p) + len(c)] = True
    masks = (to_device(mask, torch.bool, device) for mask in (completion, cot))
    return PaddedBatch(to_device(ids, torch.int64, device), *masks)


def forward(model: CarftModel, batch: PaddedBatch) -> PaddedOutput:
    with model.autocast():
        output = model.lm(input_ids=batch.ids_BL, use_cache=False, output_hidden_states=True)
    return PaddedOutput(output.hidden_states[-1], output.logits.float())


def logprobs(output: PaddedOutput, batch: PaddedBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs [B, L - 1] of the tokens that follow, and the full log-softmax [B, L - 1, V]."""
    logp_BLV = (output.logits_BLV[:, :-1] / temperature).log_softmax(-1)
    return logp_BLV.gather(-1, batch.ids_BL[:, 1:, None]).squeeze(-1), logp_BLV


def embedding(
    model: CarftModel, hidden_BLD: Tensor, batch: PaddedBatch, parts: Sequence[Tensor] | None = None
) -> Tensor:
    """z [B, P, E] of paper eq. 6 as it is printed: every state projected, then averaged with the softmax of the values.

    `parts`: for each row bool [P, its CoT's tokens], what the average is over; all of them when None. The z of an empty
    part means nothing.
    """
    part_BPL = batch.cot_BL[:, None]
    if parts is not None:
        part_BPL = torch.zeros_like(part_BPL.expand(-1, len(parts[0]), -1))
        for row, part_PC in enumerate(parts):
            part_BPL[row, :, batch.cot_BL[row]] = part_PC
    value_BPL = model.value(hidden_BLD)[:, None].masked_fill(~part_BPL, torch.finfo(torch.float32).min)
    return value_BPL.softmax(-1) @ model.embed(hidden_BLD)


def sft_loss(model: CarftModel, batch: PaddedBatch, total_tokens: int) -> Tensor:
    logprob_BL, _ = logprobs(forward(model, batch), batch)
    return -(logprob_BL * batch.predicted).sum() / total_tokens


def update_loss(
    model: CarftModel,
    output: PaddedOutput,
    batch: PaddedBatch,
    targets: RolloutTargets,
    config: RlConfig,
    normaliser: Normaliser,
    live_B: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, log-probs [C] (no gradient) and metrics of the same names as `losses.update_loss`.

    `live_B` is False for rows that the fast path leaves out; their metrics do not count here either.
    """
    mask_BL = batch.predicted
    spread = batch.spread
    logprob_BL, logp_BLV = logprobs(output, batch, temperature)
    lengths_B1 = mask_BL.sum(1, keepdim=True)
    per_row = {
        "sequence": normaliser.sequences * lengths_B1,
        "token": torch.full_like(lengths_B1, normaliser.tokens),
        "constant": torch.full_like(lengths_B1, normaliser.sequences * normaliser.max_new_tokens),
    }
    weight_BL = (mask_BL & live_B[:, None]) / per_row[config.loss_mean]

    old_BL = logprob_BL.detach() if targets.old_logprob_C is None else spread(targets.old_logprob_C)
    advantage_BL = spread(targets.advantage_C)
    log_ratio_BL = (logprob_BL - old_BL) * mask_BL
    if config.ratio == "sequence":
        log_ratio_BL = log_ratio_BL.sum(1, keepdim=True) / lengths_B1 * mask_BL
    ratio_BL = log_ratio_BL.exp()
    clipped_BL = ratio_BL.clamp(1 - config.clip_low, 1 + config.clip_high)
    if config.loss == "cispo":
        loss_BL = -advantage_BL * clipped_BL.detach() * logprob_BL
    else:
        loss_BL = torch.max(-advantage_BL * ratio_BL, -advantage_BL * clipped_BL)
    if config.dual_clip is not None:
        bounded_BL = torch.min(loss_BL, -advantage_BL * config.dual_clip)
        loss_BL = torch.where(advantage_BL < 0, bounded_BL, loss_BL)
    if targets.correction_C is not None:
        loss_BL = loss_BL * spread(targets.correction_C)
    if config.kl_loss_coef:
        assert targets.ref_logprob_C is not None
        difference_BL = (spread(targets.ref_logprob_C) - logprob_BL) * mask_BL
        kl_BL = 0.5 * difference_BL**2 if config.kl_estimate == "k2" else exp_less_linear(difference_BL)
        loss_BL = loss_BL + config.kl_loss_coef * kl_BL.clamp(max=config.kl_clamp or math.inf)
    policy = (weight_BL * loss_BL).sum()

    counted_BL = weight_BL != 0
    count = counted_BL.sum().clamp(min=1)
    with torch.no_grad():
        entropy_BL = torch.stack([-(logp_LV.exp() * logp_LV).sum(-1) for logp_LV in logp_BLV])
        outside_BL = (ratio_BL < 1 - config.clip_low) | (ratio_BL > 1 + config.clip_high)
        metrics = {
            "clip_fraction": (outside_BL & counted_BL).sum() / count,
            "approx_kl": (exp_less_linear(log_ratio_BL) * counted_BL).sum() / count,
            "entropy": (entropy_BL * counted_BL).sum() / count,
            "policy_loss": policy.detach(),
            "policy_tokens": counted_BL.sum(),
        }
    loss = policy
    if targets.old_value_C is not None and targets.return_C is not None:
        value_BL = model.value(output.hidden_BLD)[:, :-1]
        old_value_BL, return_BL = spread(targets.old_value_C), spread(targets.return_C)
        near_BL = value_BL.clamp(old_value_BL - config.value_clip, old_value_BL + config.value_clip)
        squared_BL = torch.max((value_BL - return_BL).square(), (near_BL - return_BL).square())
        value = 0.5 * (weight_BL * squared_BL).sum()
        loss = loss + config.value_coef * value
        moved_BL = ((value_BL - old_value_BL).abs() > config.value_clip) & mask_BL
        metrics |= {"value_loss": value.detach(), "value_clip_fraction": moved_BL.sum() / mask_BL.sum()}
    return loss, logprob_BL.detach()[mask_BL], metrics
