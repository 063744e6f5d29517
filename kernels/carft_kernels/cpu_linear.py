"""`torch.nn.functional.linear` for float32 on a CPU, its matmuls by oneDNN.

    y = x weight^T + bias

torch takes oneDNN for half precision and MKL for float32, which on an AMD processor with AVX-512 may be half as fast
(docs/LOG.md). With AVX2 alone MKL is the faster one, and computes here too.
The weight is read as it is, and kept for backward with x. Cost: 2 N M K, backward 4 N M K, as torch's.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from carft_kernels import _runtime
from carft_kernels._runtime import check_local, linear


@torch.library.custom_op("carft::cpu_linear", mutates_args=())
def _forward(x: Tensor, weight_MK: Tensor, bias_M: Tensor | None) -> Tensor:
    return linear(x.reshape(-1, x.shape[-1]), weight_MK, bias_M).view(*x.shape[:-1], weight_MK.shape[0])


@_forward.register_fake
def _(x: Tensor, weight_MK: Tensor, bias_M: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_MK.shape[0])


def _product(d_NM: Tensor, x_NK: Tensor) -> Tensor:
    """d^T x. oneDNN transposes its left factor in memory: the narrower one, if the product's own transpose is less."""
    if d_NM.shape[1] >= 3 * x_NK.shape[1]:
        return linear(x_NK.T, d_NM.T).T.contiguous()
    return linear(d_NM.T, x_NK.T)


@torch.library.custom_op("carft::cpu_linear_backward", mutates_args=())
def _backward(
    d_y: Tensor, x: Tensor, weight_MK: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """d_x, d_weight, d_bias; empty where not needed."""
    d_NM, x_NK = d_y.reshape(-1, d_y.shape[-1]), x.reshape(-1, x.shape[-1])
    return (
        linear(d_NM, weight_MK.T).view(x.shape) if need_x else x.new_empty(0),
        _product(d_NM, x_NK) if need_weight else x.new_empty(0),
        d_NM.sum(0) if need_bias else x.new_empty(0),
    )


@_backward.register_fake
def _(
    d_y: Tensor, x: Tensor, weight_MK: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else 0),
        x.new_empty(weight_MK.shape if need_weight else 0),
        x.new_empty(weight_MK.shape[0] if need_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_MK, _ = inputs
    ctx.save_for_backward(x, weight_MK)


def _autograd(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    found = _backward(d_y, *ctx.saved_tensors, *needed)
    return tuple(d if need else None for d, need in zip(found, needed, strict=True))


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.carft.cpu_linear)
def _(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * _size(x) * weight[0]


@register_flop_formula(torch.ops.carft.cpu_linear_backward)
def _(d_y: Any, x: Any, weight: Any, need_x: bool, need_weight: bool, *_: Any, **__: Any) -> int:
    return 2 * _size(x) * weight[0] * (need_x + need_weight)


def _size(shape: Any) -> int:
    return torch.Size(shape).numel()


def cpu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear(x, weight, bias)`, by oneDNN for float32 on a CPU, else by torch's own kernels.

    Args:
        x: [..., K].
        weight: [M, K].
        bias: [M].

    Returns:
        [..., M]. Can be differentiated once, with respect to all three. Under autocast, for other dtypes, devices and
        shapes of the bias, for small matrices, on processors with AVX2 alone, with `torch.backends.mkldnn.enabled` off,
        and where torch was built without oneDNN: torch's own result.

    Raises:
        ValueError: where the weight or the bias is a DTensor and x is not. Where all three are, torch computes.
        RuntimeError: torch's own, for shapes that do not go together.
    """
    if hasattr(x, "full_tensor"):
        return torch.nn.functional.linear(x, weight, bias)
    check_local("weight", weight)
    if bias is not None:
        check_local("bias", bias)
    takes = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.ndim == 2
        and x.ndim > 0
        and x.shape[-1] == weight.shape[1]
        and weight.numel() > 0
        and (bias is None or (bias.dtype == torch.float32 and bias.shape == weight.shape[:1]))
    )
    if not takes or not _runtime.ONEDNN or torch.is_autocast_enabled("cpu"):
        return torch.nn.functional.linear(x, weight, bias)
    return _forward(x, weight, None if bias is None else bias.contiguous())
