"""What the operators' tests measure with."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from carft_kernels import _runtime

pytest.register_assert_rewrite("tests.ops.checks", "tests.ops.ranks")

if _runtime.INTERPRETED:
    from .interpreter import do_once

    do_once()


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation returns. On "meta" there is no data: an `out` as it is (2.11 has no addmm with a dtype)."""
    out = kwargs.get("out")
    return out if isinstance(out, Tensor) and out.device.type == "meta" else func(*args, **kwargs)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor any operation returns, and the FLOP of every matrix product, inside operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.matmul_flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "carft":  # look inside: dispatched as a whole, it would be one opaque operation
            with self:
                result = OPDEFS[func._name.removesuffix(".default")]._init_fn(*args, **(kwargs or {}))
        else:
            result = computed(func, args, kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        aten = torch.ops.aten
        if func.overloadpacket in (aten.matmul, aten.mm, aten.addmm, aten.addmm_):
            # the factors are the last tensors: addmm's first is what it adds to, and on CUDA a dtype follows them
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            self.matmul_flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        elif func.overloadpacket in (aten.linear, torch.ops.mkldnn._linear_pointwise):
            x, weight = args[:2]
            self.matmul_flops += 2 * x.shape[0] * x.shape[1] * weight.shape[0]
        return result


@pytest.fixture
def largest_tensor() -> LargestTensor:
    return LargestTensor()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    """run(group, function, *arguments): what function(group, *arguments) returns on each rank of the group."""
    from .ranks import ranks  # not above: benchmarks import this file, and that one makes processes

    with ranks(str(tmp_path_factory.mktemp("ranks"))) as call:
        yield call


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA by default, where nothing reads index ranges; the other tests check them there, too."""
    monkeypatch.setattr(_runtime, "_index_checks", False)
