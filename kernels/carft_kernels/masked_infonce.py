"""Masked InfoNCE between anchors and candidates.

    s_ij = cos(anchor_i, candidate_j),   p(i) the index of anchor i's positive
    l_i  = -min(s_ip(i), clamp) / tau + log sum_{j allowed for i} exp(s_ij / tau)
    loss = sum_i M_i l_i / max(sum_i M_i, 1)

Source: paper eq. 7. The clamp is on the numerator only: where it binds, the pull towards the positive ends. Kept for
backward: the inputs and two numbers a row; the similarities are computed again, which for embeddings of a few hundred
dimensions costs less than writing and reading them. FLOP: 2 N M D forward, 6 N M D backward. Memory: forward none of
[N, M] with Triton, a chunk of rows with torch; backward a chunk of rows. Accumulation: float32 (float64 for float64).
"""

# mypy: disable-error-code="no-untyped-def"

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from carft_kernels._matmul_kernels import (
    config_for,
    matmul_logprob,
    operand,
    product_tile,
    tile_logits,
    tile_mask,
    tile_of,
)
from carft_kernels._row_kernels import RowOptions, gradient_or_nan, split_index
from carft_kernels._runtime import (
    FUSED,
    LOG2E,
    Impl,
    accumulation_dtype,
    add_product_,
    check_bool,
    check_float,
    check_index_range,
    check_integer,
    check_like,
    check_positive,
    check_rows,
    check_same_dtype,
    chunk_size,
    head_logits,
    index_checks_on,
    launch,
    log_implementation,
    most_rows,
    rows_scratch,
    token_chunks,
    use_triton,
    wide_matmul,
)

_NORM_EPS = 1e-8  # that of torch.cosine_similarity
_NO_INDEX = -(1 << 31)  # no positive is ignored


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


@triton.jit
def inverse_norm_kernel(x, out, n, width, stride, eps, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(0, width, BLOCK_D):
        column = i + tl.arange(0, BLOCK_D)
        here = (row < n)[:, None] & (column < width)[None, :]
        v = tl.load(x + row[:, None] * stride + column[None, :], mask=here, other=0.0).to(tl.float32)
        squares += v * v
    norm = tl.sqrt(tl.sum(squares, 1))
    tl.store(out + row, 1.0 / tl.maximum(norm, eps), mask=row < n)


@triton.jit
def infonce_gradient_kernel(
    a,
    b,
    row_factor,
    column_factor,
    mask,
    positive,
    row_top,
    log_total,
    d_row,
    out,  # [m, n], rows `stride_out` apart: d loss / d (a_i . b_j)
    m,
    n,
    k,
    stride_a,
    stride_b,
    stride_out,
    scale,  # log2(e) / temperature
    inverse_temperature,
    positive_clamp,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of similarities, computed again, into the gradient of its products."""
    row_block, column_block = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    acc = product_tile(
        a, b, row_block, column_block, m, n, k, stride_a, stride_b, BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION
    )
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    x = tile_logits(acc, row_factor, column_factor, None, rows, columns, m, n, True, False)
    top = tl.load(row_top + rows, mask=rows < m, other=0.0)
    total = tl.load(log_total + rows, mask=rows < m, other=0.0)
    allowed = tile_mask(mask, rows, columns, m, n, MASK)
    p = tl.where(allowed, tl.exp2(tl.fma(x, scale, -top[:, None]) - total[:, None]), 0.0)
    pulled = (columns[None, :] == tl.load(positive + rows, mask=rows < m, other=-1)[:, None]) & (x <= positive_clamp)
    # d (a . b) = factors x d similarity
    factor = tl.load(d_row + rows, mask=rows < m, other=0.0) * inverse_temperature
    factor *= tl.load(row_factor + rows, mask=rows < m, other=0.0)
    column = tl.load(column_factor + columns, mask=columns < n, other=0.0)
    d = tl.where(pulled, p - 1.0, p) * factor[:, None] * column[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    place = out + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
    tl.store(place, d.to(out.dtype.element_ty), mask=inside)


NORM_CONFIG = {"BLOCK_N": 8, "BLOCK_D": 256, "num_warps": 4, **FUSED}


def _inverse_norm(x_ND: Tensor, via_triton: bool) -> Tensor:
    if not via_triton:
        return x_ND.to(accumulation_dtype(x_ND)).norm(dim=1).clamp(min=_NORM_EPS).reciprocal()
    out_N = x_ND.new_empty(len(x_ND), dtype=torch.float32)
    programs = triton.cdiv(len(x_ND), NORM_CONFIG["BLOCK_N"])
    launch(inverse_norm_kernel, programs, x_ND, out_N, *x_ND.shape, x_ND.stride(0), _NORM_EPS, **NORM_CONFIG)
    return out_N


@torch.library.custom_op("carft::masked_infonce", mutates_args=())
def _forward(
    anchor_ND: Tensor,
    candidate_MD: Tensor,
    positive_N: Tensor,
    row_mask_N: Tensor | None,
    candidate_mask: Tensor | None,
    temperature: float,
    positive_clamp: float,
    via_triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, row losses, and for the backward pass [2, N]: row maximum, log of the sum of exponentials below it."""
    log_implementation("masked_infonce", via_triton, anchor_ND.device.type)
    n, m = len(anchor_ND), len(candidate_MD)
    check_index_range("positive_N", positive_N, m)
    if candidate_mask is not None and index_checks_on(anchor_ND):
        _check_positives_allowed(positive_N, row_mask_N, candidate_mask.expand(n, m))
    inverse_N, inverse_M = _inverse_norm(anchor_ND, via_triton), _inverse_norm(candidate_MD, via_triton)
    stats_2N = inverse_N.new_empty(2, n)
    if via_triton:
        logprob_N, _, top_N, log_total_N = matmul_logprob(
            anchor_ND,
            candidate_MD,
            positive_N,
            RowOptions(temperature, None, _NO_INDEX, True),
            row_factor_M=inverse_N,
            column_factor_N=inverse_M,
            mask=None if candidate_mask is None else candidate_mask.view(torch.uint8),
            target_limit=positive_clamp,
            logprob_limit=float("inf"),
        )
        stats_2N[0], stats_2N[1], row_loss_N = top_N, log_total_N, -logprob_N
    else:
        row_loss_N = torch.empty_like(inverse_N)
        positive_N1, _, outside_N = split_index(positive_N, m)
        anchor_ND, candidate_MD = (x * y[:, None] for x, y in ((anchor_ND, inverse_N), (candidate_MD, inverse_M)))
        for rows, x in _similarity_chunks(anchor_ND, candidate_MD):
            positive = x.gather(1, positive_N1[rows])[:, 0].clamp(max=positive_clamp)
            if candidate_mask is not None:
                x.masked_fill_(~(candidate_mask if candidate_mask.ndim == 1 else candidate_mask[rows]), float("-inf"))
            top = x.amax(1)
            x.sub_(top.nan_to_num(neginf=0.0)[:, None])  # -inf - -inf where no candidate is allowed
            log_total = x.div_(temperature).exp_().sum(1).log_()
            row_loss_N[rows] = (top - positive) / temperature + log_total
            stats_2N[0, rows], stats_2N[1, rows] = top, log_total
        row_loss_N.masked_fill_(outside_N, torch.nan)
    if candidate_mask is not None:  # a row that does not count may have no candidate
        row_loss_N = row_loss_N.masked_fill(stats_2N[0] == float("-inf"), 0.0)
    if row_mask_N is None:
        return row_loss_N.sum() / max(n, 1), row_loss_N, stats_2N
    loss = torch.where(row_mask_N, row_loss_N, 0.0).sum() / row_mask_N.sum().clamp(min=1)
    return loss, row_loss_N, stats_2N


@_forward.register_fake
def _(anchor_ND: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = anchor_ND.shape[0], accumulation_dtype(anchor_ND)
    return (
        anchor_ND.new_empty((), dtype=dtype),
        anchor_ND.new_empty(n, dtype=dtype),
        anchor_ND.new_empty(2, n, dtype=dtype),
    )


def _check_positives_allowed(positive_N: Tensor, row_mask_N: Tensor | None, allowed_NM: Tensor) -> None:
    missing_N = ~allowed_NM.gather(1, positive_N[:, None].long())[:, 0]
    if row_mask_N is not None:
        missing_N &= row_mask_N
    if missing_N.any():
        row = int(missing_N.nonzero()[0])
        raise ValueError(f"candidate_mask leaves out candidate {int(positive_N[row])}, the positive of row {row}")


def _similarity_chunks(anchor_ND: Tensor, candidate_MD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    n = len(anchor_ND)
    for rows in token_chunks(n, chunk_size(n, len(candidate_MD), anchor_ND.device)):
        yield rows, head_logits(anchor_ND[rows], candidate_MD)


def _through_norm(gradient_ND: Tensor, x_ND: Tensor, inverse_N: Tensor) -> Tensor:
    """From the gradient of dot products with x_ND, already scaled by its inverse norms, to that of x_ND itself."""
    x = x_ND.to(gradient_ND.dtype)
    along_N1 = (gradient_ND * x).sum(1, keepdim=True) * inverse_N[:, None].square()
    return gradient_ND.sub_(x * along_N1).to(x_ND.dtype)


@torch.library.custom_op("carft::masked_infonce_backward", mutates_args=())
def _backward(
    anchor_ND: Tensor,
    candidate_MD: Tensor,
    positive_N: Tensor,
    candidate_mask: Tensor | None,
    stats_2N: Tensor,
    d_row_N: Tensor,
    temperature: float,
    positive_clamp: float,
    via_triton: bool,
) -> tuple[Tensor, Tensor]:
    n, m, dtype = len(anchor_ND), len(candidate_MD), stats_2N.dtype
    if n == 0:
        return torch.zeros_like(anchor_ND), torch.zeros_like(candidate_MD)
    inverse_N, inverse_M = _inverse_norm(anchor_ND, via_triton), _inverse_norm(candidate_MD, via_triton)
    # the row loss of a row without candidates is the constant 0
    top_N, log_total_N = stats_2N
    positive_N1, _, outside_N = split_index(positive_N, m)
    d_row_N = gradient_or_nan(torch.where(top_N == float("-inf"), 0.0, d_row_N), outside_N)
    d_anchor_ND = torch.empty(anchor_ND.shape, dtype=dtype, device=anchor_ND.device)
    d_candidate_MD = torch.zeros(candidate_MD.shape, dtype=dtype, device=anchor_ND.device)
    if not via_triton:
        d_logit_N = d_row_N / temperature
        anchor_hat, candidate_hat = anchor_ND * inverse_N[:, None], candidate_MD * inverse_M[:, None]
        for rows, x in _similarity_chunks(anchor_hat, candidate_hat):
            column = positive_N1[rows]
            pull = (x.gather(1, column)[:, 0] <= positive_clamp) * d_logit_N[rows]
            if candidate_mask is not None:
                x.masked_fill_(~(candidate_mask if candidate_mask.ndim == 1 else candidate_mask[rows]), float("-inf"))
            x.sub_(top_N[rows, None].nan_to_num(neginf=0.0)).div_(temperature)
            d = x.sub_(log_total_N[rows, None].nan_to_num(neginf=0.0)).exp_().mul_(d_logit_N[rows, None])
            d.scatter_add_(1, column, -pull[:, None])
            wide_matmul(d, candidate_hat, out=d_anchor_ND[rows])
            add_product_(d_candidate_MD, d.T, anchor_hat[rows])
        d_anchor_ND.mul_(inverse_N[:, None])
        d_candidate_MD.mul_(inverse_M[:, None])
        return _through_norm(d_anchor_ND, anchor_ND, inverse_N), _through_norm(d_candidate_MD, candidate_MD, inverse_M)
    config = config_for(anchor_ND, candidate_MD, plain=False)
    chunks = token_chunks(n, chunk_size(n, m, anchor_ND.device))
    # one gradient among thousands of candidates is below what float16 holds
    product_dtype = torch.float32 if anchor_ND.dtype == torch.float16 else anchor_ND.dtype
    candidate_product_MD = candidate_MD.to(product_dtype)
    scratch = rows_scratch(anchor_ND, most_rows(chunks), m, product_dtype)
    mask = None if candidate_mask is None else candidate_mask.view(torch.uint8)
    candidates = operand(candidate_MD, config.block_n, config)
    for rows in chunks:
        a = anchor_ND[rows]
        d = scratch[: len(a)]
        masks = mask if mask is None or mask.ndim == 1 else mask[rows]
        launch(
            infonce_gradient_kernel,
            triton.cdiv(len(a), config.block_m) * triton.cdiv(m, config.block_n),
            *(operand(a, config.block_m, config), candidates, inverse_N[rows], inverse_M, masks),
            *(x[rows] for x in (positive_N, top_N, log_total_N, d_row_N)),
            *(d, len(a), m, a.shape[1], a.stride(0), candidate_MD.stride(0), d.stride(0)),
            *(LOG2E / temperature, 1 / temperature, positive_clamp),
            MASK=0 if mask is None else mask.ndim,
            **config.launch(anchor_ND.dtype),
        )
        wide_matmul(d, candidate_product_MD, out=d_anchor_ND[rows])
        add_product_(d_candidate_MD, d.T, a.to(product_dtype))
    return _through_norm(d_anchor_ND, anchor_ND, inverse_N), _through_norm(d_candidate_MD, candidate_MD, inverse_M)


@_backward.register_fake
def _(anchor_ND: Tensor, candidate_MD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return anchor_ND.new_empty(anchor_ND.shape), candidate_MD.new_empty(candidate_MD.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.temperature, ctx.positive_clamp, ctx.via_triton = inputs
    ctx.set_materialize_grads(False)  # no zeros for the outputs without a gradient
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[2])


def _autograd(ctx: Any, d_loss: Tensor | None, d_row_loss_N: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    anchor_ND, candidate_MD, positive_N, row_mask_N, candidate_mask, stats_2N = ctx.saved_tensors
    d_row_N = stats_2N.new_zeros(len(anchor_ND)) if d_row_loss_N is None else d_row_loss_N
    if d_loss is not None and row_mask_N is None:
        d_row_N = d_row_N + d_loss / max(len(anchor_ND), 1)
    elif d_loss is not None:
        d_row_N = d_row_N + row_mask_N * (d_loss / row_mask_N.sum().clamp(min=1))
    d_anchor_ND, d_candidate_MD = _backward(
        anchor_ND,
        candidate_MD,
        positive_N,
        candidate_mask,
        stats_2N,
        d_row_N,
        ctx.temperature,
        ctx.positive_clamp,
        ctx.via_triton,
    )
    return d_anchor_ND, d_candidate_MD, None, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


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
        positive_N: int64 or int32 [N], index of each anchor's positive, in [0, M). Others raise where index checks are
            on (see `set_index_checks`); where they are off they give a row loss of NaN. i -> i when None, which needs
            M >= N.
        row_mask_N: bool [N], the rows that count; all when None.
        candidate_mask: bool [M] or [N, M], the candidates in the denominator; all when None. A counted row's positive
            must be among them.
        temperature: tau, above 0.
        positive_clamp: the positive's cosine is clamped to at most this in the numerator.
        impl: "auto" (Triton on CUDA, torch elsewhere and for float64), "triton" or "torch".

    Returns:
        loss (scalar; 0 with zero gradient when no row counts) and row losses [N], float32 (float64 for float64 input);
        a row that does not count may have no candidate at all, then its row loss is 0. Gradients to both sides.

    Source: paper eq. 7; InfoNCE, van den Oord et al. 2018.

    Raises:
        ValueError: naming the argument, what was seen and what is allowed.
    """
    check_float("anchor_ND", anchor_ND, 2)
    check_float("candidate_MD", candidate_MD, 2)
    via_triton = use_triton("masked_infonce", impl, anchor_ND)
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
        check_integer("positive_N", positive_N)
        positive_N = positive_N.contiguous()
    if row_mask_N is not None:
        check_like("row_mask_N", row_mask_N, (n,), "anchor_ND", anchor_ND)
        check_bool("row_mask_N", row_mask_N)
    if candidate_mask is not None:
        check_like("candidate_mask", candidate_mask, (m,) if candidate_mask.ndim == 1 else (n, m), "N, M", anchor_ND)
        check_bool("candidate_mask", candidate_mask)
        candidate_mask = candidate_mask.contiguous()
    if via_triton:
        check_rows("anchor_ND", anchor_ND)
        check_rows("candidate_MD", candidate_MD)
    loss, row_loss_N, _ = _forward(
        anchor_ND, candidate_MD, positive_N, row_mask_N, candidate_mask, temperature, positive_clamp, via_triton
    )
    return loss, row_loss_N
