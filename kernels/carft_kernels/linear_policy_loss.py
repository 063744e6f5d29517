"""Clipped policy loss from hidden states, with its gradients computed in the forward pass.

    logprob_t = log softmax(hidden_t weight^T / temperature)[target_t],  r_t = exp(logprob_t - old_logprob_t)
    loss = sum_t weight_t (max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high))
                           + kl_coef (exp(d_t) - d_t - 1) - entropy_coef H_t),   d_t = ref_logprob_t - logprob_t

Source: paper eq. 5 (PPO); the KL term is the k3 estimator of GRPO. Since the loss is a plain sum, each chunk of tokens
can be differentiated as soon as its logits exist: one matmul for them, one for d_hidden, one for d_weight, 3F in all
(F = 2 T V D) and no recomputation. Tokens whose gradient is exactly zero (no weight, no advantage, clipped) are left
out of the last two. Kept for backward: d_hidden and d_weight. Accumulation: float32 past the matmul and for d_weight
(float64 for float64 input). Half-precision matmuls run in their own dtype, on the weight as it is: only a chunk's
logits are widened, never the weight.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from carft_kernels._runtime import (
    Impl,
    accumulation_dtype,
    check_float,
    check_impl,
    check_index,
    check_like,
    check_positive,
    check_same_dtype,
    chunk_size,
    softmax_parts_,
)


def linear_policy_loss_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    advantage_T: Tensor,
    old_logprob_T: Tensor,
    weight_T: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref_logprob_T: Tensor | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The obvious expression: loss and log-probs [T], all logits at once."""
    logits_TV = hidden_TD @ weight_VD.T
    logp_TV = (logits_TV.to(accumulation_dtype(hidden_TD)) / temperature).log_softmax(-1)
    logprob_T = logp_TV.gather(1, target_T.long()[:, None])[:, 0]
    ratio_T = (logprob_T - old_logprob_T).exp()
    loss_T = torch.max(-advantage_T * ratio_T, -advantage_T * ratio_T.clamp(1 - clip_low, 1 + clip_high))
    if ref_logprob_T is not None:
        difference_T = ref_logprob_T - logprob_T
        loss_T = loss_T + kl_coef * (difference_T.exp() - difference_T - 1)
    loss_T = loss_T - entropy_coef * torch.special.entr(logp_TV.exp()).sum(-1)
    return (weight_T * loss_T).sum(), logprob_T


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        target_T: Tensor,
        advantage_T: Tensor,
        old_logprob_T: Tensor,
        weight_T: Tensor,
        ref_logprob_T: Tensor | None,
        clip_low: float,
        clip_high: float,
        kl_coef: float,
        entropy_coef: float,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = accumulation_dtype(hidden_TD)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden_TD = torch.zeros_like(hidden_TD) if need_hidden else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if need_weight else None
        logprob_T = hidden_TD.new_empty(hidden_TD.shape[0], dtype=dtype)
        entropy_T = torch.empty_like(logprob_T)
        loss = hidden_TD.new_zeros((), dtype=dtype)
        for s in range(0, hidden_TD.shape[0], chunk_tokens):
            rows = slice(s, s + chunk_tokens)
            h, target, weight = hidden_TD[rows], target_T[rows, None], weight_T[rows]
            x = (h @ weight_VD.T).to(dtype)
            if temperature != 1.0:
                x.div_(temperature)
            logprob, p, sum_exp = softmax_parts_(x, target)
            # exp * logit is 0 * -inf for an excluded column: its share of the entropy is 0
            entropy = sum_exp.log() - x.mul_(p).nansum(-1) / sum_exp
            logprob_T[rows], entropy_T[rows] = logprob, entropy

            advantage = advantage_T[rows]
            ratio = (logprob - old_logprob_T[rows]).exp()
            plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
            loss_rows = torch.maximum(plain, clipped)
            # where the two are equal the ratio is inside the clip range (or the advantage is 0): gradient flows
            d_logprob = torch.where(plain >= clipped, plain, torch.zeros_like(plain))
            if ref_logprob_T is not None and kl_coef:
                difference = ref_logprob_T[rows] - logprob
                loss_rows = loss_rows + kl_coef * (difference.expm1() - difference)
                d_logprob = d_logprob - kl_coef * difference.expm1()
            if entropy_coef:
                loss_rows = loss_rows - entropy_coef * entropy
            # a token without weight takes no part, whatever its ratio: 0 * inf would be NaN
            loss += torch.where(weight != 0, weight * loss_rows, 0.0).sum()
            if d_hidden_TD is None and d_weight_VD is None:
                continue

            d_logprob = torch.where(weight != 0, weight * d_logprob, 0.0)
            live = d_logprob != 0 if not entropy_coef else weight != 0
            index = live.nonzero()[:, 0]
            if len(index) < len(live):
                if len(index) == 0:
                    continue
                p, h, target, sum_exp = p[index], h[index], target[index], sum_exp[index]
                d_logprob, weight, entropy = d_logprob[index], weight[index], entropy[index]
            p.div_(sum_exp[:, None])
            if entropy_coef:
                d_entropy = torch.where(p > 0, p * (p.log() + entropy[:, None]), 0.0)
                d = d_entropy.mul_(entropy_coef * weight[:, None]).sub_(p.mul_(d_logprob[:, None]))
            else:
                d = p.mul_(-d_logprob[:, None])
            d.scatter_add_(1, target, d_logprob[:, None])
            if temperature != 1.0:
                d.div_(temperature)
            d = d.to(hidden_TD.dtype)
            if d_hidden_TD is not None:
                d_hidden_TD[s + index] = d @ weight_VD
            if d_weight_VD is not None:
                if d_weight_VD.dtype == d.dtype:
                    d_weight_VD.addmm_(d.T, h)
                else:
                    d_weight_VD += d.T @ h
        ctx.mark_non_differentiable(logprob_T, entropy_T)
        ctx.save_for_backward(d_hidden_TD, None if d_weight_VD is None else d_weight_VD.to(weight_VD.dtype))
        return loss, logprob_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_TD, d_weight_VD = ctx.saved_tensors
        return (
            # d_loss stays as wide as it is: rounded to half precision first, it would bias every element alike
            None if d_hidden_TD is None else d_hidden_TD * d_loss,
            None if d_weight_VD is None else d_weight_VD * d_loss,
            *([None] * 11),
        )


def linear_policy_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    advantage_T: Tensor,
    old_logprob_T: Tensor,
    weight_T: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref_logprob_T: Tensor | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """PPO / GRPO policy loss straight from hidden states, never holding [T, V].

    Equivalent: `logprob = (hidden @ weight.T / temperature).float().log_softmax(-1).gather(1, target[:, None])[:, 0]`;
    `r = (logprob - old_logprob).exp()`; `loss = (weight_T * (torch.max(-A * r, -A * r.clamp(1 - clip_low,
    1 + clip_high)) + kl_coef * k3 - entropy_coef * entropy)).sum()`.

    Args:
        hidden_TD: float [T, D], the states that predict the targets.
        weight_VD: [V, D] of the LM head, dtype and device of `hidden_TD`.
        target_T: int64 or int32 [T], values in [0, V).
        advantage_T, old_logprob_T: float [T]; no gradient.
        weight_T: float [T], the token's share of the loss; it carries every normaliser; no gradient. For float16 put
            the loss scale here too: gradients are formed in the forward pass, where a later factor comes too late to
            save small ones from underflow.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        ref_logprob_T: float [T] of the reference model, for the KL term; no gradient.
        kl_coef: weight of the k3 estimate of KL(policy || reference), at least 0; above 0 it needs `ref_logprob_T`.
        entropy_coef: weight of the entropy bonus.
        temperature: divides the logits; above 0.
        chunk_tokens: tokens per chunk; by default what keeps a chunk's logits small.
        impl: "auto" or "torch".

    Returns:
        loss (scalar), log-probs [T] without gradient, and metrics, means over the tokens with weight: `clip_fraction`,
        `approx_kl` (mean of (r - 1) - log r), `entropy`. float32 (float64 for float64 input). The loss can be
        differentiated once, with respect to hidden and weight.

    Source: paper eq. 5 (PPO); the k3 estimate and the clip bounds of either side as in GRPO and DAPO.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    check_impl("linear_policy_loss", impl)
    check_float("hidden_TD", hidden_TD, 2)
    check_float("weight_VD", weight_VD, 2)
    tokens = hidden_TD.shape[0]
    check_like("weight_VD", weight_VD, (weight_VD.shape[0], hidden_TD.shape[1]), "hidden_TD", hidden_TD)
    check_same_dtype("weight_VD", weight_VD, "hidden_TD", hidden_TD)
    check_like("target_T", target_T, (tokens,), "hidden_TD", hidden_TD)
    check_index("target_T", target_T, weight_VD.shape[0])
    for name, x in (("advantage_T", advantage_T), ("old_logprob_T", old_logprob_T), ("weight_T", weight_T)):
        check_like(name, x, (tokens,), "hidden_TD", hidden_TD)
        check_float(name, x, 1)
    if ref_logprob_T is not None:
        check_like("ref_logprob_T", ref_logprob_T, (tokens,), "hidden_TD", hidden_TD)
        check_float("ref_logprob_T", ref_logprob_T, 1)
    elif kl_coef:
        raise ValueError(f"kl_coef = {kl_coef} needs ref_logprob_T, which is None")
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef = {kl_coef}: expected a number of at least 0")
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low = {clip_low}: expected a number in [0, 1]")
    if not clip_high >= 0:
        raise ValueError(f"clip_high = {clip_high}: expected a number of at least 0")
    check_positive("temperature", temperature)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens = {chunk_tokens}: expected at least 1")
    dtype = accumulation_dtype(hidden_TD)
    advantage_T, old_logprob_T, weight_T = (x.detach().to(dtype) for x in (advantage_T, old_logprob_T, weight_T))
    differentiate = torch.is_grad_enabled()  # inside the Function it always reads False
    loss, logprob_T, entropy_T = _LinearPolicyLoss.apply(
        hidden_TD if differentiate else hidden_TD.detach(),
        weight_VD if differentiate else weight_VD.detach(),
        target_T.long(),
        advantage_T,
        old_logprob_T,
        weight_T,
        None if ref_logprob_T is None else ref_logprob_T.detach().to(dtype),
        clip_low,
        clip_high,
        kl_coef,
        entropy_coef,
        temperature,
        chunk_tokens or chunk_size(tokens, weight_VD.shape[0], hidden_TD.device),
    )
    with torch.no_grad():
        counted_T = weight_T != 0
        count = counted_T.sum().clamp(min=1)
        log_ratio_T = torch.where(counted_T, logprob_T - old_logprob_T, torch.zeros_like(logprob_T))
        outside_T = (log_ratio_T.exp() < 1 - clip_low) | (log_ratio_T.exp() > 1 + clip_high)
        metrics = {
            "clip_fraction": outside_T.sum() / count,
            "approx_kl": (log_ratio_T.expm1() - log_ratio_T).sum() / count,
            "entropy": torch.where(counted_T, entropy_T, torch.zeros_like(entropy_T)).sum() / count,
        }
    return loss, logprob_T, metrics
