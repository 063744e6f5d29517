"""Triton's interpreter, put right, made to count, and without work that it does again and again.

Triton 3.9 interprets bfloat16 wrongly: a cast from float32 truncates, and a dot product multiplies the bit patterns.
The repair rounds to nearest even and multiplies the values, as the hardware does. Older versions (3.7) also round a
fused multiply-add twice.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def _widen(x: Any) -> Any:
    if x.dtype.scalar != tl.bfloat16:
        return x
    bits = torch.from_numpy(np.ascontiguousarray(x.data).view(np.int16).copy())
    return Handle(bits.view(torch.bfloat16).float().numpy(), tl.float32)


def _narrow(x: Any) -> Any:
    values = torch.from_numpy(np.ascontiguousarray(x.data, dtype=np.float32).copy())
    return Handle(values.bfloat16().view(torch.int16).numpy().view(np.uint16), tl.bfloat16)


def repair() -> None:
    cast, float_cast, dot = Builder.cast_impl, Builder.create_fp_to_fp, Builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16:
            return src if src.dtype.scalar == tl.bfloat16 else _narrow(cast(self, src, tl.float32))
        return cast(self, _widen(src), dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return float_cast(self, src, dst_type, rounding_mode)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widen(a), _widen(b), *rest)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        x, y, z = _widen(x), _widen(y), _widen(z)
        total = x.data.astype(np.float64) * y.data + z.data
        return Handle(total.astype(z.data.dtype), z.dtype.scalar)

    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    Builder.create_dot, Builder.create_fma = create_dot, create_fma
    do_once()


@functools.cache
def do_once() -> None:
    """The same table for every type it is asked for, the same language for every function that a kernel calls: half of
    the time that it takes.
    """
    of_type, table = interpreter._get_np_dtype, dict[Any, Any]()

    def get_np_dtype(kind: Any) -> Any:
        scalar = kind.scalar
        if isinstance(scalar, tl.pointer_type):
            return of_type(scalar)
        if scalar not in table:
            table[scalar] = of_type(scalar)
        return table[scalar]

    interpreter._get_np_dtype = get_np_dtype
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    prepare, restore, launch = interpreter._patch_lang, interpreter._LangPatchScope.restore, None
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # what kernels call, and what these functions do

    def patch_lang(_function: Any) -> Any:
        nonlocal launch
        launch = launch or prepare(both)
        return launch

    def restore_lang(scope: Any) -> None:
        nonlocal launch
        launch = None
        restore(scope)

    interpreter._patch_lang, interpreter._LangPatchScope.restore = patch_lang, restore_lang


@dataclass
class Traffic:
    """Global memory that kernels asked for, in bytes, and the FLOP of their dot products."""

    loaded: int = 0
    stored: int = 0
    dot_flop: int = 0
    _addresses: dict[str, list[np.ndarray]] = field(default_factory=lambda: {"load": [], "store": []})

    def record(self, kind: str, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses, active = np.broadcast_arrays(pointers.data, mask.data)
        self._addresses[kind].append(np.unique(addresses[active.astype(bool)].astype(np.int64)) * 16 + size)
        if kind == "load":
            self.loaded += int(active.sum()) * size
        else:
            self.stored += int(active.sum()) * size

    def distinct(self, kind: str) -> int:
        """Bytes that a perfect cache would move."""
        keys = np.unique(np.concatenate([np.zeros(0, np.int64), *self._addresses[kind]]))
        return int((keys % 16).sum())


@contextmanager
def guarded() -> Iterator[None]:
    """Inside the block an access outside of the tensors that a launch was given is an error, and is not made."""
    start = interpreter.GridExecutor._init_args_hst
    load, store = Builder.create_masked_load, Builder.create_masked_store
    allowed: list[tuple[int, int]] = []

    def init_args_hst(self: Any, arguments: Any, named: Any) -> Any:
        found = start(self, arguments, named)
        tensors = [x for x in (*found[0], *found[1].values()) if isinstance(x, torch.Tensor)]
        allowed[:] = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in tensors]
        return found

    def check(pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses, active = np.broadcast_arrays(pointers.data, mask.data)
        found = addresses[active.astype(bool)].astype(np.int64)
        inside = np.zeros(found.shape, bool)
        for low, high in allowed:
            inside |= (found >= low) & (found + size <= high)
        assert inside.all(), f"{int((~inside).sum())} accesses outside of what the kernel was given"

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    interpreter.GridExecutor._init_args_hst = init_args_hst
    Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store
    try:
        yield
    finally:
        interpreter.GridExecutor._init_args_hst = start
        Builder.create_masked_load, Builder.create_masked_store = load, store


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Counts what kernels do, interpreted, inside the block."""
    traffic = Traffic()
    load, store, dot = Builder.create_masked_load, Builder.create_masked_store, Builder.create_dot

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        traffic.record("load", pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        traffic.record("store", pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        traffic.dot_flop += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *rest)

    Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store
    Builder.create_dot = create_dot
    try:
        yield traffic
    finally:
        Builder.create_masked_load, Builder.create_masked_store, Builder.create_dot = load, store, dot
