"""The CUDA path of the trainer on tensors without data, on any machine: what it allocates, launches and waits for.

FakeTensorMode gives tensors a shape and a dtype. Their device here is the CPU, so that neither a GPU nor a build of
torch for one is needed; `cuda_path` makes the few places that ask for the device answer as on a GPU. What it replaces
stays replaced: use a process of its own.
"""

import contextlib
import gc
import importlib
import pkgutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import carft_kernels

aten: Any = torch.ops.aten
HOST, WEIGHTS, GRADIENTS, REST = "host", "weights", "gradients", "activations"
"""Parts of memory: the host's, which does not count; the policy's; and what is no other part."""
_READS = (aten._local_scalar_dense.default, aten.is_nonzero.default)
_ANSWERS = (aten.equal.default, aten.allclose.default)
_INDEXED = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
_EMPTY = ("aten::empty", "aten::new_empty", "aten::detach", "aten::lift", "aten::alias")


@dataclass(eq=False)
class Phase:
    peak: int = 0
    """Most bytes alive at a time."""
    launches: int = 0
    syncs: int = 0
    alive: list[tuple["_Block", int]] = field(default_factory=list)
    """At the peak, with their bytes."""

    def report(self) -> dict[str, Any]:
        parts: dict[str, int] = {}
        for block, size in self.alive:
            parts[block.part] = parts.get(block.part, 0) + size
        return {"peak": self.peak, "parts": parts, "launches": self.launches, "syncs": self.syncs}


@dataclass(eq=False)
class _Block:
    size: int
    part: str
    """May become known after the block is gone: of gradients at the optimizer step."""


class Recorder(TorchDispatchMode):
    """Enter it inside FakeTensorMode. Every operation passes it; operators of the package are run, not faked."""

    def __init__(self, device: str = "cpu") -> None:
        """`device`: the kind of device whose memory counts."""
        super().__init__()
        self._device = device
        self.phases: dict[str, Phase] = {}
        self.name = ""
        """Of the present phase."""
        self._phase = Phase()
        self._blocks: dict[int, _Block] = {}
        """By storage, of those that are alive."""
        self._bytes = 0
        self._at_peak: list[tuple[_Block, int]] | None = []
        """None while the present phase's peak grows."""
        self._making = ""
        self._bodies = _operator_bodies()

    def restart(self) -> None:
        """Forget the phases, and what is still alive."""
        gc.collect()
        for block in self._blocks.values():
            block.part = HOST
        self.phases, self.name, self._phase, self._bytes, self._at_peak = {}, "", Phase(), 0, []

    @contextlib.contextmanager
    def at(self, name: str) -> Iterator[None]:
        before = self.name
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, name: str) -> None:
        """End the present phase and go on in another."""
        self._settle()
        if self._at_peak:
            self._phase.alive = self._at_peak
        self.name, self._phase, self._at_peak = name, self.phases.setdefault(name, Phase()), []
        self._grow(0)

    @contextlib.contextmanager
    def making(self, part: str) -> Iterator[None]:
        """What is allocated inside is of `part`."""
        before, self._making = self._making, part
        try:
            yield
        finally:
            self._making = before

    def mark(self, part: str, tensors: Any) -> None:
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor):
                block = self._blocks.get(_storage(x)._cdata)
                if block is not None and block.part != HOST:
                    block.part = part
                    if part == HOST:
                        self._bytes -= block.size

    def sync(self) -> None:
        self._phase.syncs += 1

    def launch(self) -> None:
        if self._making != HOST:
            self._phase.launches += 1

    def resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP2 frees and takes memory this way."""
        if (block := self._blocks.get(storage._cdata)) is not None and block.part != HOST:
            if storage.nbytes() < block.size:
                self._settle()
            self._grow(storage.nbytes() - block.size)
            block.size, block.part = storage.nbytes(), "gathered weights"

    def _grow(self, size: int) -> None:
        self._bytes += size
        if self._bytes > self._phase.peak:
            self._phase.peak, self._at_peak = self._bytes, None

    def _settle(self) -> None:
        """Before anything is freed: what is alive now is what the peak consists of."""
        if self._at_peak is None:
            self._at_peak = [(block, block.size) for block in self._blocks.values() if block.part != HOST]

    def _note(self, x: Tensor, part: str) -> None:
        storage = _storage(x)
        key = storage._cdata
        if key in self._blocks:
            return
        block = self._blocks[key] = _Block(storage.nbytes(), part)
        if part != HOST:
            self._grow(block.size)

        def gone() -> None:
            if block.part != HOST:
                self._settle()
                self._bytes -= block.size
            self._blocks.pop(key)

        weakref.finalize(storage, gone).atexit = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func in _READS:
            self.sync()
            x = args[0]
            return True if x.dtype == torch.bool else 0.0 if x.dtype.is_floating_point else 1
        if func in _ANSWERS:
            self.sync()
            return True
        if func is aten.nonzero.default:
            self.sync()
            shape = args[0].numel(), args[0].ndim
            return self._result(func, aten.new_empty.default(args[0], shape, dtype=torch.int64))
        if func is aten.randperm.generator:  # the host's, which reads it
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in _INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.sync()
        if (body := self._bodies.get(func._schema.name)) is not None:
            head = func._schema.name.startswith("carft::linear")
            with self, self.making("LM-head scratch") if head and not self._making else contextlib.nullcontext():
                return body(*args, **kwargs)
        return self._result(func, func(*args, **kwargs), args)

    def _result(self, func: Any, result: Any, args: Any = ()) -> Any:
        if func.is_view:
            return result
        name = func._schema.name
        if not name.startswith(_EMPTY):
            self.launch()
        part = self._making or REST
        if func is aten._to_copy.default and not self._making and isinstance(args[0], Tensor):
            source = self._blocks.get(_storage(args[0])._cdata)
            if source is not None and source.part == WEIGHTS:
                part = "cast weights"
        for x in tree_leaves(result):
            if isinstance(x, FakeTensor) and x.device.type == self._device:
                self._note(x, part)
        return result


def _storage(x: Tensor) -> torch.UntypedStorage:
    return (x._local_tensor if isinstance(x, DTensor) else x).untyped_storage()


def _operator_bodies() -> dict[str, Callable[..., Any]]:
    """By name: what runs on a device where an operator of carft_kernels is called."""
    modules = [importlib.import_module(f"carft_kernels.{m.name}") for m in pkgutil.iter_modules(carft_kernels.__path__)]
    operators = [x for module in modules for x in vars(module).values() if isinstance(x, CustomOpDef)]
    return {operator._qualname: operator._init_fn for operator in operators}


def watch_resizes(recorder: Recorder) -> None:
    """FSDP2 frees and takes a storage's memory by resizing it, which is no operation."""
    resize = torch.UntypedStorage.resize_

    def resize_(storage: Any, size: int) -> Any:
        result = resize(storage, size)
        recorder.resized(storage)
        return result

    torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment,method-assign]


def cuda_path(recorder: Recorder, capability: tuple[int, int]) -> None:
    """Replace, for the rest of the process, what asks for the device or needs data."""
    from triton.runtime.jit import JITFunction

    from carft_kernels import _runtime

    def is_cuda(x: Any) -> bool:
        return True

    def cpu(x: Tensor, *_: Any, **__: Any) -> Tensor:
        recorder.sync()
        return x

    def tolist(x: Tensor) -> Any:
        recorder.sync()
        return [0.0] * x.numel()

    def on_device(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The host's numbers on their way to the device, where they take memory."""

        def made(*args: Any, **options: Any) -> Tensor:
            return make(*args, **options).clone()

        return made

    replaced: list[tuple[Any, str, Any]] = [
        (torch, "frombuffer", on_device(torch.frombuffer)),
        (torch, "as_tensor", on_device(torch.as_tensor)),
        (FakeTensor, "is_cuda", property(is_cuda)),
        (FakeTensor, "cpu", cpu),
        (FakeTensor, "tolist", tolist),
        (nn.Module, "to", lambda self, *_, **__: self),  # everything is there
        (JITFunction, "run", lambda self, *args, **options: recorder.launch()),
        (torch.cuda, "device", lambda device: contextlib.nullcontext()),
        (torch.cuda, "get_device_capability", lambda device=None: capability),
    ]
    for holder, name, stand_in in replaced:
        setattr(holder, name, stand_in)
    _runtime.set_index_checks(False)
    _runtime.ONEDNN = False
    chunk_size = _runtime.chunk_size
    for module in pkgutil.iter_modules(carft_kernels.__path__):
        loaded: Any = importlib.import_module(f"carft_kernels.{module.name}")
        if getattr(loaded, "chunk_size", None) is chunk_size:
            loaded.chunk_size = lambda tokens, vocabulary, _: chunk_size(tokens, vocabulary, torch.device("cuda"))
