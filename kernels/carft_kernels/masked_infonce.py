"""Masked InfoNCE between anchors and candidates.

    s_ij = cos(anchor_i, candidate_j),   p(i) the index of anchor i's positive
    l_i  = -min(s_ip(i), clamp) / tau + log sum_{j allowed for i} exp(s_ij / tau)
    loss = sum_i M_i l_i / max(sum_i M_i, 1)

Source: paper eq. 7. The clamp is on the numerator only: where it binds, the pull towards the positive ends. Kept for
backward: the two normalised sides and the [N, M] similarities. Accumulation: float32 (float64 for float64 input).
"""

import torch
from torch import Tensor

from carft_kernels._runtime import (
    Impl,
    accumulation_dtype,
    check_bool,
    check_float,
    check_impl,
    check_index,
    check_like,
    check_positive,
    check_same_dtype,
    index_checks_on,
)

_NORM_EPS = 1e-8  # that of torch.cosine_similarity


def masked_infonce_reference(
    anchor_ND: Tensor,
    candidate_MD: Tensor,
    *,
    positive_N: Tensor | None = None,
    row_mask_N: Tensor | None = None,
    candidate_mask: Tensor | None = None,
    temperature: float = 0.2,
    positive_clamp: float = 0.9,
) -> tuple[Tensor, Tensor]:
    """The obvious expression, row by row."""
    rows = []
    for i in range(len(anchor_ND)):
        similarity_M = torch.cosine_similarity(anchor_ND[i : i + 1], candidate_MD, dim=1, eps=_NORM_EPS)
        positive = similarity_M[i if positive_N is None else int(positive_N[i])]
        if candidate_mask is not None:
            similarity_M = similarity_M[candidate_mask if candidate_mask.ndim == 1 else candidate_mask[i]]
        rows.append((similarity_M / temperature).logsumexp(0) - positive.clamp(max=positive_clamp) / temperature)
    row_loss_N = torch.stack(rows)
    mask_N = torch.ones_like(row_loss_N, dtype=torch.bool) if row_mask_N is None else row_mask_N
    return row_loss_N[mask_N].sum() / max(int(mask_N.sum()), 1), row_loss_N


def masked_infonce(
    anchor_ND: Tensor,
    candidate_MD: Tensor,
    *,
    positive_N: Tensor | None = None,
    row_mask_N: Tensor | None = None,
    candidate_mask: Tensor | None = None,
    temperature: float = 0.2,
    positive_clamp: float = 0.9,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Contrastive loss of N anchors against M candidates, averaged over the rows of `row_mask_N`.

    Equivalent: `s = normalize(anchor) @ normalize(candidate).T`; `rows = (s / tau).masked_fill(~candidate_mask,
    -inf).logsumexp(1) - s[range(N), positive].clamp(max=positive_clamp) / tau`; `loss = rows[row_mask].mean()`.

    Args:
        anchor_ND: float [N, D], any float dtype.
        candidate_MD: [M, D], dtype and device of `anchor_ND`.
        positive_N: int64 or int32 [N], index of each anchor's positive; i -> i when None, which needs M >= N.
        row_mask_N: bool [N], the rows that count; all when None.
        candidate_mask: bool [M] or [N, M], the candidates in the denominator; all when None. A counted row's positive
            must be among them.
        temperature: tau, above 0.
        positive_clamp: the positive's cosine is clamped to at most this in the numerator.
        impl: "auto" or "torch".

    Returns:
        loss (scalar; 0 with zero gradient when no row counts) and row losses [N], float32 (float64 for float64 input);
        a row that does not count may have no candidate at all, then its row loss is 0. Gradients to both sides.

    Source: paper eq. 7; InfoNCE, van den Oord et al. 2018.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    check_impl("masked_infonce", impl)
    check_float("anchor_ND", anchor_ND, 2)
    check_float("candidate_MD", candidate_MD, 2)
    n, m = len(anchor_ND), len(candidate_MD)
    check_like("candidate_MD", candidate_MD, (m, anchor_ND.shape[1]), "anchor_ND", anchor_ND)
    check_same_dtype("candidate_MD", candidate_MD, "anchor_ND", anchor_ND)
    check_positive("temperature", temperature)
    if positive_N is None:
        if m < n:
            raise ValueError(f"positive_N is None with {n} anchors and {m} candidates: anchor i needs candidate i")
        positive_N = torch.arange(n, device=anchor_ND.device)
    else:
        check_like("positive_N", positive_N, (n,), "anchor_ND", anchor_ND)
        check_index("positive_N", positive_N, m)
    if row_mask_N is None:
        row_mask_N = torch.ones(n, dtype=torch.bool, device=anchor_ND.device)
    else:
        check_like("row_mask_N", row_mask_N, (n,), "anchor_ND", anchor_ND)
        check_bool("row_mask_N", row_mask_N)
    column_N1 = positive_N.long()[:, None]
    if candidate_mask is not None:
        check_like("candidate_mask", candidate_mask, (m,) if candidate_mask.ndim == 1 else (n, m), "N, M", anchor_ND)
        check_bool("candidate_mask", candidate_mask)
        allowed_NM = candidate_mask.expand(n, m)
        if index_checks_on(anchor_ND):
            missing = row_mask_N & ~allowed_NM.gather(1, column_N1)[:, 0]
            if missing.any():
                row = int(missing.nonzero()[0])
                raise ValueError(
                    f"candidate_mask leaves out candidate {int(positive_N[row])}, the positive of row {row}"
                )

    dtype = accumulation_dtype(anchor_ND)
    anchor_ND, candidate_MD = (
        torch.nn.functional.normalize(x.to(dtype), dim=1, eps=_NORM_EPS) for x in (anchor_ND, candidate_MD)
    )
    similarity_NM = anchor_ND @ candidate_MD.T
    positive_sim_N = similarity_NM.gather(1, column_N1)[:, 0].clamp(max=positive_clamp)
    logits_NM = similarity_NM / temperature
    if candidate_mask is not None:
        # An empty denominator would turn the zero gradient of a row that does not count into NaN: such a row is taken
        # over all candidates, and its row loss then set to 0.
        empty_N = ~row_mask_N & ~allowed_NM.any(1)
        logits_NM = logits_NM.masked_fill(~(allowed_NM | empty_N[:, None]), float("-inf"))
    row_loss_N = logits_NM.logsumexp(1) - positive_sim_N / temperature
    if candidate_mask is not None:
        row_loss_N = row_loss_N.masked_fill(empty_N, 0.0)
    counted = row_mask_N.sum().clamp(min=1)
    return torch.where(row_mask_N, row_loss_N, 0.0).sum() / counted, row_loss_N
