"""The reference vectors beside the repository: inputs, outputs and gradients of the published code."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "visible"


class Golden:
    """One topic: `cases()` yields (name, parameters, arrays)."""

    def __init__(self, topic: str) -> None:
        self._arrays = load_file(GOLDEN / f"{topic}.safetensors")
        self._cases = json.loads((GOLDEN / "manifest.json").read_text())["topics"][topic]["cases"]

    def cases(self, prefix: str = "") -> Iterator[tuple[str, dict[str, Any], dict[str, Tensor]]]:
        for name, case in self._cases.items():
            if name.startswith(prefix):
                arrays = {key: self._arrays[f"{name}/{key}"] for key in case["arrays"]}
                yield name, case["params"], arrays


@pytest.fixture(scope="session")
def golden() -> type[Golden]:
    if not GOLDEN.is_dir():
        pytest.skip(f"reference vectors {GOLDEN} do not exist")
    return Golden


def assert_golden(actual: Tensor, expected: Tensor, *, loose: bool = False, name: str = "") -> None:
    """The tolerances of the manifest; `loose` is its float32 rule for gradients and low-temperature similarities."""
    if expected.dtype == torch.float64:
        rtol, atol = 1e-9, 1e-11
    else:
        rtol, atol = (1e-4 if loose else 1e-5), 1e-6
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor any operation returns, and the rows of every matrix product, inside operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.matmul_flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "carft":  # look inside: dispatched as a whole, it would be one opaque operation
            with self:
                result = OPDEFS[func._name.removesuffix(".default")]._init_fn(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        aten = torch.ops.aten
        if func.overloadpacket in (aten.matmul, aten.mm, aten.addmm, aten.addmm_):
            a, b = args[-2:]
            self.matmul_flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return result


@pytest.fixture
def largest_tensor() -> LargestTensor:
    return LargestTensor()
