"""What a GPU would be asked to do, found on fake tensors: every operation, and every wait of the host."""

import collections
import contextlib
import functools
import importlib
import pkgutil
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
_SOURCES = (f"{ROOT}/carft_fast/", f"{ROOT}/kernels/")
aten: Any = torch.ops.aten
_READS = (aten._local_scalar_dense.default, aten.is_nonzero.default)
_ANSWERS = (aten.equal.default, aten.allclose.default)
_COPIES = (aten._to_copy.default, aten.copy_.default)
_ATOMIC = ("index_add", "scatter_add", "index_reduce", "scatter_reduce", "put", "cumsum", "bincount", "histc")
_UNKNOWN_SIZES = (aten.nonzero.default, aten.masked_select.default, aten._unique2.default)


def place() -> str:
    """File and function of the project that are running, the innermost ones."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_SOURCES):
            file = frame.f_code.co_filename.removeprefix(f"{ROOT}/")
            return f"{file} {frame.f_code.co_qualname.partition('.<locals>')[0]}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside"


class Audit(TorchDispatchMode):
    """Enter it inside FakeTensorMode. The host's own tensors stay real; those of the device are fake.

    The bodies of the project's operators run, as they would on a GPU; their Triton launches are noted and not made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "load"
        self.syncs: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        """By phase: "kind: place"."""
        self.async_copies: set[str] = set()
        self.varlen: collections.Counter[str] = collections.Counter()
        self.varlen_inputs: set[str] = set()
        self.sdpa: collections.Counter[str] = collections.Counter()
        self.host_attention = 0
        self.launches: collections.Counter[str] = collections.Counter()
        self.wrong: set[str] = set()
        """Operations and launches that got a tensor of the other device."""
        self.atomic: set[str] = set()
        """Sums of floating-point numbers by operations that take them in an order that varies on CUDA."""
        self.host_floats: set[str] = set()
        """Places where the host computes with floating-point numbers."""
        self.kept_casts: dict[str, int] = collections.defaultdict(int)
        """By phase: most bytes of trained weights in half precision at a time."""
        self._casts = 0
        self._nonzeros = 0
        self._bodies = _operator_bodies()
        fake_cuda.on_wait = self.sync

    @contextlib.contextmanager
    def at(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def sync(self, kind: str) -> None:
        self.syncs[self.phase][f"{kind}: {place()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        if _is_composite(func):  # inside an operator nothing has taken it apart yet
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func in _READS and isinstance(tensors[0], FakeTensor):
            return self._read(tensors[0])
        if func in _ANSWERS and any(isinstance(x, FakeTensor) for x in tensors):
            if any(x.device.type == "cuda" for x in tensors):
                self.sync("read")
            return True
        if func in _UNKNOWN_SIZES and isinstance(tensors[0], FakeTensor):
            return self._of_unknown_size(func, args)
        name = func._schema.name
        on_device = [x.device.type == "cuda" for x in tensors]
        if func in _COPIES:
            return self._copy(func, args, kwargs)
        if any(on_device) and name not in self._bodies:  # those are looked into; they may take numbers of the host
            self._check(func, name, args, kwargs, tensors)
        elif self._is_host_work(tensors, kwargs):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
            if self.phase != "load" and _computes(func, result):
                self.host_floats.add(f"{name}: {place()}")
            return result
        if (body := self._bodies.get(name)) is not None:
            with self:
                return body(*args, **kwargs)
        result = func(*args, **kwargs)
        if func is aten.lift_fresh.default:
            result.known_here = getattr(args[0], "known_here", None)
        return result

    @staticmethod
    def _is_host_work(tensors: list[Tensor], kwargs: dict[str, Any]) -> bool:
        if any(isinstance(x, FakeTensor) for x in tensors):
            return False
        return torch.device(kwargs.get("device") or "cpu").type == "cpu"

    def _read(self, x: FakeTensor) -> Any:
        """What an element is taken for: true, 1 or 0.0."""
        if x.device.type == "cuda":
            self.sync("read")
        if x.dtype == torch.bool:
            return True
        return 0.0 if x.dtype.is_floating_point else 1

    def read_list(self, x: FakeTensor) -> Any:
        """`tolist`: one copy to the host. Data that came from the host is known."""
        if x.device.type == "cuda":
            self.sync("read")
        known = getattr(x, "known_here", None)
        with _disable_current_modes():
            return (torch.zeros(x.shape, dtype=x.dtype) if known is None else known).tolist()

    def _of_unknown_size(self, func: Any, args: Any) -> Any:
        """Every second time one element less than there are: both of what code does with all and with some runs."""
        x = args[0]
        assert func is aten.nonzero.default, f"{func}: {place()}"
        if x.device.type == "cuda":
            self.sync("nonzero")
        self._nonzeros += 1
        return torch.empty(max(x.numel() - self._nonzeros % 2, 0), x.ndim, dtype=torch.int64, device=x.device)

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is aten.copy_.default:
            target, source = args[0].device, args[1]
            non_blocking = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking"))
        else:
            source = args[0]
            target, non_blocking = torch.device(kwargs.get("device") or source.device), kwargs.get("non_blocking")
        way = f"{source.device.type} to {target.type}"
        if way == "cuda to cpu":
            self.sync("copy to the host")
        elif way == "cpu to cuda":
            if not non_blocking:
                self.sync("blocking copy to the device")
            elif not fake_cuda.is_pinned(source):
                self.sync("copy of unpinned memory")
            else:
                self.async_copies.add(place())
        if not any(isinstance(x, FakeTensor) for x in (source, args[0])):
            if target.type == "cpu":
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
            dtype = kwargs.get("dtype") or source.dtype
            result: Any = torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=target)
            with unset_fake_temporarily():
                result.known_here = source.detach().to(dtype)
            return result
        result = func(*args, **kwargs)
        if source.is_leaf and source.requires_grad and result.dtype in (torch.bfloat16, torch.float16):
            self._keep(result)
        return result

    def _keep(self, cast: Tensor) -> None:
        size, storage = cast.numel() * cast.element_size(), cast.untyped_storage()
        self._casts += size

        def gone() -> None:
            self._casts -= size

        weakref.finalize(storage, gone).atexit = False
        self.kept_casts[self.phase] = max(self.kept_casts[self.phase], self._casts)

    def _check(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        if any(x.device.type == "cpu" and x.ndim for x in tensors):
            self.wrong.add(f"{name}: {place()}")
        if func._opname.rstrip("_") in _ATOMIC and tensors[0].is_floating_point():
            self.atomic.add(f"{name}: {place()}")
        if func in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
            if any(i is not None and i.dtype == torch.bool for i in args[1]):
                self.sync("boolean index")
        elif name == "torch_attn::_varlen_attn":
            self.varlen[self.phase] += 1
            dtypes = "/".join(str(x.dtype).removeprefix("torch.") for x in tensors)
            self.varlen_inputs.add(f"{dtypes} on {'/'.join(sorted({x.device.type for x in tensors}))}")

    def launch(self, name: str, arguments: list[Any]) -> None:
        self.launches[name] += 1
        for x in arguments:
            if isinstance(x, Tensor) and x.device.type != "cuda":
                self.wrong.add(f"{name} (Triton): {place()}")

    def report(self) -> dict[str, Any]:
        return {
            "syncs": {phase: dict(found) for phase, found in self.syncs.items() if phase != "load"},
            "async_copies": sorted(self.async_copies),
            "varlen": dict(self.varlen),
            "varlen_inputs": sorted(self.varlen_inputs),
            "sdpa": {phase: n for phase, n in self.sdpa.items() if phase != "load"},
            "host_attention": self.host_attention,
            "launches": dict(self.launches),
            "wrong": sorted(self.wrong),
            "atomic": sorted(self.atomic),
            "host_floats": sorted(self.host_floats),
            "kept_casts": dict(self.kept_casts),
        }


@functools.cache
def _is_composite(func: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return func.namespace == "aten" and func.has_kernel_for_dispatch_key(key)


_MAKE = (aten.detach.default, aten.lift_fresh.default, aten.clone.default, aten.empty.memory_format)


def _computes(func: Any, result: Any) -> bool:
    """Whether an operation computes floating-point numbers, and does not just make or show a tensor."""
    tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    return not func.is_view and func not in _MAKE and any(x.is_floating_point() and x.numel() > 1 for x in tensors)


def _operator_bodies() -> dict[str, Callable[..., Any]]:
    """By name: what runs on a device where the operator is called."""
    from torch._library.custom_ops import CustomOpDef

    import carft_kernels

    modules = [importlib.import_module(f"carft_kernels.{m.name}") for m in pkgutil.iter_modules(carft_kernels.__path__)]
    operators = [x for module in modules for x in vars(module).values() if isinstance(x, CustomOpDef)]
    return {operator._qualname: operator._init_fn for operator in operators}
