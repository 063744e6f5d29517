"""Global memory that the LM head's operators move, counted on tensors without data; part of `benchmarks.counts`.

The way of a GPU, on torch's device "meta": every operation and every kernel between forward and the gradients reads
what it is given once and writes what it makes once. Counted are matrices; vectors of tokens are left out.
"""

import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

import carft_kernels as ck
from carft_kernels import _runtime
from tests.ops.conftest import computed

T, V, D = 8192, 152_064, 3584
"""Tokens of a step, and the head of Qwen2.5-7B."""


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class HeadTraffic(TorchDispatchMode):
    """Bytes by what moves: the weight, its gradient, logits and their gradient, states and theirs."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = _storage(weight)
        self.bytes: Counter[str] = Counter()

    def add(self, x: Any) -> None:
        if not isinstance(x, Tensor) or x.ndim != 2:
            return
        if {*x.shape} == {V, D}:
            name = "weight" if _storage(x) == self.weight else "gradient of the weight"
        else:
            name = "logits" if V in x.shape else "states" if D in x.shape else "statistics of tiles"
        self.bytes[name] += x.numel() * x.element_size()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "carft":
            with self:
                return OPDEFS[func._name.removesuffix(".default")]._init_fn(*args, **kwargs)
        result = computed(func, args, kwargs)
        name = func.overloadpacket.__name__
        if "empty" in name or (func.is_view and _storage(result) == _storage(args[0])):  # "to" is a view, or a copy
            return result
        overwritten = "zero" in name or name in ("fill_", "copy_", "new_full") or kwargs.get("beta") == 0
        for x in args[overwritten:]:
            self.add(x)
        self.add(result)
        return result

    def launch(self, kernel: Any, *arguments: Any, **named: Any) -> None:
        """A program of a row kernel reads and writes its row once; operands of a product pass by once."""
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        for x in given.values():
            self.add(getattr(x, "base", x))


@contextmanager
def like_cuda(traffic: HeadTraffic) -> Iterator[None]:
    """Tensors on "meta" take the way of a GPU's, and kernels are counted in place of run."""
    run, on_cuda, chunk_size = InterpretedFunction.run, _runtime._on_cuda, _runtime.chunk_size
    modules: list[Any] = [importlib.import_module(f"carft_kernels.{m.name}") for m in pkgutil.iter_modules(ck.__path__)]
    modules = [m for m in modules if getattr(m, "chunk_size", None) is chunk_size]

    def launch(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        traffic.launch(kernel, *arguments, **named)

    ck.set_index_checks(False)
    InterpretedFunction.run = launch
    _runtime._on_cuda = lambda x: x.device.type == "meta"
    for module in modules:
        module.chunk_size = lambda tokens, vocabulary, _: chunk_size(tokens, vocabulary, torch.device("cuda"))
    try:
        yield
    finally:
        ck.set_index_checks(None)
        InterpretedFunction.run, _runtime._on_cuda = run, on_cuda
        for module in modules:
            module.chunk_size = chunk_size


def count_head() -> list[dict[str, Any]]:
    """Forward, loss and gradients of T tokens, all with a gradient, in bfloat16 and float32."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for operator in ("linear_logprob", "linear_policy_loss"):
            with torch.device("meta"):
                hidden, weight = (torch.empty(n, D, dtype=dtype, requires_grad=True) for n in (T, V))
                target, vector = torch.empty(T, dtype=torch.int64), torch.empty(T)
            traffic = HeadTraffic(weight)
            with like_cuda(traffic), traffic:
                if operator == "linear_logprob":
                    loss = ck.linear_logprob(hidden, weight, target, impl="triton")[0].sum()
                else:
                    vectors: Any = {"advantage_T": vector, "old_logprob_T": vector, "weight_T": vector}
                    loss = ck.linear_policy_loss(hidden, weight, target, **vectors, skip_dead=False, impl="triton")[0]
                torch.autograd.grad(loss, (hidden, weight))
            counted = {f"{name.replace(' ', '_')}_bytes": size for name, size in sorted(traffic.bytes.items())}
            case = f"{str(dtype).removeprefix('torch.')} T={T} V={V} D={D}"
            rows.append({"what": f"{operator} on a GPU", "case": case} | counted)
    return rows
