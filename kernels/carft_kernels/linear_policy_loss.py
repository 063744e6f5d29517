"""Clipped policy loss from hidden states, with its gradients computed in the forward pass.

    logprob_t = log softmax(hidden_t weight^T / temperature)[target_t],  r_t = exp(logprob_t - old_logprob_t)
    loss = sum_t weight_t (max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high))
                           + kl_coef (exp(d_t) - d_t - 1) - entropy_coef H_t),   d_t = ref_logprob_t - logprob_t

Source: paper eq. 5 (PPO); the KL term is the k3 estimator of GRPO. Since the loss is a plain sum, each chunk of tokens
can be differentiated as soon as its logits exist: one matmul for them, one for d_hidden, one for d_weight, 3F in all
(F = 2 T V D) and no recomputation. So a token's loss may depend on its own logits alone: a ratio of whole sequences
takes `linear_logprob` and then `policy_loss`, 4F. Tokens whose gradient is exactly zero (no weight, no advantage,
clipped) are left out of the last two; their number is read back once a chunk, unless `skip_dead` is False. Kept for
backward: d_hidden, d_weight and d_bias. Accumulation: float32 past the matmul and for d_weight (float64 for float64
input). Half-precision matmuls run on the weight as it is: only a chunk's logits are widened, never the weight. Triton:
row kernels between cuBLAS products. From a reference model's hidden states its log-probs come in the same loop, over
the same memory: 1F more.

T tokens, D hidden size, E the reference model's, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from carft_kernels._policy_kernels import KlEstimate, PolicyLoss, TokenTerms, policy_terms, policy_terms_reference
from carft_kernels._row_kernels import logprob_backward, logprob_forward, lse_of
from carft_kernels._runtime import (
    Impl,
    accumulation_dtype,
    add_product_,
    check_float,
    check_ignore_index,
    check_integer,
    check_like,
    check_positive,
    check_rows,
    check_same_dtype,
    check_softcap,
    check_targets,
    check_top,
    chunk_logits,
    chunk_size,
    entropy_reference,
    keep_top_reference,
    log_implementation,
    product,
    rows_scratch,
    scaled_gradient,
    soft_cap_reference,
    softmax_parts_,
    split_index,
    use_triton,
    wide_matmul,
)


def linear_policy_loss_reference(
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
) -> tuple[Tensor, Tensor]:
    """The obvious expression: loss and log-probs [T], all logits at once."""
    counted_T = target_T != ignore_index
    weight_T = torch.where(counted_T, weight_T, 0.0)
    target_T1 = target_T.long()[:, None] * counted_T[:, None]

    def kept_logits(hidden_TD: Tensor, weight_VD: Tensor, bias: Tensor | None) -> Tensor:
        logits_TV = torch.nn.functional.linear(torch.where(counted_T[:, None], hidden_TD, 0.0), weight_VD, bias)
        logits_TV = logits_TV.to(accumulation_dtype(hidden_TD))
        if logit_softcap is not None:
            logits_TV = soft_cap_reference(logits_TV, logit_softcap)
        return keep_top_reference(logits_TV / temperature, target_T1, top_k, top_p)

    kept_TV = kept_logits(hidden_TD, weight_VD, bias)
    logp_TV = kept_TV.log_softmax(-1)
    logprob_T = logp_TV.gather(1, target_T1)[:, 0] * counted_T
    if reference_hidden_TE is not None:
        head = (weight_VD, bias) if reference_weight_VE is None else (reference_weight_VE, reference_bias)
        with torch.no_grad():
            ref_logprob_T = kept_logits(reference_hidden_TE, *head).log_softmax(-1).gather(1, target_T1)[:, 0]
    loss_T = policy_terms_reference(
        logprob_T,
        logprob_T.detach() if old_logprob_T is None else old_logprob_T,
        advantage_T,
        TokenTerms(clip_low, clip_high, dual_clip, loss, kl_coef, kl_estimate, kl_clamp),
        correction_T=correction_T,
        ref_logprob_T=ref_logprob_T,
    )
    loss_T = loss_T - entropy_coef * entropy_reference(logp_TV)
    loss_T = loss_T + z_loss_coef * kept_TV.logsumexp(-1).square()
    return (weight_T * loss_T).sum(), logprob_T


def _loss_and_gradients(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias: Tensor | None,
    target_T: Tensor,
    advantage_T: Tensor,
    old_logprob_T: Tensor | None,
    weight_T: Tensor,
    correction_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    reference_hidden_TE: Tensor | None,
    reference_weight_VE: Tensor | None,
    reference_bias: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    loss: str,
    kl_coef: float,
    kl_estimate: str,
    kl_clamp: float | None,
    entropy_coef: float,
    z_loss_coef: float,
    logit_softcap: float | None,
    top_k: int,
    top_p: float,
    temperature: float,
    ignore_index: int,
    chunk_tokens: int,
    skip_dead: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    via_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-probs, those of `reference_hidden_TE` (empty without it), the sums [5] of policy_terms, d_hidden,
    d_weight and d_bias (empty where not needed)."""
    log_implementation("linear_policy_loss", via_triton, hidden_TD.device.type)
    tokens, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
    check_targets("target_T", target_T, vocabulary, ignore_index)
    dtype = accumulation_dtype(hidden_TD)
    d_hidden_TD = torch.zeros_like(hidden_TD) if need_hidden else hidden_TD.new_empty(0)
    d_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if need_weight else weight_VD.new_empty(0)
    d_bias_V = weight_VD.new_zeros(vocabulary if need_bias else 0, dtype=dtype)
    terms = TokenTerms(clip_low, clip_high, dual_clip, loss, kl_coef, kl_estimate, kl_clamp, entropy_coef)
    logprob_T = hidden_TD.new_empty(tokens, dtype=dtype)
    found_ref_T = hidden_TD.new_empty(0 if reference_hidden_TE is None else tokens, dtype=dtype)
    if reference_hidden_TE is not None:
        ref_logprob_T = found_ref_T
        if reference_weight_VE is None:
            reference_weight_VE, reference_bias = weight_VD, bias
    stats = hidden_TD.new_zeros(5, dtype=dtype)
    target_T1, ignored_T, outside_T = split_index(target_T, vocabulary, ignore_index)
    weight_T = weight_T.masked_fill(ignored_T, 0.0)
    chunk_tokens = min(chunk_tokens, tokens)
    options = (temperature, logit_softcap, top_k, top_p)
    x_scratch = None
    if via_triton:
        x_scratch = rows_scratch(hidden_TD, chunk_tokens, vocabulary, torch.float32)
        d_scratch = x_scratch if hidden_TD.dtype == dtype else rows_scratch(hidden_TD, chunk_tokens, vocabulary)
    for s in range(0, tokens, max(chunk_tokens, 1)):
        rows = slice(s, s + chunk_tokens)
        h, weight = hidden_TD[rows], weight_T[rows]
        if reference_hidden_TE is not None:
            assert reference_weight_VE is not None
            h_ref = reference_hidden_TE[rows]
            x, _ = chunk_logits(h_ref, reference_weight_VE, reference_bias, target_T1[rows], *options, out=x_scratch)
            if via_triton:
                row_options = (temperature, False, ignore_index, logit_softcap)
                found_ref_T[rows] = logprob_forward(x, target_T[rows], *row_options)[0]
            else:
                ref = softmax_parts_(x, target_T1[rows])[0]
                found_ref_T[rows] = ref.masked_fill_(outside_T[rows], torch.nan).masked_fill_(ignored_T[rows], 0.0)
        x, slope = chunk_logits(h, weight_VD, bias, target_T1[rows], *options, out=x_scratch)
        if via_triton:
            logprob, entropy, top, log_total = logprob_forward(
                x, target_T[rows], temperature, True, ignore_index, logit_softcap
            )
            lse = lse_of(top, log_total) if z_loss_coef else None
        else:
            logprob, top, p, sum_exp = softmax_parts_(x, target_T1[rows])
            # exp * logit is 0 * -inf for an excluded column: its share of the entropy is 0
            entropy = sum_exp.log() - x.mul_(p).nansum(-1) / sum_exp
            lse = top + sum_exp.log() if z_loss_coef else None
            logprob.masked_fill_(outside_T[rows], torch.nan).masked_fill_(ignored_T[rows], 0.0)
        logprob_T[rows] = logprob
        d_logprob = policy_terms(
            logprob,
            logprob if old_logprob_T is None else old_logprob_T[rows],
            advantage_T[rows],
            weight,
            stats,
            terms,
            correction_T=None if correction_T is None else correction_T[rows],
            ref_logprob_T=None if ref_logprob_T is None else ref_logprob_T[rows],
            entropy_T=entropy,
            via_triton=via_triton,
        )
        d_lse = None
        if lse is not None:
            lse = torch.where(weight != 0, lse, 0.0)
            stats[0] += z_loss_coef * (weight * lse.square()).sum()
            d_lse = 2 * z_loss_coef * weight * lse
        if not (need_hidden or need_weight or need_bias):
            continue

        live = weight != 0 if entropy_coef or z_loss_coef else d_logprob != 0
        if skip_dead:
            index = live.nonzero()[:, 0]
            if len(index) == 0:
                continue
            everyone = len(index) == len(h)
        else:
            # whatever a token without gradient holds must not reach d_weight: 0 * NaN is NaN
            everyone, h = True, h.masked_fill(~live[:, None], 0.0)
        d_entropy = -entropy_coef * weight if entropy_coef else None
        if via_triton:
            # rows beyond `index` are neither read nor written; without a gap the gradient goes over its own logits
            d = d_scratch[: len(h) if everyone else len(index)]
            target = target_T[rows] if skip_dead else target_T[rows].masked_fill(~live, ignore_index)
            if not everyone and d_scratch is x_scratch:
                d = rows_scratch(hidden_TD, len(index), vocabulary)
            logprob_backward(
                x,
                d,
                target,
                top,
                log_total,
                d_logprob,
                temperature,
                ignore_index,
                entropy_T=entropy,
                d_entropy_T=d_entropy,
                d_lse_T=d_lse,
                softcap=logit_softcap,
                index_N=None if everyone else index,
            )
        else:
            target = target_T1[rows]
            if not everyone:
                p, target, sum_exp, entropy, d_logprob = (z[index] for z in (p, target, sum_exp, entropy, d_logprob))
                d_entropy, d_lse, slope = (None if z is None else z[index] for z in (d_entropy, d_lse, slope))
            p.div_(sum_exp[:, None])
            d_sum = d_logprob if d_lse is None else d_logprob - d_lse  # of what every logit takes part in
            if d_entropy is None:
                d = p.mul_(-d_sum[:, None])
            else:
                d = torch.where(p > 0, p * (p.log() + entropy[:, None]), 0.0).mul_(-d_entropy[:, None])
                d.sub_(p.mul_(d_sum[:, None]))
            d.scatter_add_(1, target, d_logprob[:, None])
            if temperature != 1.0:
                d.div_(temperature)
            if slope is not None:
                d.mul_(slope)
            if not skip_dead:
                d.masked_fill_(~live[:, None], 0.0)
            d = d.to(hidden_TD.dtype)
        if need_bias:
            d_bias_V += d.sum(0, dtype=dtype)
        if need_hidden:
            if everyone:
                wide_matmul(d, weight_VD, out=d_hidden_TD[rows])
            else:
                d_hidden_TD[s + index] = product(d, weight_VD)
        if need_weight:
            add_product_(d_weight_VD, d.T, h if everyone else h[index])
    gradients = d_hidden_TD, d_weight_VD.to(weight_VD.dtype), d_bias_V.to(weight_VD.dtype)
    return stats[0].clone(), logprob_T, found_ref_T, stats, *gradients


# the number of tokens with a gradient is read back, which no CUDA graph can hold
_forward = torch.library.custom_op(
    "carft::linear_policy_loss", _loss_and_gradients, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
_forward_of_all = torch.library.custom_op("carft::linear_policy_loss_of_all", _loss_and_gradients, mutates_args=())


def _fake(hidden_TD: Tensor, weight_VD: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    need_hidden, need_weight, need_bias = rest[-4:-1]
    reference_hidden_TE = rest[7]
    dtype = accumulation_dtype(hidden_TD)
    return (
        hidden_TD.new_empty((), dtype=dtype),
        hidden_TD.new_empty(hidden_TD.shape[0], dtype=dtype),
        hidden_TD.new_empty(0 if reference_hidden_TE is None else hidden_TD.shape[0], dtype=dtype),
        hidden_TD.new_empty(5, dtype=dtype),
        torch.empty_like(hidden_TD) if need_hidden else hidden_TD.new_empty(0),
        torch.empty_like(weight_VD) if need_weight else weight_VD.new_empty(0),
        weight_VD.new_empty(weight_VD.shape[0] if need_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *without_gradient, d_hidden_TD, d_weight_VD, d_bias_V = output
    gradients = d_hidden_TD, d_weight_VD, d_bias_V
    ctx.needed, ctx.inputs = inputs[-4:-1], len(inputs)
    ctx.set_materialize_grads(False)  # no zeros of the head's size for the outputs that carry no gradient
    ctx.mark_non_differentiable(*without_gradient, *gradients)
    ctx.save_for_backward(*gradients)


def _autograd(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * ctx.inputs
    gradients = [
        scaled_gradient(gradient, d_loss, gradient.dtype) if needed else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needed, strict=True)
    ]
    return *gradients, *([None] * (ctx.inputs - 3))


for _operator in (_forward, _forward_of_all):
    _operator.register_fake(_fake)
    _operator.register_autograd(_autograd, setup_context=_setup_context)


def _check_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias: Tensor | None,
    reference_hidden_TE: Tensor,
    reference_weight_VE: Tensor | None,
    reference_bias: Tensor | None,
) -> None:
    check_float("reference_hidden_TE", reference_hidden_TE, 2)
    vocabulary, width = weight_VD.shape
    if reference_weight_VE is not None:
        check_float("reference_weight_VE", reference_weight_VE, 2)
        width = reference_weight_VE.shape[1]
        check_like("reference_weight_VE", reference_weight_VE, (vocabulary, width), "weight_VD", hidden_TD)
        check_same_dtype("reference_weight_VE", reference_weight_VE, "hidden_TD", hidden_TD)
    check_like("reference_hidden_TE", reference_hidden_TE, (len(hidden_TD), width), "hidden_TD", hidden_TD)
    check_same_dtype("reference_hidden_TE", reference_hidden_TE, "hidden_TD", hidden_TD)
    if (reference_bias is None) == (reference_weight_VE is not None and bias is not None):
        seen = f"None: expected ({vocabulary},)" if reference_bias is None else "a tensor: expected None"
        raise ValueError(f"reference_bias is {seen}; it goes with both reference_weight_VE and bias")
    if reference_bias is not None:
        check_like("reference_bias", reference_bias, (vocabulary,), "weight_VD", hidden_TD)
        check_same_dtype("reference_bias", reference_bias, "hidden_TD", hidden_TD)


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
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """PPO / GRPO policy loss straight from hidden states, never holding [T, V].

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
        weight_T: float [T], the token's share of the loss; it carries every normaliser; no gradient. For float16 put
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
            predict the targets. Its log-probs are found with the same temperature, soft cap, top_k and top_p, in the
            same loop and memory, for 1F. Dtype and device of `hidden_TD`; no gradient.
        reference_weight_VE: [V, E] of the reference model's LM head, dtype and device of `hidden_TD`; no gradient.
            None: it has the policy's weight and bias, as they are now.
        reference_bias: [V] beside `reference_weight_VE`, where `bias` is given; no gradient.
        kl_coef: weight of the estimate of KL(policy || reference), at least 0; above 0 it needs `ref_logprob_T` or
            `reference_hidden_TE`.
        kl_estimate: of a token, with d = ref_logprob - logprob: "k3" `d.exp() - d - 1`, "k2" `0.5 * d ** 2`.
        kl_clamp: a token's estimate counts as at most this, and has no gradient beyond; above 0. None: no bound.
        entropy_coef: weight of the entropy bonus.
        z_loss_coef: weight of the square of logsumexp(logits / temperature), at least 0. Takes no pass of its own, and
            reaches every token with weight.
        logit_softcap: cap: the logits are cap * tanh(logits / cap), before the temperature; -inf stays -inf. Above 0.
            Where torch computes, it takes a second chunk of logits.
        top_k, top_p: log-prob, entropy and z term are those of the distribution that they leave, renormalised, as in
            `linear_logprob`. 0 and 1 keep every token.
        temperature: divides the logits; above 0.
        ignore_index: a token with this target takes no part, whatever its state and its vectors hold: log-prob 0, no
            share in loss and metrics, no gradient to anything.
        chunk_tokens: tokens per chunk; by default what keeps a chunk's logits small.
        skip_dead: leave tokens whose gradient is exactly zero out of the gradient's two matmuls. Their number is read
            back from the device, once a chunk. False computes with all tokens and reads nothing back, so it can be
            captured in a CUDA graph; the results are the same within rounding.
        impl: "auto" (Triton on CUDA, torch elsewhere and for float64), "triton" or "torch".

    Returns:
        loss (scalar), log-probs [T] without gradient, and metrics, means over the tokens with weight: `clip_fraction`,
        `approx_kl` (mean of (r - 1) - log r), `entropy`; with `reference_hidden_TE` also `ref_logprob_T`, the
        reference model's log-probs [T]. float32 (float64 for float64 input). The loss can be differentiated once, with
        respect to hidden, weight and bias.

    A ratio of whole sequences (GSPO) needs every log-prob before the first gradient: take `linear_logprob`, then
    `policy_loss` with `cu_seqlens`, 4F in place of 3F.

    Source: paper eq. 5 (PPO); the k3 estimate and the clip bounds of either side as in GRPO and DAPO. Dual clip: Ye et
    al. 2020 (arXiv 1912.09729). CISPO: MiniMax-M1 2025 (arXiv 2506.13585). k2: Schulman 2020, "Approximating KL
    Divergence"; a bound on an estimate as in verl. Z-loss: PaLM, Chowdhery et al. 2022. Soft cap: Gemma 2, 2024.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    check_float("hidden_TD", hidden_TD, 2)
    via_triton = use_triton("linear_policy_loss", impl, hidden_TD)
    check_float("weight_VD", weight_VD, 2)
    tokens = hidden_TD.shape[0]
    check_like("weight_VD", weight_VD, (weight_VD.shape[0], hidden_TD.shape[1]), "hidden_TD", hidden_TD)
    check_same_dtype("weight_VD", weight_VD, "hidden_TD", hidden_TD)
    check_like("target_T", target_T, (tokens,), "hidden_TD", hidden_TD)
    check_integer("target_T", target_T)
    if bias is not None:
        check_like("bias", bias, (weight_VD.shape[0],), "weight_VD", hidden_TD)
        check_same_dtype("bias", bias, "hidden_TD", hidden_TD)
        bias = bias.contiguous()
    per_token = {"advantage_T": advantage_T, "old_logprob_T": old_logprob_T, "weight_T": weight_T}
    per_token |= {"correction_T": correction_T, "ref_logprob_T": ref_logprob_T}
    for name, x in per_token.items():
        if x is None and name in ("old_logprob_T", "correction_T", "ref_logprob_T"):
            continue
        if x is None:
            raise ValueError(f"{name} is None: expected a tensor of shape ({tokens},)")
        check_like(name, x, (tokens,), "hidden_TD", hidden_TD)
        check_float(name, x, 1)
    terms = TokenTerms(clip_low, clip_high, dual_clip, loss, kl_coef, kl_estimate, kl_clamp, entropy_coef)
    terms.check()
    if reference_hidden_TE is not None:
        if ref_logprob_T is not None:
            raise ValueError("ref_logprob_T and reference_hidden_TE are both given: expected one of them")
        _check_reference(hidden_TD, weight_VD, bias, reference_hidden_TE, reference_weight_VE, reference_bias)
    elif reference_weight_VE is not None or reference_bias is not None:
        name = "reference_bias" if reference_weight_VE is None else "reference_weight_VE"
        raise ValueError(f"{name} needs reference_hidden_TE, which is None")
    elif kl_coef and ref_logprob_T is None:
        raise ValueError(f"kl_coef = {kl_coef} needs ref_logprob_T or reference_hidden_TE, both are None")
    if not z_loss_coef >= 0:
        raise ValueError(f"z_loss_coef = {z_loss_coef}: expected a number of at least 0")
    check_softcap(logit_softcap)
    check_top(top_k, top_p)
    check_positive("temperature", temperature)
    check_ignore_index(ignore_index)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens = {chunk_tokens}: expected at least 1")
    if via_triton:
        check_rows("hidden_TD", hidden_TD)
        check_rows("weight_VD", weight_VD)
    dtype = accumulation_dtype(hidden_TD)
    vectors = (None if x is None else x.detach().to(dtype).contiguous() for x in per_token.values())
    differentiate = torch.is_grad_enabled()  # inside the operator it always reads False
    operator = _forward if skip_dead else _forward_of_all
    total, logprob_T, found_ref_T, stats, *_ = operator(
        hidden_TD,
        weight_VD,
        bias,
        target_T.contiguous(),
        *vectors,
        *(None if x is None else x.detach() for x in (reference_hidden_TE, reference_weight_VE, reference_bias)),
        *terms,
        z_loss_coef,
        logit_softcap,
        top_k,
        top_p,
        temperature,
        ignore_index,
        chunk_tokens or chunk_size(tokens, weight_VD.shape[0], hidden_TD.device),
        skip_dead,
        differentiate and hidden_TD.requires_grad,
        differentiate and weight_VD.requires_grad,
        differentiate and bias is not None and bias.requires_grad,
        via_triton,
    )
    count = stats[1].clamp(min=1)
    metrics = {"clip_fraction": stats[2] / count, "approx_kl": stats[3] / count, "entropy": stats[4] / count}
    if reference_hidden_TE is not None:
        metrics["ref_logprob_T"] = found_ref_T
    return total, logprob_T, metrics
