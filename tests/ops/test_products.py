"""Which matrix products the operators ask for: their dtypes on CUDA, without one, and torch's float32 precision."""

import sys
from typing import Any

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

import carft_kernels as ck
from carft_kernels import _runtime

from .test_triton import DEVICE, randint, randn

T, V, D = 12, 40, 16
PRODUCTS = {"mm", "addmm", "addmm_", "linear", "matmul", "bmm", "_linear_pointwise"}


class Products(TorchDispatchMode):
    """(name, dtypes of the factors, dtype of the result, torch's float32 precision then) of every product."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, torch.dtype, torch.dtype, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "carft":
            with self:
                return OPDEFS[func._name.removesuffix(".default")]._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            factor = args[1 if name.startswith("addmm") else 0]
            self.found.append((name, factor.dtype, result.dtype, torch.get_float32_matmul_precision()))
        return result


HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def like_cuda(monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    """Tensors on the device "meta" take the way of a GPU's; they have no data, and no kernel runs."""
    monkeypatch.setattr(_runtime, "_on_cuda", lambda x: x.device.type == "meta")
    for module in ("linear_logprob", "linear_policy_loss"):
        monkeypatch.setattr(sys.modules[f"carft_kernels.{module}"], "logprob_backward", lambda *_, **__: None)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.usefixtures("like_cuda")
def test_half_precision_products_on_cuda_are_summed_in_float32(dtype: torch.dtype) -> None:
    a, b = torch.empty(T, V, dtype=dtype, device="meta"), torch.empty(V, D, dtype=dtype, device="meta")
    with Products() as products:
        for out_dtype in (dtype, torch.float32):
            _runtime.wide_matmul(a, b, out=torch.empty(T, D, dtype=out_dtype, device="meta"))
        assert _runtime.product(a, b).dtype == dtype
        _runtime.add_product_(torch.empty(V, D, device="meta"), a.T, torch.empty(T, D, dtype=dtype, device="meta"))
    assert [x[1:3] for x in products.found] == [(dtype, torch.float32)] * 4


@pytest.mark.parametrize("via_triton", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.usefixtures("like_cuda")
def test_linear_operators_on_cuda_sum_in_float32(dtype: torch.dtype, via_triton: bool) -> None:
    """Logits, d_hidden and d_weight: every product between the kernels."""
    hidden, weight, bias = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((T, D), (V, D), (V,)))
    target = torch.empty(T, dtype=torch.int64, device="meta")
    vector = torch.empty(T, device="meta")
    with Products() as products:
        backward = OPDEFS["carft::linear_logprob_backward"]._init_fn
        gradients = backward(hidden, weight, target, bias, *[vector] * 4, None, 1.0, -100, True, True, True, via_triton)
    assert [g.dtype for g in gradients] == [dtype] * 3
    assert [x[1:3] for x in products.found] == [(dtype, torch.float32)] * 3
    if via_triton:
        return
    with Products() as products:
        forward = OPDEFS["carft::linear_policy_loss_of_all"]._init_fn
        numbers = (0.2, 0.2, 0.0, 0.0, 1.0, -100, T, False)
        *_, d_hidden, d_weight = forward(
            hidden, weight, target, vector, vector, vector, None, *numbers, True, True, via_triton
        )
    assert d_hidden.dtype == d_weight.dtype == dtype
    assert [x[1:3] for x in products.found] == [(dtype, torch.float32)] * 3
