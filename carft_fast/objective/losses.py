"""The loss terms of both stages, each a call or two of carft_kernels. Pure. Suffixes as in `batch`; E: embedding."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from carft_fast.config import ContrastiveConfig, RlConfig, RolloutConfig
from carft_fast.core import gather_rows, global_sum
from carft_fast.models import CarftModel, ModelOutput, PackedBatch, sequence_mean_weights
from carft_kernels import (
    linear_logprob,
    linear_policy_loss,
    masked_infonce,
    policy_loss,
    token_logprob,
    value_loss,
    value_pool,
)
from carft_kernels._policy_kernels import token_kl


class RolloutTargets(NamedTuple):
    """What the update needs to know of the completion tokens it trains on; all float32 [C], without gradient.

    Absent is what a method does not use: log-probs to take the ratio against (it is 1 then), the factor of the policy
    term (see `correction_weights`), reference log-probs, old values and returns.
    """

    advantage_C: Tensor
    old_logprob_C: Tensor | None
    correction_C: Tensor | None
    ref_logprob_C: Tensor | None
    old_value_C: Tensor | None
    return_C: Tensor | None

    def of_rows(self, rows: Sequence[int], lengths: Sequence[int]) -> "RolloutTargets":
        """Those of some rollouts, whose completions have `lengths[row]` tokens."""
        return RolloutTargets._make(None if x is None else tokens_of(x, rows, lengths) for x in self)


def tokens_of(x_C: Tensor, rows: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """The tokens of some rollouts, end to end; all completions have `lengths`."""
    by_row = x_C.split(list(lengths))
    return torch.cat([by_row[i] for i in rows])


def completion_logprobs(model: CarftModel, output: ModelOutput, batch: PackedBatch, **sampling: Any) -> Tensor:
    """float32 [C]: log-prob of every completion token, from the state before it.

    `sampling`: temperature, top_k and top_p, as the operators take them.
    """
    if output.logits_CV is not None:
        return token_logprob(output.logits_CV, batch.target_C, **sampling)[0]
    return linear_logprob(*_head_inputs(model, output, batch), batch.target_C, **sampling)[0]


@torch.no_grad()
def sampler_support_logprobs(
    model: CarftModel,
    output: ModelOutput,
    batch: PackedBatch,
    logprob_C: Tensor,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
) -> Tensor:
    """float32 [C]: `logprob_C` of the distribution that top-k, then top-p leave of the model's own, renormalised.

    What a sampler reports is normalised over the tokens it kept. Against the full vocabulary's log-prob the ratio
    would carry the kept mass, which is no disagreement; so the trainer makes the same cut in its own distribution.
    The sampled token is always kept: it may fall out at the border by rounding.
    """
    if top_p >= 1 and not top_k:
        return logprob_C
    return completion_logprobs(model, output, batch, temperature=temperature, top_k=top_k, top_p=top_p)


def correction_weights(
    logprob_C: Tensor, sampled_logprob_C: Tensor, completion_cu: Tensor, config: RolloutConfig
) -> Tensor | None:
    """float32 [C] factors of the policy loss for tokens another policy sampled; None where neither `correction` nor
    `sequence_mask` is on. The two are multiplied; `completion_cu` [N + 1] has the completions' offsets.

    With r = exp(logprob - sampled log-prob), both on the sampler's support: "truncated" min(r, cap), "masked" r where
    floor <= r <= cap and 0 elsewhere. Carries no gradient. Source: truncated importance sampling, Yao et al. 2025
    ("Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"); masking as in IcePop, Ling team 2025.
    """
    log_ratio_C = logprob_C - sampled_logprob_C
    weight_C = None
    if config.correction == "truncated":
        weight_C = log_ratio_C.exp().clamp(max=config.correction_cap)
    elif config.correction == "masked":
        ratio_C = log_ratio_C.exp()
        keep_C = (ratio_C >= config.correction_floor) & (ratio_C <= config.correction_cap)
        weight_C = torch.where(keep_C, ratio_C, torch.zeros_like(ratio_C))
    if config.sequence_mask == "none":
        return weight_C
    weight_N = sequence_mask(log_ratio_C, completion_cu, config)
    of_sequence_C = weight_N.repeat_interleave(completion_cu.diff(), output_size=len(log_ratio_C))
    return of_sequence_C if weight_C is None else weight_C * of_sequence_C


def sequence_mask(log_ratio_C: Tensor, completion_cu: Tensor, config: RolloutConfig) -> Tensor:
    """float32 [N], one factor a completion, by the product R of its tokens' ratios r = exp(log ratio).

    `config.sequence_mask` "plain": 1 where sequence_mask_floor <= R <= sequence_mask_cap, else 0. "weighted": R there,
    else 0: sequence-level masked importance sampling (MIS), Liu, Li et al. 2025 ("When Speed Kills Stability"). Carries
    no gradient, and changes no denominator of the loss.
    """
    ratio_N = torch.segment_reduce(log_ratio_C, "sum", offsets=completion_cu).exp()
    keep_N = (ratio_N >= config.sequence_mask_floor) & (ratio_N <= config.sequence_mask_cap)
    return keep_N.float() if config.sequence_mask == "plain" else torch.where(keep_N, ratio_N, 0.0)


def sft_loss(model: CarftModel, output: ModelOutput, batch: PackedBatch, total_tokens: int) -> Tensor:
    """Cross-entropy of the completion tokens, divided by the completion tokens of the whole optimizer step."""
    return -completion_logprobs(model, output, batch).sum() / total_tokens


class Normaliser(NamedTuple):
    """What the token losses of a mini-batch are divided by; counts of the whole, whatever part is computed."""

    sequences: int
    tokens: int
    max_new_tokens: int

    def weights(self, batch: PackedBatch, how: str) -> Tensor:
        """float32 [C]: see `rl.loss_mean`."""
        if how == "sequence":
            return sequence_mean_weights(batch, self.sequences)
        total = self.tokens if how == "token" else self.sequences * self.max_new_tokens
        return torch.full((len(batch.read_index_C),), 1 / total, device=batch.ids_T.device)


def update_loss(
    model: CarftModel,
    output: ModelOutput,
    batch: PackedBatch,
    targets: RolloutTargets,
    config: RlConfig,
    *,
    weight_C: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """policy + kl_loss_coef * KL + value_coef * value -> loss, log-probs [C] (no gradient), metrics.

    `policy_tokens` among the metrics counts what clip_fraction, approx_kl and entropy are means over. `weight_C`
    carries every normaliser, so the losses of a mini-batch's parts add up to its own. `temperature` is the sampler's:
    the policy that is improved is the one that sampled. Source: paper eq. 5, ReFT; KL term: GRPO.
    """
    hidden_CD = batch.predicting(output.hidden_TD)
    terms: dict[str, Any] = {
        "weight_T": weight_C,
        "correction_T": targets.correction_C,
        "clip_low": config.clip_low,
        "clip_high": config.clip_high,
        "dual_clip": config.dual_clip,
        "loss": config.loss,
        "cu_seqlens": batch.completion_cu if config.ratio == "sequence" else None,
    }
    if output.logits_CV is not None:
        logprob_C, entropy_C = token_logprob(
            output.logits_CV, batch.target_C, temperature=temperature, with_entropy=True
        )
        old_C = logprob_C.detach() if targets.old_logprob_C is None else targets.old_logprob_C
        policy, metrics = policy_loss(logprob_C, old_C, targets.advantage_C, **terms)
        if config.kl_loss_coef:
            assert targets.ref_logprob_C is not None
            kl_C = token_kl(targets.ref_logprob_C - logprob_C, config.kl_estimate, config.kl_clamp)
            policy = policy + config.kl_loss_coef * (weight_C * kl_C).sum()
        counted_C = weight_C != 0
        assert entropy_C is not None
        metrics = {**metrics, "entropy": (entropy_C.detach() * counted_C).sum() / counted_C.sum().clamp(min=1)}
    else:
        policy, logprob_C, metrics = linear_policy_loss(
            hidden_CD.to(model.compute_dtype),
            model.head_weight_VD.to(model.compute_dtype),
            batch.target_C,
            advantage_T=targets.advantage_C,
            old_logprob_T=targets.old_logprob_C,
            ref_logprob_T=targets.ref_logprob_C,
            kl_coef=config.kl_loss_coef,
            kl_estimate=config.kl_estimate,
            kl_clamp=config.kl_clamp,
            temperature=temperature,
            **terms,
        )
    loss, metrics = policy, {**metrics, "policy_loss": policy.detach(), "policy_tokens": (weight_C != 0).sum()}
    if targets.old_value_C is not None and targets.return_C is not None:
        value, value_metrics = value_loss(
            model.value(hidden_CD),
            targets.old_value_C,
            targets.return_C,
            weight_T=weight_C,
            clip=config.value_clip,
        )
        loss = loss + config.value_coef * value
        metrics |= {"value_loss": value.detach(), "value_clip_fraction": value_metrics["clip_fraction"]}
    return loss, logprob_C.detach(), metrics


def cot_embeddings(
    model: CarftModel, hidden_TD: Tensor, batch: PackedBatch, parts: Sequence[Tensor] | None = None
) -> Tensor:
    """z [B, P, E] of paper eq. 6: states AT the CoT's tokens, weighted by the softmax of their values, projected.

    `parts`: for each sequence bool [P, its CoT's tokens], what is pooled; all of them (P = 1) when None. The z of an
    empty part means nothing. K: tokens of all CoTs.
    """
    hidden_KD = hidden_TD[batch.cot_index_K]
    value_K = model.value(hidden_KD)
    masks = [None] if parts is None else torch.cat(list(parts), 1)
    pooled = [value_pool(hidden_KD, value_K, batch.cot_cu, mask_T=mask)[0] for mask in masks]
    return model.embed(torch.stack(pooled, 1))


class ContrastTargets(NamedTuple):
    """What the contrastive loss needs to know of B rollouts beside their own embeddings z_2; no gradient.

    `z_1` [B, E]: of their annotated CoTs. The next three are the negative signal's: z [B, E] of the annotated tokens
    that the rollout has in common with it, whether a rollout is wrong and has such tokens, and whether it is wrong and
    has tokens beyond them.
    """

    z_1: Tensor
    correct_B: Tensor
    common: Tensor | None = None
    has_common_B: Tensor | None = None
    has_excluded_B: Tensor | None = None
    candidate_B: Tensor | None = None
    """Which rollouts are candidates of the positive signal; all when None."""
    counts: Sequence[int] | None = None
    """Rows of each process, where there are several."""


def contrastive_loss(z_2: Tensor, targets: ContrastTargets, config: ContrastiveConfig) -> Tensor:
    """The signals of `contrastive.mode`, weighed by `negative_weight` where there are both.

    z_2 [B, P, E] holds the rollouts' embeddings: whole, and for the negative signal common and excluded part, for
    "answer" the state before the answer phrase, last. A rollout that a signal is not about has no part in it; a signal
    about none is 0.
    """
    if config.mode == "answer":
        return positive_signal(z_2[:, -1], targets, config)
    if config.mode == "positive":
        return positive_signal(z_2[:, 0], targets, config)
    negative = negative_signal(z_2[:, 1], z_2[:, 2], targets, config)
    if config.mode == "negative":
        return negative
    positive = positive_signal(z_2[:, 0], targets, config)
    return (1 - config.negative_weight) * positive + config.negative_weight * negative


def positive_signal(z_2: Tensor, targets: ContrastTargets, config: ContrastiveConfig) -> Tensor:
    """Masked InfoNCE of paper eq. 7: a correct rollout's annotated CoT is drawn to it, away from all other rollouts.

    Mean over the correct rollouts; every candidate carries gradient. With `gradient` "published" candidates carry none
    and the loss is the SUM over all rollouts, wrong ones too, as soon as one is correct: the published code's training.
    Candidates and counts are those of all processes; the processes' losses add up to the whole.

    "answer" is the same of single states, without the rollouts that have none. Source: Hidden-Align, Wang et al. 2026
    (arXiv 2606.03234), who draw the states of correct rollouts to each other.
    """
    z_1, correct_B = targets.z_1, targets.correct_B
    candidate_ME, start = gather_rows(z_2, targets.counts, _GATHERED[config.gradient])
    settings: dict[str, Any] = {
        "positive_N": torch.arange(start, start + len(z_1), device=z_1.device),
        "temperature": config.temperature,
        "positive_clamp": config.positive_clamp,
    }
    if config.gradient != "published":
        if targets.candidate_B is not None:
            settings["candidate_mask"], _ = gather_rows(targets.candidate_B, targets.counts, "none")
        loss, _ = masked_infonce(z_1, candidate_ME, row_mask_N=correct_B, **settings)
        return _share(loss, correct_B)
    _, row_loss_B = masked_infonce(z_1, candidate_ME, **settings)
    cosine_B = torch.cosine_similarity(z_1, z_2).clamp(max=config.positive_clamp)
    pull_B = (cosine_B.detach() - cosine_B) / config.temperature  # 0, with the numerator's gradient
    return (row_loss_B + pull_B).sum() * (global_sum(correct_B.sum()) > 0)


def negative_signal(
    common_BE: Tensor, excluded_BE: Tensor, targets: ContrastTargets, config: ContrastiveConfig
) -> Tensor:
    """Paper eq. 8: what a wrong rollout has in common with its annotated CoT is drawn to the same tokens there, away
    from what wrong rollouts have beyond.

    Mean over wrong rollouts with a common part; the negatives are the excluded parts of all wrong rollouts, of all
    processes. With `gradient` "published" the negatives carry none. The processes' losses add up to the whole.
    """
    assert targets.common is not None
    assert targets.has_common_B is not None
    assert targets.has_excluded_B is not None
    n = len(common_BE)
    negative_ME, _ = gather_rows(excluded_BE, targets.counts, _GATHERED[config.gradient])
    is_negative_M, _ = gather_rows(targets.has_excluded_B, targets.counts, "none")
    own_BB = torch.eye(n, dtype=torch.bool, device=common_BE.device)
    loss, _ = masked_infonce(
        common_BE,
        torch.cat([targets.common, negative_ME]),
        row_mask_N=targets.has_common_B,
        candidate_mask=torch.cat([own_BB, is_negative_M.expand(n, -1)], 1),
        temperature=config.temperature,
        positive_clamp=config.positive_clamp,
    )
    return _share(loss, targets.has_common_B)


_GATHERED: dict[str, Any] = {"full": "full", "local": "local", "published": "none"}


def _share(mean: Tensor, counted_B: Tensor) -> Tensor:
    """A mean over the rows that count here -> this process's part of the mean over those of all processes."""
    count = counted_B.sum()
    return mean * (count / global_sum(count).clamp(min=1))


def _head_inputs(model: CarftModel, output: ModelOutput, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    hidden_CD = batch.predicting(output.hidden_TD)
    return hidden_CD.to(model.compute_dtype), model.head_weight_VD.to(model.compute_dtype)


def explained_variance(value_C: Tensor, return_C: Tensor) -> Tensor:
    """1 - var(return - value) / var(return); 0 when the returns do not vary."""
    variance = return_C.var(unbiased=False)
    return torch.where(
        variance > 0, 1 - (return_C - value_C).var(unbiased=False) / variance, torch.zeros_like(variance)
    )
