"""Masked InfoNCE between anchors and candidates.

    s_ij = cos(anchor_i, candidate_j),   p(i) the index of anchor i's positive
    l_i  = -min(s_ip(i), clamp) / tau + log sum_{j allowed for i} exp(s_ij / tau)
    loss = sum_i M_i l_i / max(sum_i M_i, 1)

Source: paper eq. 7. The clamp is on the numerator only: where it binds, the pull towards the positive ends. Kept for
backward: the inputs and two numbers a row; the similarities are computed again, which for embeddings of a few hundred
dimensions costs less than writing and reading them; a CPU keeps up to 2^18. FLOP: 2 N M D forward, 6 N M D backward.
Memory: forward none of [N, M] with Triton, a chunk of rows with torch; backward a chunk of rows. Accumulation: float32
(float64 for float64).
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
    alone,
    call,
    check_bool,
    check_float,
    check_index_range,
    check_integer,
    check_like,
    check_positive,
    check_rows,
    check_same_dtype,
    chunk_size,
    differentiable,
    full_float32,
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
_SMALL = 1 << 18  # similarities


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
    row_scale,
    column_scale,
    out,  # [m, n], rows `stride_out` apart: d row loss / d (similarity / temperature), times both scales
    m,
    n,
    k,
    stride_a,
    stride_b,
    stride_out,
    scale,  # log2(e) / temperature
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
    x = tile_logits(acc, row_factor, column_factor, None, rows, columns, m, n)
    top = tl.load(row_top + rows, mask=rows < m, other=0.0)
    total = tl.load(log_total + rows, mask=rows < m, other=0.0)
    allowed = tile_mask(mask, rows, columns, m, n, MASK)
    p = tl.where(allowed, tl.exp2(tl.fma(x, scale, -top[:, None]) - total[:, None]), 0.0)
    pulled = (columns[None, :] == tl.load(positive + rows, mask=rows < m, other=-1)[:, None]) & (x <= positive_clamp)
    row = tl.load(row_scale + rows, mask=rows < m, other=0.0)
    column = tl.load(column_scale + columns, mask=columns < n, other=0.0)
    d = tl.where(pulled, p - 1.0, p) * row[:, None] * column[None, :]
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
            RowOptions(temperature, None, 0, 1.0, _NO_INDEX, True),
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
            mask = candidate_mask if candidate_mask is None or candidate_mask.ndim == 1 else candidate_mask[rows]
            positive_n1 = x.gather(1, positive_N1[rows])
            row_loss_N[rows], top, total = _row_losses_(x, positive_n1, mask, temperature, positive_clamp)
            stats_2N[0, rows], stats_2N[1, rows] = top, total.log_()
        row_loss_N.masked_fill_(outside_N, torch.nan)
    if candidate_mask is not None:  # a row that does not count may have no candidate
        row_loss_N = row_loss_N.masked_fill(stats_2N[0] == float("-inf"), 0.0)
    return _mean(row_loss_N, row_mask_N), row_loss_N, stats_2N


@_forward.register_fake
def _(anchor_ND: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = anchor_ND.shape[0], accumulation_dtype(anchor_ND)
    return (
        anchor_ND.new_empty((), dtype=dtype),
        anchor_ND.new_empty(n, dtype=dtype),
        anchor_ND.new_empty(2, n, dtype=dtype),
    )


def _row_losses_(
    x: Tensor, positive_n1: Tensor, candidate_mask: Tensor | None, temperature: float, positive_clamp: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses, row maximum and sum of exponentials below it, which similarities [n, M] become in place."""
    if candidate_mask is None:
        top = shift = x.amax(1)
    else:
        top = x.masked_fill_(~candidate_mask, float("-inf")).amax(1)
        shift = top.nan_to_num(neginf=0.0)  # -inf - -inf where no candidate is allowed
    total = x.sub_(shift[:, None]).mul_(1 / temperature).exp_().sum(1)
    return (top - positive_n1[:, 0].clamp(max=positive_clamp)).div_(temperature).add_(total.log()), top, total


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


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mantissa, in [0.5, 1) in size, and power of two, 0 for 0; x is their product."""
    power = torch.exp2(torch.frexp(x).exponent.to(x.dtype))
    return x / power, torch.where(x == 0, 0.0, power)


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
    d_logit_N = d_row_N / temperature
    row_scale_N, column_scale_M = d_logit_N * inverse_N, inverse_M
    half = anchor_ND.dtype == torch.float16
    if half:
        # A gradient among thousands of candidates is below what float16 holds, so what is multiplied is scaled to 2^15.
        # d takes the mantissas of the factors; their powers of two go, exactly, to the embeddings: about unit vectors.
        (row_scale_N, row_power_N), (column_scale_M, column_power_M) = _split(inverse_N), _split(inverse_M)
        logit_scale_N, logit_power_N = _split(d_logit_N)
        largest = logit_power_N.amax().clamp(min=torch.finfo(dtype).tiny)
        row_scale_N, column_scale_M = row_scale_N * logit_scale_N, column_scale_M * 2.0**15
        anchor_power_N1 = (row_power_N * (logit_power_N / largest) * 2.0**14)[:, None]
        factor_MD = (candidate_MD * (column_power_M * 2.0**14)[:, None]).to(anchor_ND.dtype)
    else:
        factor_MD = candidate_MD
    scratch = rows_scratch(anchor_ND, most_rows(chunks), m)
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
            *(x[rows] for x in (positive_N, top_N, log_total_N, row_scale_N)),
            column_scale_M,
            *(d, len(a), m, a.shape[1], a.stride(0), candidate_MD.stride(0), d.stride(0)),
            *(LOG2E / temperature, positive_clamp),
            MASK=0 if mask is None else mask.ndim,
            **config.launch(anchor_ND.dtype),
        )
        wide_matmul(d, factor_MD, out=d_anchor_ND[rows])
        add_product_(d_candidate_MD, d.T, (a * anchor_power_N1[rows]).to(a.dtype) if half else a)
    if half:
        d_anchor_ND.mul_((row_power_N * logit_power_N * 2.0**-29)[:, None])
        d_candidate_MD.mul_((column_power_M * largest * 2.0**-29)[:, None])
    return _through_norm(d_anchor_ND, anchor_ND, inverse_N), _through_norm(d_candidate_MD, candidate_MD, inverse_M)


@_backward.register_fake
def _(anchor_ND: Tensor, candidate_MD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return anchor_ND.new_empty(anchor_ND.shape), candidate_MD.new_empty(candidate_MD.shape)


def _mean(row_loss_N: Tensor, row_mask_N: Tensor | None) -> Tensor:
    """Over the rows that count; 0 where none does."""
    if row_mask_N is None:
        return row_loss_N.sum() / max(len(row_loss_N), 1)
    return torch.where(row_mask_N, row_loss_N, 0.0).sum() / row_mask_N.sum().clamp(min=1)


def _d_rows(stats_2N: Tensor, row_mask_N: Tensor | None, d_loss: Tensor | None, d_row_loss_N: Tensor | None) -> Tensor:
    d_row_N = torch.zeros_like(stats_2N[0]) if d_row_loss_N is None else d_row_loss_N
    if d_loss is None:
        return d_row_N
    if row_mask_N is None:
        return d_row_N + d_loss / max(len(d_row_N), 1)
    return d_row_N + row_mask_N * (d_loss / row_mask_N.sum().clamp(min=1))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.temperature, ctx.positive_clamp, ctx.via_triton = inputs
    ctx.set_materialize_grads(False)  # no zeros for the outputs without a gradient
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[2])


def _autograd(ctx: Any, d_loss: Tensor | None, d_row_loss_N: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    anchor_ND, candidate_MD, positive_N, row_mask_N, candidate_mask, *_, stats_2N = ctx.saved_tensors
    d_row_N = _d_rows(stats_2N, row_mask_N, d_loss, d_row_loss_N)
    rest = ctx.temperature, ctx.positive_clamp, ctx.via_triton
    gradients = call(_backward, anchor_ND, candidate_MD, positive_N, candidate_mask, stats_2N, d_row_N, *rest)
    return *gradients, None, None, None, None, None, None


_infonce = differentiable(_forward, _autograd, _setup_context)


class _Small(torch.autograd.Function):
    """The torch implementation of few similarities, whose time is that of its operations: all rows at once, kept."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor_ND: Tensor,
        candidate_MD: Tensor,
        positive_N: Tensor,
        row_mask_N: Tensor | None,
        candidate_mask: Tensor | None,
        temperature: float,
        positive_clamp: float,
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(anchor_ND)
        norm_N1, norm_M1 = (
            torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype).clamp_(min=_NORM_EPS)
            for x in (anchor_ND, candidate_MD)
        )
        anchor_hat, candidate_hat = anchor_ND / norm_N1, candidate_MD / norm_M1
        with full_float32():
            x = torch.mm(anchor_hat, candidate_hat.T, out=norm_N1.new_empty(len(norm_N1), len(norm_M1)))
        positive_N1 = positive_N[:, None].long()
        positive_n1 = x.gather(1, positive_N1)
        row_loss_N, top_N, total_N = _row_losses_(x, positive_n1, candidate_mask, temperature, positive_clamp)
        stats_2N = torch.stack([top_N, total_N.log()])
        # d row loss / d (similarity / temperature); of a row with candidates the sum is at least 1
        slope_NM = x.div_(total_N.clamp_(min=1.0)[:, None])
        slope_NM.scatter_add_(1, positive_N1, (positive_n1 <= positive_clamp).to(dtype).neg_())
        if candidate_mask is not None:  # a row that does not count may have no candidate
            none_N = top_N == float("-inf")
            row_loss_N.masked_fill_(none_N, 0.0)
            slope_NM.masked_fill_(none_N[:, None], 0.0)
        tensors = anchor_ND, candidate_MD, positive_N, row_mask_N, candidate_mask
        ctx.save_for_backward(*tensors, anchor_hat, candidate_hat, norm_N1, norm_M1, slope_NM, stats_2N)
        ctx.temperature, ctx.positive_clamp, ctx.via_triton = temperature, positive_clamp, False
        ctx.set_materialize_grads(False)
        return _mean(row_loss_N, row_mask_N), row_loss_N

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, d_row_loss_N: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # for second derivatives, which the operator refuses
            return _autograd(ctx, d_loss, d_row_loss_N)[:-1]
        anchor_ND, _, _, row_mask_N, _, anchor_hat, candidate_hat, norm_N1, norm_M1, slope_NM, stats_2N = (
            ctx.saved_tensors
        )
        d_row_N = _d_rows(stats_2N, row_mask_N, d_loss, d_row_loss_N)
        d = slope_NM * (d_row_N / ctx.temperature)[:, None]
        found = []
        for a, b, hat, norm in ((d, candidate_hat, anchor_hat, norm_N1), (d.T, anchor_hat, candidate_hat, norm_M1)):
            gradient = torch.mm(a, b, out=torch.empty_like(hat))
            along = (gradient * hat).sum(1, keepdim=True)
            found.append(gradient.sub_(hat * along).div_(norm).to(anchor_ND.dtype))
        return *found, None, None, None, None, None


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
        positive_clamp: the positive's cosine is clamped to at most this in the numerator; above -1, and from 1 on no
            bound.
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
    if not positive_clamp > -1:
        raise ValueError(f"positive_clamp = {positive_clamp}: expected a number above -1; from 1 on it is no bound")
    given = positive_N is not None
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
    tensors = anchor_ND, candidate_MD, positive_N, row_mask_N, candidate_mask
    if not via_triton and 0 < n * m <= _SMALL and alone(anchor_ND) and index_checks_on(anchor_ND):
        if given:
            check_index_range("positive_N", positive_N, m)
        if candidate_mask is not None:
            _check_positives_allowed(positive_N, row_mask_N, candidate_mask.expand(n, m))
        return _Small.apply(*tensors, temperature, positive_clamp)
    loss, row_loss_N, _ = _infonce(*tensors, temperature, positive_clamp, via_triton)
    return loss, row_loss_N
