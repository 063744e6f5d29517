"""Which matrix products the operators ask for: their dtypes on CUDA, without one, and torch's float32 precision."""

import sys
from typing import Any

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

import carft_kernels as ck
from carft_kernels import _matmul_kernels, _row_kernels, _runtime
from carft_kernels._policy_kernels import TokenTerms
from carft_kernels._row_kernels import RowOptions

from .checks import DEVICE, randint, randn
from .conftest import computed

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
        result = computed(func, args, kwargs or {})
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
    for module in (_row_kernels, _matmul_kernels):
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)


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


@pytest.mark.parametrize("top", [(0, 1.0), (5, 0.9)])
@pytest.mark.parametrize("via_triton", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.usefixtures("like_cuda")
def test_linear_operators_on_cuda_sum_in_float32(dtype: torch.dtype, via_triton: bool, top: tuple[int, float]) -> None:
    """Logits, d_hidden and d_weight: every product between the kernels, one of which computes Triton's logits."""
    hidden, weight, bias = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((T, D), (V, D), (V,)))
    target = torch.empty(T, dtype=torch.int64, device="meta")
    vector = torch.empty(T, device="meta")
    with Products() as products:
        backward = OPDEFS["carft::linear_logprob_backward"]._init_fn
        options = RowOptions(1.0, None, *top, -100, via_triton)
        rest = (*options, T, None, V, vector, None, None, *[True] * 3)
        gradients = backward(hidden, weight, bias, target, *[vector] * 4, *rest)
    assert [g.dtype for g in gradients] == [dtype] * 3
    assert [x[1:3] for x in products.found] == [(dtype, torch.float32)] * (2 if via_triton else 3)
    if via_triton:
        return
    with Products() as products:
        forward = OPDEFS["carft::linear_policy_loss_of_all"]._init_fn
        rest = (*TokenTerms(), *options, T, None, V, 0.0, False, *[True] * 3)
        *_, d_hidden, d_weight, d_bias = forward(hidden, weight, bias, target, *[vector] * 3, None, None, *rest)
    assert [d_hidden.dtype, d_weight.dtype, d_bias.dtype] == [dtype, torch.float32, torch.float32]
    assert [x[1:3] for x in products.found] == [(dtype, torch.float32)] * 3


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.usefixtures("like_cuda")
def test_the_contrastive_loss_on_cuda_multiplies_in_half_precision(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both gradients' products, float16 too, whose factors are scaled; the sums are float32."""
    monkeypatch.setattr(sys.modules["carft_kernels.masked_infonce"], "launch", lambda *_, **__: None)
    anchor, candidate = torch.empty(T, D, dtype=dtype, device="meta"), torch.empty(V, D, dtype=dtype, device="meta")
    positive, stats = torch.empty(T, dtype=torch.int64, device="meta"), torch.empty(2, T, device="meta")
    with Products() as products:
        backward = OPDEFS["carft::masked_infonce_backward"]._init_fn
        gradients = backward(anchor, candidate, positive, None, stats, stats[0], 0.2, 0.9, True)
    assert [g.dtype for g in gradients] == [dtype] * 2
    assert [x[1:3] for x in products.found] == [(dtype, torch.float32)] * 2


@pytest.mark.usefixtures("like_cuda")
def test_flop_of_the_products_on_cuda_are_counted(largest_tensor: Any) -> None:
    """There a dtype follows the factors; logits, d_hidden and d_weight are 2 T V D each."""
    hidden, weight = (torch.empty(n, D, dtype=torch.bfloat16, device="meta") for n in (T, V))
    target, vector = torch.empty(T, dtype=torch.int64, device="meta"), torch.empty(T, device="meta")
    with largest_tensor:
        backward = OPDEFS["carft::linear_logprob_backward"]._init_fn
        options = (*RowOptions(1.0, None, 0, 1.0, -100, False), T, None, V, vector, None, None, True, True, False)
        backward(hidden, weight, None, target, *[vector] * 4, *options)
    assert largest_tensor.matmul_flops == 3 * 2 * T * V * D


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("operator", ["linear_logprob", "linear_policy_loss", "masked_infonce"])
def test_logits_are_float32_whatever_torch_may_round_to(operator: str, impl: Any, setting: str) -> None:
    """Those of either pass; the gradients' products follow the setting, and it stays what it was."""
    hidden, weight = randn(0, T, D).float().to(DEVICE), randn(1, V, D).float().to(DEVICE)
    target, ones = randint(2, V, T), torch.ones(T, device=DEVICE)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        with Products() as products:
            h, w = hidden.requires_grad_(), weight.requires_grad_()
            if operator == "linear_logprob":
                ck.linear_logprob(h, w, target, impl=impl)[0].sum().backward()
            elif operator == "masked_infonce":
                ck.masked_infonce(h, w, impl=impl)[0].backward()
            else:
                ck.linear_policy_loss(h, w, target, advantage_T=ones, old_logprob_T=None, weight_T=ones, impl=impl)[
                    0
                ].backward()
        after = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)
    assert after == setting
    # kernels compute the products of theirs as three TF32 products, within float32
    passes = 1 if operator == "linear_policy_loss" else 2
    logits = 0 if impl == "triton" else passes
    assert [x[3] for x in products.found].count("highest") == logits + (2 if setting == "highest" else 0)
    assert len(products.found) == logits + 2


def test_a_setting_of_one_backend_is_given_back() -> None:
    """torch has two ways to say it, which must not be left saying different things."""
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = cuda.fp32_precision, cpu.fp32_precision
    try:
        for setting in (("tf32", "ieee"), ("ieee", "tf32"), ("tf32", "tf32"), ("ieee", "ieee")):
            cuda.fp32_precision, cpu.fp32_precision = setting
            with _runtime.full_float32():
                assert cuda.fp32_precision not in ("tf32", "bf16")
                assert cpu.fp32_precision not in ("tf32", "bf16")
                assert torch.get_float32_matmul_precision() == "highest"
            assert (cuda.fp32_precision, cpu.fp32_precision) == setting
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before
