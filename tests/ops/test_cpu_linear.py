"""float32 matmuls on a CPU by oneDNN: `cpu_linear`, and what the other operators' torch implementations take."""

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import carft_kernels as ck

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")

SMALL, LARGE = (3, 5, 7), (130, 96, 129)
"""N, K, M on either side of where oneDNN begins."""


@pytest.fixture(autouse=True)
def with_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every processor."""
    monkeypatch.setattr("carft_kernels._runtime.ONEDNN", True)


def test_a_processor_with_avx2_alone_keeps_torchs_own() -> None:
    """There MKL is the faster one: the gradient of a weight 1.4 to 2.5 times."""
    script = "from carft_kernels import _runtime; print(_runtime.ONEDNN)"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


class Products(TorchDispatchMode):
    """Names of the matrix products of a forward and backward, inside our operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "carft":
            from torch._library.custom_ops import OPDEFS

            with self:
                return OPDEFS[func._name.removesuffix(".default")]._init_fn(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "matmul", "_linear_pointwise", "linear"):
            self.names.add(name)
        return func(*args, **(kwargs or {}))


LAYOUTS = {
    "plain": lambda n, k: randn(n, k),
    "transposed": lambda n, k: randn(k, n).T,
    "some columns of some rows": lambda n, k: randn(2 * n, 3 * k)[::2, 1 : k + 1],
    "every other column": lambda n, k: randn(n, 2 * k)[:, ::2],
    "one row for all": lambda n, k: randn(1, k).expand(n, k),
    "one element for all": lambda n, k: randn(1, 1).expand(n, k),
    "in a batch": lambda n, k: randn(1, n, k),
}


@pytest.mark.parametrize("d_layout", ["plain", "transposed", "one element for all"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("n", "k", "m"), [SMALL, LARGE, (9000, 130, 1), (1, 1100, 1000), (1100, 1, 1000), (1300, 30, 100)]
)
def test_value_and_gradients_against_float64(n: int, k: int, m: int, layout: str, d_layout: str) -> None:
    x, weight, bias = LAYOUTS[layout](n, k), randn(m, k, seed=1), randn(m, seed=2)
    d = LAYOUTS[d_layout](n, m).expand(*x.shape[:-1], m)

    def run(function: Any, *given: Tensor) -> list[Tensor]:
        *inputs, d_y = given
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = function(*inputs)
        return [y, *torch.autograd.grad(y, inputs, d_y)]

    ours = run(ck.cpu_linear, x, weight, bias, d)
    exact = run(linear, *(t.double() for t in (x, weight, bias, d)))
    magnitude = run(linear, *(t.double().abs() for t in (x, weight, bias, d)))
    for found, expected, terms, length in zip(ours, exact, magnitude, (k + 1, m, n, n), strict=True):
        assert found.shape == expected.shape
        assert found.dtype == torch.float32
        # the bound of a sum's rounding, which like terms may reach: Higham, Accuracy and Stability, section 3.1
        assert ((found.double() - expected).abs() <= length * torch.finfo(torch.float32).eps / 2 * terms).all()


@pytest.mark.parametrize(("n", "k", "m"), [SMALL, LARGE, (9000, 0, 4), (9000, 4, 0)])
@pytest.mark.parametrize("layout", ["every other", "one for all", "one", "a number", "a row for each"])
def test_a_bias_of_any_layout(layout: str, n: int, k: int, m: int) -> None:
    layouts = {
        "every other": lambda: randn(2 * m)[::2],
        "one for all": lambda: randn(1).expand(m),
        "one": lambda: randn(1),
        "a number": lambda: randn(),
        "a row for each": lambda: randn(n, m),
    }
    inputs = [t.requires_grad_() for t in (randn(n, k), randn(m, k, seed=1), layouts[layout]())]
    results = []
    for function in (ck.cpu_linear, linear):
        y = function(*inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_oneDNN_computes_large_products_and_torch_the_rest() -> None:
    def products(shape: tuple[int, int, int]) -> set[str]:
        n, k, m = shape
        x, weight = randn(n, k).requires_grad_(), randn(m, k).requires_grad_()
        with Products() as seen:
            ck.cpu_linear(x, weight).sum().backward()
        return seen.names

    assert products(LARGE) == {"_linear_pointwise"}
    assert "_linear_pointwise" not in products(SMALL)
    with torch.backends.mkldnn.flags(enabled=False):
        assert "_linear_pointwise" not in products(LARGE)


@pytest.mark.parametrize("operator", ["linear_logprob", "linear_policy_loss", "masked_infonce"])
def test_operators_compute_large_products_by_onednn(operator: str) -> None:
    n, k, m = LARGE
    hidden, weight = randn(n, k).requires_grad_(), randn(m, k).requires_grad_()
    target, ones = torch.arange(n) % m, torch.ones(n)
    with Products() as seen:
        if operator == "linear_logprob":
            ck.linear_logprob(hidden, weight, target, impl="torch")[0].sum().backward()
        elif operator == "linear_policy_loss":
            ck.linear_policy_loss(
                hidden, weight, target, advantage_T=ones, old_logprob_T=None, weight_T=ones, impl="torch"
            )[0].backward()
        else:
            ck.masked_infonce(weight, hidden, impl="torch")[0].backward()
    assert seen.names == {"_linear_pointwise"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_torchs(dtype: torch.dtype) -> None:
    n, k, m = LARGE
    x, weight, bias = randn(n, k).to(dtype), randn(m, k).to(dtype), randn(m).to(dtype)
    assert torch.equal(ck.cpu_linear(x, weight, bias), linear(x, weight, bias))


def test_autocast_is_torchs() -> None:
    n, k, m = LARGE
    x, weight = randn(n, k), randn(m, k)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ck.cpu_linear(x, weight), linear(x, weight)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("n", "k", "m"), [SMALL, LARGE])
def test_as_pytorch_sees_it(n: int, k: int, m: int) -> None:
    """opcheck on forward and backward, and one graph under torch.compile."""
    inputs = randn(2, n, k).requires_grad_(), randn(m, k).requires_grad_(), randn(m).requires_grad_()
    torch.library.opcheck(torch.ops.carft.cpu_linear.default, inputs)
    plain = [t.detach() for t in inputs[:2]]
    for needed in ((True, True, True), (True, False, False), (False, True, False)):
        torch.library.opcheck(torch.ops.carft.cpu_linear_backward.default, (randn(2, n, m), *plain, *needed))
    compiled = torch.compile(lambda *a: ck.cpu_linear(*a).relu(), fullgraph=True, dynamic=True, backend="aot_eager")
    results = []
    for function in (compiled, lambda *a: linear(*a).relu()):
        y = function(*inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("leaves", [0, 1, 2])
def test_flops_are_torchs(leaves: int) -> None:
    """torch's own counter: forward, and of the backward what is needed."""
    n, k, m = LARGE
    x, weight = randn(2, n, k), randn(m, k)
    for leaf in (weight, x)[:leaves]:
        leaf.requires_grad_()
    flops = []
    for function in (ck.cpu_linear, linear):
        with FlopCounterMode(display=False) as counter:
            y = function(x, weight)
            if leaves:
                y.sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] == (1 + leaves) * 2 * 2 * n * k * m


def test_shapes_that_do_not_go_together_are_refused() -> None:
    for n in (3, 3000):
        for bad in ((randn(n, 40), randn(30, 41)), (randn(n, 40), randn(30, 40), randn(29))):
            with pytest.raises(RuntimeError) as torchs:
                linear(*bad)
            with pytest.raises(RuntimeError, match=re.escape(str(torchs.value))):
                ck.cpu_linear(*bad)
