"""The token losses of a policy, shared by the operator on log-probs and the one on hidden states: which there are, and
their Triton kernel and torch expression. One launch, of one program up to 65,536 tokens; the loss and its derivative in
one pass.
"""

# mypy: disable-error-code="no-untyped-def"

import itertools
import math
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from carft_kernels._runtime import FUSED, all_count, check_cu_seqlens, check_finite, launch, zero_where_less

PolicyLoss = Literal["clip", "cispo"]
KlEstimate = Literal["k3", "k2"]


class TokenTerms(NamedTuple):
    """What a token's loss is made of; the fields are the operators' arguments of the same names."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    loss: str = "clip"
    kl_coef: float = 0.0
    kl_estimate: str = "k3"
    kl_clamp: float | None = None
    entropy_coef: float = 0.0

    def check(self) -> None:
        """Raises ValueError naming the argument, what was seen and what is allowed."""
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low = {self.clip_low}: expected a number in [0, 1]")
        if not self.clip_high >= 0:
            raise ValueError(f"clip_high = {self.clip_high}: expected a number of at least 0")
        if self.loss not in ("clip", "cispo"):
            raise ValueError(f"loss = {self.loss!r}: allowed are 'clip' and 'cispo'")
        if self.dual_clip is not None:
            if not 1 < self.dual_clip < math.inf:
                raise ValueError(f"dual_clip = {self.dual_clip}: expected a finite number above 1, or None")
            if self.loss != "clip":
                raise ValueError(f"dual_clip = {self.dual_clip} needs loss = 'clip', this is {self.loss!r}")
        check_finite("kl_coef", self.kl_coef, least=0)
        check_finite("entropy_coef", self.entropy_coef)
        if self.kl_estimate not in ("k3", "k2"):
            raise ValueError(f"kl_estimate = {self.kl_estimate!r}: allowed are 'k3' and 'k2'")
        if self.kl_clamp is not None and not self.kl_clamp > 0:
            raise ValueError(f"kl_clamp = {self.kl_clamp}: expected a number above 0, or None")

    def check_sequences(self, cu_seqlens: Tensor, like_name: str, like: Tensor) -> None:
        """Offsets of sequences that have one ratio each. Raises ValueError."""
        check_cu_seqlens("cu_seqlens", cu_seqlens, like_name, like)
        if self.loss != "clip":
            raise ValueError(f"cu_seqlens, the ratios of sequences, needs loss = 'clip', this is {self.loss!r}")


def exp_less_linear(x: Tensor) -> Tensor:
    """exp(x) - 1 - x, in float64: near 0 nothing would be left of it in float32."""
    wide = x.double()
    return (wide.expm1() - wide).to(x.dtype)


def token_kl(difference_T: Tensor, kl_estimate: str, kl_clamp: float | None) -> Tensor:
    """Estimate [T] of KL(policy || reference), of reference log-prob - log-prob; differentiable."""
    kl_T = 0.5 * difference_T.square() if kl_estimate == "k2" else exp_less_linear(difference_T)
    return kl_T if kl_clamp is None else kl_T.clamp(max=kl_clamp)


class TokenVectors(NamedTuple):
    """float [T] each, contiguous; of what is None, old_logprob_T is the log-prob itself, and the rest takes no part."""

    advantage_T: Tensor
    old_logprob_T: Tensor | None
    weight_T: Tensor
    correction_T: Tensor | None = None
    ref_logprob_T: Tensor | None = None

    def at(self, rows: slice) -> "TokenVectors":
        return TokenVectors._make(None if x is None else x[rows] for x in self)


def sequence_log_ratio_reference(log_ratio_T: Tensor, weight_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The obvious expression: the mean over the tokens with weight of a sequence, at each of these tokens."""
    counted_T = weight_T != 0
    means = [
        (log_ratio_T[s:e] * counted_T[s:e]).sum() / counted_T[s:e].sum().clamp(min=1) * counted_T[s:e]
        for s, e in itertools.pairwise(cu_seqlens.tolist())
    ]
    return torch.cat(means)


def policy_terms_reference(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    terms: TokenTerms,
    *,
    correction_T: Tensor | None = None,
    ref_logprob_T: Tensor | None = None,
    log_ratio_T: Tensor | None = None,
) -> Tensor:
    """The obvious expression [T], entropy left to the caller; `log_ratio_T` where it is not the token's own."""
    ratio_T = (logprob_T - old_logprob_T if log_ratio_T is None else log_ratio_T).exp()
    clipped_T = ratio_T.clamp(1 - terms.clip_low, 1 + terms.clip_high)
    if terms.loss == "cispo":
        loss_T = -advantage_T * clipped_T.detach() * logprob_T
    else:
        loss_T = torch.max(-advantage_T * ratio_T, -advantage_T * clipped_T)
        if terms.dual_clip is not None:
            bounded_T = torch.min(loss_T, -advantage_T * terms.dual_clip)
            loss_T = torch.where(advantage_T < 0, bounded_T, loss_T)
    if correction_T is not None:
        loss_T = correction_T * loss_T
    if ref_logprob_T is not None:
        difference_T = ref_logprob_T - logprob_T
        kl_T = 0.5 * difference_T**2 if terms.kl_estimate == "k2" else difference_T.expm1() - difference_T
        loss_T = loss_T + terms.kl_coef * kl_T.clamp(max=terms.kl_clamp or math.inf)
    return loss_T


@triton.jit
def _exp_less_linear(x):
    """exp(x) - 1 - x without cancellation: a series near 0."""
    series = x * x * 0.5 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8))))))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1.0 - x)


@triton.jit(
    do_not_specialize=["tokens"],
    do_not_specialize_on_alignment=[
        *("logprob", "old_logprob", "advantage", "weight", "correction", "ref_logprob", "entropy")
    ],
)
def policy_kernel(
    logprob,
    old_logprob,
    advantage,
    weight,
    correction,  # or None: 1 for every token
    ref_logprob,  # or None: no KL term
    entropy,  # or None
    d_logprob,
    stats,  # [programs, 5], added to: loss, tokens with weight, of these outside the clip, approximate KL, entropy
    tokens,
    clip_low,
    clip_high,
    dual_clip,  # or None: no bound
    kl_coef,
    kl_clamp,  # or None: no bound
    entropy_coef,
    CISPO: tl.constexpr,
    K2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every program has its blocks and its sums: they are the same in every run."""
    stats += tl.program_id(0) * 5
    loss = tl.zeros([BLOCK], tl.float32)
    counted = tl.zeros([BLOCK], tl.float32)
    outside = tl.zeros([BLOCK], tl.float32)
    approx_kl = tl.zeros([BLOCK], tl.float32)
    entropy_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.program_id(0) * BLOCK, tokens, tl.num_programs(0) * BLOCK):
        t = i + tl.arange(0, BLOCK)
        inside = t < tokens
        w = tl.load(weight + t, mask=inside, other=0.0).to(tl.float32)
        # a token without weight takes no part, whatever its ratio: 0 * inf would be NaN
        live = w != 0.0
        new = tl.load(logprob + t, mask=live, other=0.0).to(tl.float32)
        log_ratio = new - tl.load(old_logprob + t, mask=live, other=0.0).to(tl.float32)
        a = tl.load(advantage + t, mask=live, other=0.0).to(tl.float32)
        ratio = tl.exp(log_ratio)
        if CISPO:
            held = tl.maximum(ratio, 1.0 - clip_low, propagate_nan=tl.PropagateNan.ALL)
            d = -a * tl.minimum(held, 1.0 + clip_high, propagate_nan=tl.PropagateNan.ALL)
            token_loss = d * new
        else:
            plain = -a * ratio
            clipped = -a * tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
            token_loss = tl.maximum(plain, clipped, propagate_nan=tl.PropagateNan.ALL)
            # where they are equal the ratio is inside the clip range (or the advantage is 0): gradient flows, NaN too
            d = tl.where(plain < clipped, 0.0, plain)
            if dual_clip is not None:
                bound = -a * dual_clip
                beyond = (a < 0.0) & (token_loss > bound)
                token_loss = tl.where(beyond, bound, token_loss)
                d = tl.where(beyond, 0.0, d)
        if correction is not None:
            c = tl.load(correction + t, mask=live, other=0.0).to(tl.float32)
            # a factor of 0 leaves the term out, whatever the ratio: 0 * inf would be NaN
            token_loss = tl.where(c == 0.0, 0.0, c * token_loss)
            d = tl.where(c == 0.0, 0.0, c * d)
        if ref_logprob is not None:
            difference = tl.load(ref_logprob + t, mask=live, other=0.0).to(tl.float32) - new
            if K2:
                kl = 0.5 * difference * difference
                slope = difference
            else:
                kl = _exp_less_linear(difference)
                slope = kl + difference
            if kl_clamp is not None:
                slope = tl.where(kl > kl_clamp, 0.0, slope)
                kl = tl.where(kl > kl_clamp, kl_clamp, kl)
            token_loss += kl_coef * kl
            d -= kl_coef * slope
        if entropy is not None:
            h = tl.load(entropy + t, mask=live, other=0.0)
            token_loss -= entropy_coef * h
            entropy_sum += h
        tl.store(d_logprob + t, tl.where(live, w * d, 0.0), mask=inside)
        loss += tl.where(live, w * token_loss, 0.0)
        counted += live.to(tl.float32)
        outside += ((ratio < 1.0 - clip_low) | (ratio > 1.0 + clip_high)).to(tl.float32)
        approx_kl += _exp_less_linear(log_ratio)
    tl.store(stats, tl.load(stats) + tl.sum(loss, 0))
    tl.store(stats + 1, tl.load(stats + 1) + tl.sum(counted, 0))
    tl.store(stats + 2, tl.load(stats + 2) + tl.sum(outside, 0))
    tl.store(stats + 3, tl.load(stats + 3) + tl.sum(approx_kl, 0))
    tl.store(stats + 4, tl.load(stats + 4) + tl.sum(entropy_sum, 0))


TOKEN_CONFIG = {"BLOCK": 1024, "num_warps": 8, **FUSED}


def token_programs(tokens: int) -> int:
    """One up to 65,536 tokens, where a launch takes as long; beyond, one for 8,192, whose sums a second launch adds."""
    return 1 if tokens <= 65_536 else min(128, triton.cdiv(tokens, 8_192))


def policy_terms(
    logprob_T: Tensor,
    vectors: TokenVectors,
    stats: Tensor,
    terms: TokenTerms,
    entropy_T: Tensor | None = None,
    *,
    via_triton: bool,
) -> Tensor:
    """d loss / d logprob [T]; adds to `stats` [5]: loss, tokens with weight, clipped ones, approximate KL, entropy."""
    advantage_T, old_logprob_T, weight_T, correction_T, ref_logprob_T = vectors
    old_logprob_T = logprob_T if old_logprob_T is None else old_logprob_T
    ref_logprob_T = ref_logprob_T if terms.kl_coef else None
    vectors = TokenVectors(advantage_T, old_logprob_T, weight_T, correction_T, ref_logprob_T)
    if not via_triton:
        d_logprob_T, sums = policy_terms_torch(logprob_T, vectors, terms, entropy_T)
        stats[: len(sums)].add_(torch.stack(sums))
        return d_logprob_T
    d_logprob_T = torch.empty_like(logprob_T, dtype=torch.float32)
    tensors = logprob_T, old_logprob_T, advantage_T, weight_T, correction_T, ref_logprob_T, entropy_T, d_logprob_T
    bounds = terms.clip_low, terms.clip_high, terms.dual_clip, terms.kl_coef, terms.kl_clamp, terms.entropy_coef
    programs = token_programs(len(logprob_T))
    partial = stats if programs == 1 else stats.new_zeros(programs, 5)
    launch(
        policy_kernel,
        programs,
        *(*tensors, partial, len(logprob_T), *bounds),
        CISPO=terms.loss == "cispo",
        K2=terms.kl_estimate == "k2",
        **TOKEN_CONFIG,
    )
    if programs > 1:
        stats += partial.sum(0)
    return d_logprob_T


def policy_terms_torch(
    logprob_T: Tensor, vectors: TokenVectors, terms: TokenTerms, entropy_T: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """d loss / d logprob [T], and what policy_terms adds to its `stats`."""
    advantage_T, old_logprob_T, weight_T, correction_T, ref_logprob_T = vectors
    assert old_logprob_T is not None
    count = weight_T.count_nonzero()
    log_ratio = logprob_T - old_logprob_T
    difference = None if ref_logprob_T is None else ref_logprob_T - logprob_T
    if not all_count(count, len(weight_T)):
        # a token without weight takes no part, whatever its ratio: 0 * inf would be NaN
        live_T = weight_T != 0
        log_ratio, logprob_T, advantage_T = (torch.where(live_T, x, 0.0) for x in (log_ratio, logprob_T, advantage_T))
        correction_T, difference, entropy_T = (
            x if x is None else torch.where(live_T, x, 0.0) for x in (correction_T, difference, entropy_T)
        )
    ratio, loss_slope = log_ratio.exp(), -advantage_T
    clipped_ratio = ratio.clamp(1 - terms.clip_low, 1 + terms.clip_high)
    outside = ratio != clipped_ratio
    if terms.loss == "cispo":
        d = loss_slope * clipped_ratio
        token_loss = d * logprob_T
    else:
        plain, clipped = loss_slope * ratio, loss_slope * clipped_ratio
        token_loss = torch.maximum(plain, clipped)
        # where the two are equal the ratio is inside the clip range (or the advantage is 0): gradient flows, NaN too
        d = zero_where_less(plain, plain, clipped)
        if terms.dual_clip is not None:
            bound = loss_slope * terms.dual_clip
            beyond = (advantage_T < 0) & (token_loss > bound)
            token_loss, d = torch.where(beyond, bound, token_loss), d.masked_fill(beyond, 0.0)
    if correction_T is not None:
        # a factor of 0 leaves the term out, whatever the ratio: 0 * inf would be NaN
        left_out = correction_T == 0
        token_loss, d = ((correction_T * x).masked_fill(left_out, 0.0) for x in (token_loss, d))
    if difference is not None:
        slope = difference if terms.kl_estimate == "k2" else difference.expm1()
        if terms.kl_clamp is not None:
            slope = slope.masked_fill(token_kl(difference, terms.kl_estimate, None) > terms.kl_clamp, 0.0)
        token_loss = token_loss + terms.kl_coef * token_kl(difference, terms.kl_estimate, terms.kl_clamp)
        d = d - terms.kl_coef * slope
    if entropy_T is not None:
        token_loss = token_loss - terms.entropy_coef * entropy_T
    # in float32: what a token's estimate loses near 0 is noise, of which the mean has little
    approx_kl = log_ratio.expm1().sub_(log_ratio).sum()
    sums = [token_loss.mul_(weight_T).sum(), count, outside.count_nonzero(), approx_kl]
    return d.mul_(weight_T), sums if entropy_T is None else [*sums, entropy_T.sum()]
