"""A CUDA device that computes nothing, on a build of torch without CUDA. Import it before torch.

FakeTensorMode gives tensors a shape, a dtype and a device, and no data. This module adds what code asks of the device
around them: a device guard for autograd (shim.cpp), and stand-ins for `torch.cuda`.
"""

import contextlib
import ctypes
import importlib.util
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

assert "torch" not in sys.modules, "the shim has to be loaded before torch asks for a device"
_origin = importlib.util.find_spec("torch")
assert _origin is not None
assert _origin.origin is not None
for _name in ("libc10.so", "libtorch_cpu.so"):
    ctypes.CDLL(str(Path(_origin.origin).parent / "lib" / _name), ctypes.RTLD_GLOBAL)
_shim = ctypes.CDLL(os.environ["CARFT_FAKE_CUDA_SHIM"])

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402


def ignore(kind: str) -> None: ...


on_wait: Callable[[str], None] = ignore
"""Called at every explicit wait of the host for the device."""


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0

    def synchronize(self) -> None:
        on_wait("event")


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cuda", 0)

    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        on_wait("stream")


class _Device:
    """`with torch.cuda.device(...)`."""

    def __init__(self, _: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: Any) -> None: ...


def install(devices: int = 1) -> None:
    """Replace `torch.cuda` for the rest of the process."""
    _shim.install(devices)
    stream, cuda = _Stream(), torch.cuda
    properties = SimpleNamespace(
        name="fake", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, L2_cache_size=50 << 20
    )
    replaced: dict[str, Any] = {
        # without these two autocast switches itself off, and everything runs in float32
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: devices,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": _Device,
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "synchronize": lambda device=None: on_wait("synchronize"),
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: "fake",
        "mem_get_info": lambda device=None: (80 << 30, 80 << 30),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "empty_cache": lambda: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
    }
    for name, stand_in in replaced.items():
        setattr(cuda, name, stand_in)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # type: ignore[assignment]
    # torch.tensor(..., device="cuda") is made on the host and copied, as on a GPU, where the copy is seen
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment]
    Tensor.pin_memory = _pin_memory  # type: ignore[assignment,method-assign]
    Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment,method-assign]
    nn.Module._apply = _apply  # type: ignore[assignment,method-assign]
    FakeTensor.data = property(_data, _set_data)  # type: ignore[assignment]


_pinned: set[int] = set()


def is_pinned(x: Tensor) -> bool:
    return x.untyped_storage()._cdata in _pinned


def _pin_memory(self: Tensor, device: Any = None) -> Tensor:
    storage = self.untyped_storage()
    _pinned.add(storage._cdata)
    weakref.finalize(storage, _pinned.discard, storage._cdata).atexit = False
    return self


def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """Module.to by new parameters, shared ones still shared: a fake tensor cannot take a real one's place."""
    moved: dict[int, nn.Parameter] = {}
    with torch.no_grad():
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in moved:
                        moved[id(parameter)] = nn.Parameter(fn(parameter), parameter.requires_grad)
                    module._parameters[name] = moved[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = fn(buffer)
    return self


def _data(self: Tensor) -> Tensor:
    return torch._C.TensorBase.data.__get__(self)  # type: ignore[attr-defined,no-any-return]


def _set_data(self: Any, value: Any) -> None:
    """The device, which FakeTensor notes beside the data, goes with it."""
    torch._C.TensorBase.data.__set__(self, value)  # type: ignore[attr-defined]
    self.fake_device = value.fake_device
