"""Clipped policy loss from hidden states, with its gradients computed in the forward pass.

    logprob_t = log softmax(hidden_t weight^T / temperature)[target_t],  r_t = exp(logprob_t - old_logprob_t)
    loss = sum_t weight_t (max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high))
                           + kl_coef (exp(d_t) - d_t - 1) - entropy_coef H_t),   d_t = ref_logprob_t - logprob_t

Source: paper eq. 5 (PPO); the KL term is the k3 estimator of GRPO. Since the loss is a plain sum, each chunk of tokens
can be differentiated as soon as its logits exist: one matmul for them, one for d_hidden, one for d_weight, 3F in all (F
= 2 T V D) and no recomputation. So a token's loss may depend on its own logits alone. Ratios of whole sequences (GSPO)
take all log-probs first: they are `linear_logprob`, then `policy_loss`, 4F. Tokens whose gradient is exactly zero (no
weight, no advantage, clipped) are left out of the last two; their number is read back once a chunk, unless `skip_dead`
is False. Kept for backward: d_hidden, d_weight and d_bias, the latter two in float32. Accumulation: float32 past the
matmul and for d_weight (float64 for float64 input). The loop over chunks is in `_head.py`.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from carft_kernels._head import Head, Needs, Parts, checked_head, over_chunks
from carft_kernels._policy_kernels import (
    KlEstimate,
    PolicyLoss,
    TokenTerms,
    TokenVectors,
    policy_terms,
    policy_terms_reference,
    sequence_log_ratio_reference,
    token_kl,
)
from carft_kernels._row_kernels import RowGradients, RowOptions, RowStatistics, logprob_reference
from carft_kernels._runtime import (
    Impl,
    accumulation_dtype,
    check_finite,
    check_float,
    check_like,
    check_rows,
    check_same_dtype,
    check_targets,
    define_operator,
    log_implementation,
    scaled_gradient,
    unflatten,
    use_triton,
)
from carft_kernels.linear_logprob import logprob_of_head
from carft_kernels.policy_loss import policy_loss


def linear_policy_loss_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    advantage_T: Tensor,
    old_logprob_T: Tensor | None,
    weight_T: Tensor,
    bias: Tensor | None = None,
    correction_T: Tensor | None = None,
    ref_logprob_T: Tensor | None = None,
    reference_hidden_TE: Tensor | None = None,
    reference_weight_VE: Tensor | None = None,
    reference_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    entropy_coef: float = 0.0,
    z_loss_coef: float = 0.0,
    logit_softcap: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    **terms: Any,
) -> tuple[Tensor, Tensor]:
    """The obvious expression: loss and log-probs [T], all logits at once. `terms`: other fields of TokenTerms."""
    counted_T = target_T != ignore_index
    weight_T = torch.where(counted_T, weight_T, 0.0)
    logits_TV = torch.nn.functional.linear(torch.where(counted_T[:, None], hidden_TD, 0.0), weight_VD, bias)
    options = RowOptions(temperature, logit_softcap, top_k, top_p, ignore_index, via_triton=False)
    logprob_T, entropy_T, logits_TV = logprob_reference(logits_TV, target_T, options)
    if reference_hidden_TE is not None:
        head = (weight_VD, bias) if reference_weight_VE is None else (reference_weight_VE, reference_bias)
        hidden_TE = torch.where(counted_T[:, None], reference_hidden_TE, 0.0)
        with torch.no_grad():
            ref_logprob_T = logprob_reference(torch.nn.functional.linear(hidden_TE, *head), target_T, options)[0]
    old_logprob_T = logprob_T.detach() if old_logprob_T is None else old_logprob_T
    log_ratio_T = logprob_T - old_logprob_T
    if cu_seqlens is not None:
        log_ratio_T = sequence_log_ratio_reference(log_ratio_T, weight_T, cu_seqlens)
    loss_T = policy_terms_reference(
        logprob_T,
        old_logprob_T,
        advantage_T,
        TokenTerms(**terms),
        correction_T=correction_T,
        ref_logprob_T=ref_logprob_T,
        log_ratio_T=log_ratio_T,
    )
    loss_T = loss_T - entropy_coef * entropy_T + z_loss_coef * logits_TV.logsumexp(-1).square()
    return (weight_T * loss_T).sum(), logprob_T


class _More(NamedTuple):
    z_loss_coef: float
    skip_dead: bool


_ARGUMENTS = Head, TokenVectors, TokenTerms, RowOptions, Parts, _More, Needs


def _loss_and_gradients(
    head: Head, vectors: TokenVectors, terms: TokenTerms, options: RowOptions, parts: Parts, more: _More, needs: Needs
) -> tuple[Tensor, ...]:
    """Loss, log-probs, the sums [5] of policy_terms, d_hidden, d_weight and d_bias (empty where not needed).

    The last two in the accumulation dtype: the backward pass casts them as it scales them, so d_weight is read once.
    """
    hidden_TD, weight_VD, _, target_T = head
    log_implementation("linear_policy_loss", options.via_triton, hidden_TD.device.type)
    if parts.group is None:
        check_targets("target_T", target_T, weight_VD.shape[0], options.ignore_index)
    logprob_T = hidden_TD.new_empty(len(target_T), dtype=accumulation_dtype(hidden_TD))
    stats = logprob_T.new_zeros(5)
    vectors = vectors._replace(weight_T=vectors.weight_T.masked_fill(target_T == options.ignore_index, 0.0))

    def differentiate(rows: slice, statistics: RowStatistics) -> tuple[RowGradients, Tensor]:
        of_chunk = vectors.at(rows)
        weight, logprob, entropy = of_chunk.weight_T, statistics.logprob_T, statistics.entropy_T
        logprob_T[rows] = logprob
        d_logprob = policy_terms(logprob, of_chunk, stats, terms, entropy, via_triton=options.via_triton)
        d_entropy = -terms.entropy_coef * weight if terms.entropy_coef else None
        d_lse = None
        if more.z_loss_coef:
            lse = torch.where(weight != 0, statistics.lse(options), 0.0)
            stats[0] += more.z_loss_coef * (weight * lse.square()).sum()
            d_lse = 2 * more.z_loss_coef * weight * lse
        live = weight != 0 if terms.entropy_coef or more.z_loss_coef else d_logprob != 0
        return RowGradients(d_logprob, d_entropy, d_lse), live

    gradients = over_chunks(head, options, parts, differentiate, needs, with_entropy=True, skip_dead=more.skip_dead)
    return stats[0].clone(), logprob_T, stats, *gradients


def _fake(head: Head, *rest: Any) -> tuple[Tensor, ...]:
    dtype, needs = accumulation_dtype(head.hidden_TD), rest[-1]
    sizes: tuple[Any, ...] = ((), head.hidden_TD.shape[0], 5)
    return *(head.hidden_TD.new_empty(size, dtype=dtype) for size in sizes), *needs.empty(head, dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, logprob_T, stats, *gradients = output
    head, *_, ctx.needs = unflatten(_ARGUMENTS, inputs)
    ctx.dtype, ctx.others = head.hidden_TD.dtype, len(inputs) - 3
    ctx.set_materialize_grads(False)  # no zeros of the head's size for the outputs that carry no gradient
    ctx.mark_non_differentiable(logprob_T, stats, *gradients)
    ctx.save_for_backward(*gradients)


def _autograd(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = [
        None if d_loss is None or not needed else scaled_gradient(gradient, d_loss, ctx.dtype)
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    ]
    return *gradients, *([None] * ctx.others)


_RETURNS = f"({', '.join(['Tensor'] * 6)})"
# the number of tokens with a gradient is read back, which no CUDA graph can hold
_forward = define_operator(
    *("linear_policy_loss", _ARGUMENTS, _RETURNS, _loss_and_gradients, _fake), tags=(torch.Tag.cudagraph_unsafe,)
)
_forward_of_all = define_operator("linear_policy_loss_of_all", _ARGUMENTS, _RETURNS, _loss_and_gradients, _fake)
for _operator in (_forward, _forward_of_all):
    _operator.register_autograd(_autograd, setup_context=_setup_context)


def _of_sequences(
    head: Head,
    vectors: TokenVectors,
    terms: TokenTerms,
    options: RowOptions,
    parts: Parts,
    z_loss_coef: float,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, log-probs and metrics, with a ratio for each sequence. Autograd differentiates it."""
    logprob_T, entropy_T, lse_T = logprob_of_head(head, options, parts, with_entropy=True, with_lse=z_loss_coef > 0)
    advantage_T, old_logprob_T, weight_T, correction_T, ref_logprob_T = vectors
    weight_T = weight_T.masked_fill(head.target_T == options.ignore_index, 0.0)
    live_T = weight_T != 0
    total, metrics = policy_loss(
        logprob_T,
        logprob_T.detach() if old_logprob_T is None else old_logprob_T,
        advantage_T,
        weight_T=weight_T,
        clip_low=terms.clip_low,
        clip_high=terms.clip_high,
        dual_clip=terms.dual_clip,
        correction_T=correction_T,
        cu_seqlens=cu_seqlens,
        impl="triton" if options.via_triton else "torch",
    )
    if terms.kl_coef:
        assert ref_logprob_T is not None
        difference_T = torch.where(live_T, ref_logprob_T - logprob_T, 0.0)
        kl_T = token_kl(difference_T, terms.kl_estimate, terms.kl_clamp)
        total = total + terms.kl_coef * (weight_T * kl_T).sum()
    if terms.entropy_coef:
        total = total - terms.entropy_coef * (weight_T * torch.where(live_T, entropy_T, 0.0)).sum()
    if z_loss_coef:
        total = total + z_loss_coef * (weight_T * torch.where(live_T, lse_T, 0.0).square()).sum()
    metrics["entropy"] = torch.where(live_T, entropy_T.detach(), 0.0).sum() / live_T.sum().clamp(min=1)
    return total, logprob_T.detach(), metrics


def _reference_head(
    hidden_TE: Tensor,
    weight_VE: Tensor | None,
    bias: Tensor | None,
    policy: Head,
    parts: Parts,
    options: RowOptions,
    chunk_tokens: int | None,
    group: dist.ProcessGroup | None,
) -> Head:
    """As it takes part; without a weight it has the policy's and its bias. Raises ValueError."""
    name = "reference_hidden_TE"
    check_float(name, hidden_TE, 2)
    width = policy.hidden_TD.shape[1] if weight_VE is None else hidden_TE.shape[1]
    check_like(name, hidden_TE, (len(policy.hidden_TD), width), "hidden_TD", policy.hidden_TD)
    check_same_dtype(name, hidden_TE, "hidden_TD", policy.hidden_TD)
    if (bias is None) == (weight_VE is not None and policy.bias is not None):
        seen = f"None: expected ({parts.shard_rows},)" if bias is None else "a tensor: expected None"
        raise ValueError(f"reference_bias is {seen}; it goes with both reference_weight_VE and bias")
    if weight_VE is None:
        if options.via_triton:
            check_rows(name, hidden_TE)
        return policy._replace(hidden_TD=hidden_TE)
    names = name, "reference_weight_VE", "reference_bias"
    given = Head(hidden_TE, weight_VE, bias, policy.target_T)
    found, of_reference = checked_head(given, options, chunk_tokens, group, names)
    if of_reference.shard_rows != parts.shard_rows:
        raise ValueError(
            f"reference_weight_VE has shape ({of_reference.shard_rows}, {width}): expected ({parts.shard_rows}, "
            f"{width}), to go with weight_VD"
        )
    return found


def linear_policy_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    advantage_T: Tensor,
    old_logprob_T: Tensor | None,
    weight_T: Tensor,
    bias: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    loss: PolicyLoss = "clip",
    correction_T: Tensor | None = None,
    ref_logprob_T: Tensor | None = None,
    reference_hidden_TE: Tensor | None = None,
    reference_weight_VE: Tensor | None = None,
    reference_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimate: KlEstimate = "k3",
    kl_clamp: float | None = None,
    entropy_coef: float = 0.0,
    z_loss_coef: float = 0.0,
    logit_softcap: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    skip_dead: bool = True,
    group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """PPO / GRPO policy loss from hidden states, without holding [T, V] logits.

    Equivalent: `logprob = (hidden @ weight.T / temperature).float().log_softmax(-1).gather(1, target[:, None])[:, 0]`;
    `r = (logprob - old_logprob).exp()`; `loss = (weight_T * (torch.max(-A * r, -A * r.clamp(1 - clip_low,
    1 + clip_high)) + kl_coef * k3 - entropy_coef * entropy)).sum()`.

    Args:
        hidden_TD: float [T, D], the states that predict the targets.
        weight_VD: [V, D] of the LM head, dtype and device of `hidden_TD`.
        target_T: int64 or int32 [T], values in [0, V) or `ignore_index`. Others raise where index checks are on (see
            `set_index_checks`); where they are off they give a log-prob of NaN.
        advantage_T, old_logprob_T: float [T]; no gradient. `old_logprob_T` None: the policy has not changed since it
            sampled, its own log-probs are the old ones and every ratio is 1.
        weight_T: float [T], the token's share of the loss; it contains every divisor; no gradient. For float16 put
            the loss scale here too: gradients are formed in the forward pass, where a later factor comes too late to
            save small ones from underflow.
        bias: [V] of the LM head, dtype and device of `hidden_TD`.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: c > 1: where the advantage is negative a token's policy term is at most -A * c, and has no gradient
            beyond. None: no bound.
        loss: "clip" as above; "cispo" `-A * r.clamp(1 - clip_low, 1 + clip_high).detach() * logprob`: the ratio is a
            weight, and every token keeps its gradient. clip_low = 1 leaves it without a lower bound.
        correction_T: float [T], a factor of each token's policy term, such as an importance weight, and not of the KL,
            entropy and z terms; at least 0, no gradient.
        ref_logprob_T: float [T] of the reference model, for the KL term; no gradient.
        reference_hidden_TE: [T, E] in place of `ref_logprob_T`: the states of the reference model, a frozen one, that
            predict the targets. `linear_logprob` finds its log-probs, with the same temperature, soft cap, top_k, top_p
            and group, for 2 T V E FLOP more. Dtype and device of `hidden_TD`; no gradient.
        reference_weight_VE: [V, E] of the reference model's LM head, dtype and device of `hidden_TD`; no gradient.
            With a group as `weight_VD`, this rank's rows of it. None: it has the policy's weight and bias, as they are
            now.
        reference_bias: [V] beside `reference_weight_VE`, where `bias` is given; no gradient.
        cu_seqlens: int64 or int32 [B + 1], offsets of the sequences, from 0 to T: the ratio of a token is that of its
            sequence, exp of the mean of `logprob - old_logprob` over the sequence's tokens with weight (GSPO). Needs
            "clip". Every log-prob comes before the first gradient, so it takes four products with the head
            in place of three, no token is left out of one (`skip_dead` changes nothing), and `weight_T` needs no loss
            scale. Wrong ones are as in `policy_loss`. None: every token has its own ratio.
        kl_coef: weight of the estimate of KL(policy || reference), at least 0; above 0 it needs `ref_logprob_T` or
            `reference_hidden_TE`.
        kl_estimate: of a token, with d = ref_logprob - logprob: "k3" `d.exp() - d - 1`, "k2" `0.5 * d ** 2`.
        kl_clamp: a token's estimate counts as at most this, and has no gradient beyond; above 0. None: no bound.
        entropy_coef: weight of the entropy bonus.
        z_loss_coef: weight of the square of logsumexp(logits / temperature), at least 0. Takes no pass of its own, and
            reaches every token with weight.
        logit_softcap: logits become cap * tanh(logits / cap), before the temperature; -inf stays -inf. Above 0.
            Where torch computes, it takes a second chunk of logits.
        top_k, top_p: log-prob, entropy and z term are those of the distribution that they leave, renormalised, as in
            `linear_logprob`. 0 and 1 keep every token.
        temperature: divides the logits; above 0.
        ignore_index: a token with this target takes no part, whatever its state and its vectors hold: log-prob 0, no
            share in loss and metrics, no gradient to anything.
        chunk_tokens: the most tokens of a chunk; chunks are equal. By default on a GPU 4,096 as far as 3 GiB hold their
            float32 logits, or what 1 GiB holds if that is more; on a CPU what 32 MB hold.
        skip_dead: leave tokens whose gradient is exactly zero out of the gradient's two matmuls. Their number is read
            back from the device, once a chunk. False computes with all tokens and reads nothing back, so it can be
            captured in a CUDA graph; the results are the same within rounding.
        group: process group over whose ranks the vocabulary is divided (tensor parallel): `weight_VD` and `bias` are
            this rank's rows, contiguous, in the order of the ranks; a rank may have none. A DTensor has to be Shard(0)
            on a one-dimensional mesh of the same ranks. All ranks make the same call, only rows differ: hidden states,
            vectors and `chunk_tokens` are the same, and targets are of the whole vocabulary. Each rank gets the whole
            loss, log-probs and metrics, and the whole gradient of `hidden_TD`: the operator sums it over the ranks, do
            not sum it again. Gradients of `weight_VD` and `bias` are of this rank's rows. Collectives, by the group's
            backend where the tensors are: a small all-gather, one more a chunk, and one all-reduce of d_hidden, all
            forward. Without `chunk_tokens` the largest shard decides, which is read back, also where `skip_dead` is
            False. Never run on a GPU.
        impl: "auto" (Triton on CUDA, torch elsewhere and for float64), "triton" or "torch".

    Returns:
        loss (scalar), log-probs [T] without gradient, and metrics, means over the tokens with weight: `clip_fraction`,
        `approx_kl` (mean of (r - 1) - log r), `entropy`; with `reference_hidden_TE` also `ref_logprob_T`, the
        reference model's log-probs [T]. float32 (float64 for float64 input). The loss can be differentiated once, with
        respect to hidden, weight and bias.

    Source: paper eq. 5 (PPO); the k3 estimate and the clip bounds of either side as in GRPO and DAPO. Dual clip: Ye et
    al. 2020 (arXiv 1912.09729). CISPO: MiniMax-M1 2025 (arXiv 2506.13585). Ratios of sequences: GSPO, Zheng et al. 2025
    (arXiv 2507.18071). k2: Schulman 2020, "Approximating KL Divergence"; a bound on an estimate as in verl. Z-loss:
    PaLM, Chowdhery et al. 2022. Soft cap: Gemma 2, 2024. Vocabulary over ranks: Megatron-LM, Shoeybi et al. 2019.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    via_triton = use_triton("linear_policy_loss", impl, hidden_TD)
    options = RowOptions(temperature, logit_softcap, top_k, top_p, ignore_index, via_triton)
    head, parts = checked_head(Head(hidden_TD, weight_VD, bias, target_T), options, chunk_tokens, group)
    if reference_hidden_TE is not None:
        if ref_logprob_T is not None:
            raise ValueError("ref_logprob_T and reference_hidden_TE are both given: expected one of them")
        given = reference_hidden_TE, reference_weight_VE, reference_bias
        reference = _reference_head(*given, head, parts, options, chunk_tokens, group)
        with torch.no_grad():
            ref_logprob_T, *_ = logprob_of_head(reference, options, parts)
    elif reference_weight_VE is not None or reference_bias is not None:
        name = "reference_bias" if reference_weight_VE is None else "reference_weight_VE"
        raise ValueError(f"{name} needs reference_hidden_TE, which is None")
    vectors = TokenVectors(advantage_T, old_logprob_T, weight_T, correction_T, ref_logprob_T)
    for name, x in vectors._asdict().items():
        if x is not None:
            check_like(name, x, target_T.shape, "hidden_TD", hidden_TD)
            check_float(name, x, 1)
        elif name in ("advantage_T", "weight_T"):
            raise ValueError(f"{name} is None: expected a tensor of shape ({len(target_T)},)")
    terms = TokenTerms(clip_low, clip_high, dual_clip, loss, kl_coef, kl_estimate, kl_clamp, entropy_coef)
    terms.check()
    if cu_seqlens is not None:
        terms.check_sequences(cu_seqlens, "hidden_TD", hidden_TD)
    if kl_coef and ref_logprob_T is None:
        raise ValueError(f"kl_coef = {kl_coef} needs ref_logprob_T or reference_hidden_TE, both are None")
    check_finite("z_loss_coef", z_loss_coef, least=0)
    dtype = accumulation_dtype(hidden_TD)
    vectors = TokenVectors._make(None if x is None else x.detach().to(dtype).contiguous() for x in vectors)
    if cu_seqlens is not None:
        total, logprob_T, metrics = _of_sequences(head, vectors, terms, options, parts, z_loss_coef, cu_seqlens)
    else:
        # inside the operator gradient mode always reads False
        needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden_TD, weight_VD, bias)]
        operator = _forward if skip_dead or parts.reads_back else _forward_of_all
        more = _More(z_loss_coef, skip_dead)
        total, logprob_T, stats, *_ = operator(*head, *vectors, *terms, *options, *parts, *more, *needs)
        count = stats[1].clamp(min=1)
        metrics = {"clip_fraction": stats[2] / count, "approx_kl": stats[3] / count, "entropy": stats[4] / count}
    if reference_hidden_TE is not None:
        assert ref_logprob_T is not None
        metrics["ref_logprob_T"] = ref_logprob_T
    return total, logprob_T, metrics
