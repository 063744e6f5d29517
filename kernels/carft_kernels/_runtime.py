"""What every operator shares: input checks, accumulation dtype, choice of implementation."""

import contextlib
import functools
import itertools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

Impl = Literal["auto", "torch", "triton"]

LOG2E = math.log2(math.e)
LN2 = math.log(2)
# Multiply and add in one instruction, whatever Triton's default (it changes in 3.10).
FUSED = {"enable_fp_fusion": True}
# Triton reads the same variable when a kernel is defined, that is, when this package is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.backends.cpu.get_cpu_capability() != "AVX2"  # where MKL is the faster one
)
ONEDNN_FROM = 1 << 20
"""Multiplications, from which on a product goes by oneDNN."""

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HALF_DTYPES = (torch.bfloat16, torch.float16)
_TRITON_DTYPES = _FLOAT_DTYPES[1:]
_log = logging.getLogger("carft_kernels")


def _index_checks_from(setting: str | None) -> bool | None:
    allowed = {None: None, "0": False, "1": True}
    if setting not in allowed:
        raise ValueError(f"CARFT_KERNELS_CHECK_INDICES = {setting!r}: allowed are '0', '1' or unset")
    return allowed[setting]


_index_checks = _index_checks_from(os.environ.get("CARFT_KERNELS_CHECK_INDICES"))


def set_index_checks(enabled: bool | None) -> None:
    """Switch checks of index ranges (targets, cu_seqlens, positives), which read device memory.

    None (the default) checks on the CPU and not on CUDA, where the host would wait for the device. The environment
    variable CARFT_KERNELS_CHECK_INDICES=0/1 sets the start value.
    """
    global _index_checks
    _index_checks = enabled


def index_checks_on(x: Tensor) -> bool:
    return x.device.type == "cpu" if _index_checks is None else _index_checks


def use_triton(op: str, impl: str, x: Tensor) -> bool:
    """Whether Triton runs this call: "auto" takes it on NVIDIA GPUs, but for float64, which only torch computes."""
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl = {impl!r}: allowed for {op} are 'auto', 'torch', 'triton'")
    supported = x.dtype in _TRITON_DTYPES or not x.is_floating_point()
    # an AMD device is "cuda" to torch, and its capability, (9, 4) for one, that of another NVIDIA device
    amd = x.is_cuda and torch.version.hip is not None
    if impl == "triton":
        if amd:
            raise ValueError(
                f"impl = 'triton': {op} got a tensor on an AMD device, for which its kernels are not configured; "
                "'auto' or 'torch' work here"
            )
        if not (x.is_cuda or INTERPRETED):
            raise ValueError(
                f"impl = 'triton': {op} got a tensor on {x.device}; Triton needs a CUDA device (or TRITON_INTERPRET=1 "
                "set before the import); 'auto' or 'torch' work here"
            )
        if not supported:
            raise ValueError(f"impl = 'triton': {op} got {x.dtype}; allowed are float32, bfloat16, float16")
    return impl == "triton" or (impl == "auto" and x.is_cuda and supported and not amd)


@functools.cache
def log_implementation(op: str, triton: bool, device: str) -> None:
    """Once for each operator, implementation and kind of device."""
    _log.info("%s runs its %s implementation on %s", op, "triton" if triton else "torch", device)


def alone(x: Tensor) -> bool:
    """A CPU's tensor that no compiler, dispatch mode or function transform follows."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def call(operator: CustomOpDef, *arguments: Any) -> Any:
    """operator(*arguments), its first a tensor; past the dispatcher, which takes 30 us, where nothing would notice."""
    return (operator._init_fn if alone(arguments[0]) and not torch.is_grad_enabled() else operator)(*arguments)


def differentiable(
    operator: CustomOpDef, autograd: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """The operator with its autograd rule; past the dispatcher where only autograd would see it, see `call`."""
    operator.register_autograd(autograd, setup_context=setup_context)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = operator._init_fn(*arguments)
            setup_context(ctx, arguments, output)
            return output

        backward = staticmethod(autograd)

    return lambda *arguments: (Function.apply if alone(arguments[0]) else operator)(*arguments)


def all_count(count: Tensor, tokens: int) -> bool:
    """count == tokens; on a GPU, whose stream that would stop, it is not asked: False."""
    return count.is_cpu and int(count) == tokens


def to_device(values: Sequence[Any] | Tensor, device: torch.device) -> Tensor:
    """int64 numbers of the host on the device, from pinned memory: the host does not wait for the copy."""
    host = torch.as_tensor(values, dtype=torch.int64)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def launch(kernel: Any, programs: int | tuple[int, int], *arguments: Any, **options: Any) -> None:
    """On the device of the first tensor: kernels launch on the current one."""
    x = next(x for x in arguments if isinstance(x, Tensor))
    grid = programs if isinstance(programs, tuple) else (programs,)
    if all(grid):
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            kernel[grid](*arguments, **options)


_SCHEMA: dict[Any, str] = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", float | None: "float?"}
_SCHEMA |= {int: "SymInt", bool: "bool", str: "str", str | None: "str?"}


def unflatten(kinds: Sequence[Any], flat: Sequence[Any]) -> list[Any]:
    """NamedTuples of these kinds, of their fields one after the other."""
    values = iter(flat)
    return [kind._make(itertools.islice(values, len(kind._fields))) for kind in kinds]


def define_operator(
    name: str, kinds: Sequence[Any], returns: str, function: Any, fake: Any, *, mutates: str = "", tags: Any = ()
) -> Any:
    """The operator carft::`name`, whose arguments are the fields of NamedTuples; `function` and `fake` get these.

    `returns` is the schema's, such as "(Tensor, Tensor)". `mutates`: the argument that the operator writes to.
    """

    def whole(of_kinds: Any) -> Any:
        return lambda *flat: of_kinds(*unflatten(kinds, flat))

    fields = {field: _SCHEMA[kind] for x in kinds for field, kind in get_type_hints(x).items()}
    if mutates:
        fields[mutates] = "Tensor(a!)"
    schema = f"({', '.join(f'{kind} {field}' for field, kind in fields.items())}) -> {returns}"
    operator = torch.library.custom_op(
        f"carft::{name}", whole(function), mutates_args=[mutates] if mutates else (), schema=schema, tags=tags
    )
    operator.register_fake(whole(fake))
    return operator


def check_rows(name: str, x: Tensor) -> None:
    """A kernel reads rows that are contiguous, at any distance from each other."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name} has strides {x.stride()}: impl='triton' needs the last dimension contiguous; call .contiguous()"
        )


def check_local(name: str, x: Tensor) -> None:
    """An operator computes on the memory of one process; torch's own message does not say which argument it means."""
    if type(x) is not Tensor and hasattr(x, "full_tensor"):
        raise ValueError(
            f"{name} is a DTensor: expected a torch.Tensor; pass {name}.full_tensor() (to train it, with "
            "grad_placements=[Partial()]: the ranks' gradients add up), or call the operator where FSDP has gathered "
            "the parameters of its module"
        )


def check_float(name: str, x: Tensor, ndim: int) -> None:
    check_local(name, x)
    if x.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {ndim} dimension{'s' if ndim > 1 else ''}")
    if x.dtype not in _FLOAT_DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}: expected float64, float32, bfloat16 or float16")


def check_like(name: str, x: Tensor, shape: tuple[int, ...], like_name: str, like: Tensor) -> None:
    """Shape as given and device as `like`."""
    check_local(name, x)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {shape}, to go with {like_name}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}: expected {like.device}, where {like_name} is")


def check_same_dtype(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.dtype != like.dtype:
        raise ValueError(f"{name} has dtype {x.dtype}: expected {like.dtype}, that of {like_name}")


def check_bool(name: str, x: Tensor) -> None:
    if x.dtype != torch.bool:
        raise ValueError(f"{name} has dtype {x.dtype}: expected bool")


def check_integer(name: str, x: Tensor) -> None:
    check_local(name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} has dtype {x.dtype}: expected int64 or int32")


def check_index_range(name: str, x: Tensor, size: int) -> None:
    """Values in [0, size). Reads the tensor, so it belongs inside an operator, where torch.compile does not look."""
    if x.numel() and index_checks_on(x):
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= size:
            raise ValueError(f"{name} holds {low if low < 0 else high}: expected values in [0, {size})")


def check_targets(name: str, target_T: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Values in [0, vocabulary) or ignore_index. Reads the tensor: see check_index_range."""
    if index_checks_on(target_T):
        counted = target_T[target_T != ignore_index]
        if counted.numel():
            low, high = int(counted.min()), int(counted.max())
            if low < 0 or high >= vocabulary:
                raise ValueError(
                    f"{name} holds {low if low < 0 else high}: expected values in [0, {vocabulary}), "
                    f"or ignore_index = {ignore_index}"
                )


def check_cu_seqlens(
    name: str, cu_seqlens: Tensor, like_name: str, like: Tensor, *, host_allowed: bool = False
) -> None:
    """Shape (sequences + 1,), integers, device as `like`, a sequence where `like` has tokens."""
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"{name} has shape {tuple(cu_seqlens.shape)}: expected (sequences + 1,)")
    check_integer(name, cu_seqlens)
    if cu_seqlens.device != like.device and not (host_allowed and cu_seqlens.device.type == "cpu"):
        allowed = f"{like.device}{' or cpu' * host_allowed}"
        raise ValueError(f"{name} is on {cu_seqlens.device}: expected {allowed}, where {like_name} is")
    if cu_seqlens.numel() == 1 and len(like):
        raise ValueError(f"{name} describes no sequence, its shape is (1,): {like_name} has {len(like)} tokens")


def check_rising(name: str, offsets: Sequence[int], tokens: int) -> None:
    """From 0 to the number of tokens, never falling."""
    if offsets[0] != 0 or offsets[-1] != tokens:
        raise ValueError(f"{name} goes from {offsets[0]} to {offsets[-1]}: expected 0 to {tokens}")
    for i, (a, b) in enumerate(itertools.pairwise(offsets)):
        if b < a:
            raise ValueError(f"{name}[{i + 1}] = {b} comes after {a}: offsets must not fall")


def check_offsets(name: str, cu_seqlens: Tensor, tokens: int) -> None:
    """See check_rising. Reads the tensor: see check_index_range."""
    if index_checks_on(cu_seqlens):
        check_rising(name, cu_seqlens.tolist(), tokens)


def usable_offsets(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """int64 offsets that can be indexed with, and a bool [] whether those given are wrong. Nothing is read back."""
    wrong = (cu_seqlens[0] != 0) | (cu_seqlens[-1] != tokens) | (cu_seqlens.diff() < 0).any()
    sequences = cu_seqlens.numel() - 1
    even = torch.arange(sequences + 1, device=cu_seqlens.device) * tokens // max(sequences, 1)
    return torch.where(wrong, even, cu_seqlens.long()), wrong


def check_positive(name: str, x: float) -> None:
    if not x > 0 or x == float("inf"):
        raise ValueError(f"{name} = {x}: expected a finite number above 0")


def check_finite(name: str, x: float, least: float = -math.inf) -> None:
    if not (math.isfinite(x) and x >= least):
        allowed = "" if least == -math.inf else f" of at least {least}"
        raise ValueError(f"{name} = {x}: expected a finite number{allowed}")


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sequence_index(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """int64 [T]: which sequence each packed token belongs to, by offsets that are right (see usable_offsets)."""
    lengths = cu_seqlens.diff()
    sequences = torch.arange(lengths.numel(), device=cu_seqlens.device)
    return sequences.repeat_interleave(lengths, output_size=tokens)


def chunk_size(tokens: int, vocabulary: int, device: torch.device) -> int:
    """The most tokens of a chunk: float32 logits of 32 MB on a CPU, where its cache matters; 4,096 on a GPU, and more
    where 1 GiB holds their logits.

    On a GPU every chunk but the first reads and writes the float32 d_weight, 8 bytes for every 6 FLOP a token. As few
    chunks of up to 4,096 tokens as it takes cost at most 10% of the time of a call's three products on an H100, by
    vendor's figures: 4,097 tokens, in two chunks, the most, 8,192 half of it. Logits take 2.5 GB at a vocabulary of
    152,064; more than 3 GiB they never take (3,072 tokens, 13%, at 262,144).
    """
    vocabulary = max(vocabulary, 1)
    if device.type == "cuda":
        most = max(min(4096, (3 << 28) // vocabulary), (1 << 28) // vocabulary, 128) // 128 * 128
    else:
        most = max(32, (1 << 23) // vocabulary)
    return max(1, min(tokens, most))


def token_chunks(tokens: int, most: int) -> list[slice]:
    """As few chunks of at most `most` tokens as it takes, equal within the blocks of 128 tokens in which they come, or
    within one token where `most` is below 1,024."""
    block = 128 if most >= 1024 else 1
    blocks = -(-tokens // block)
    count = 1 if tokens <= most else -(-blocks // (most // block))
    edges = [min(i * blocks // count * block, tokens) for i in range(count + 1)]
    return [slice(s, e) for s, e in itertools.pairwise(edges) if s < e]


def zero_where_less(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x, but 0 where a < b; NaN stays. A CPU takes a quarter of what a comparison and a selection take."""
    return torch.ops.aten.threshold_backward.default(x, a - b, -1e-38)


def most_rows(chunks: Sequence[slice]) -> int:
    return max((rows.stop - rows.start for rows in chunks), default=0)


def rows_scratch(like: Tensor, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised [rows, columns] whose rows start at multiples of 16 elements: every row can be read in vectors."""
    return like.new_empty(rows, -(-columns // 16) * 16, dtype=dtype)[:, :columns]


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """oneDNN prepares itself for every new shape, which small matrices do not bring back."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[0] * x.shape[1] * weight.shape[0] >= ONEDNN_FROM
        and ONEDNN
        and bool(torch.backends.mkldnn.enabled)
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for a matrix x, in its own dtype under autocast too; in float32 on a CPU by oneDNN, see
    cpu_linear."""
    if _by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.linear(x, weight, bias)


_precision_lock = threading.Lock()  # torch's setting is the process's, and a backward pass has its own thread


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """float32 products as float32, also where torch may take TF32 (`torch.set_float32_matmul_precision`)."""
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _precision_lock:
        backends = cuda.fp32_precision, cpu.fp32_precision
        if not {"tf32", "bf16"} & {*backends}:
            yield
            return
        try:
            setting = torch.get_float32_matmul_precision()
        except RuntimeError:  # set for a backend alone, over "highest"
            setting = "highest"
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(setting)
            cuda.fp32_precision, cpu.fp32_precision = backends


def head_logits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """hidden @ weight.T + bias [N, V] in the accumulation dtype, of the LM head or of similarities.

    Every pass of every operator takes its logits from here or from a kernel, so that none differs by a TF32 product.
    """
    if hidden_ND.dtype in _HALF_DTYPES and _on_cuda(hidden_ND):
        x = torch.mm(hidden_ND, weight_VD.T, out_dtype=torch.float32)
        return x if bias_V is None else x.add_(bias_V)
    with full_float32():
        return linear(hidden_ND, weight_VD, bias_V).to(accumulation_dtype(hidden_ND))


def _on_cuda(x: Tensor) -> bool:
    """Where torch has products of half-precision factors with a float32 result."""
    return x.is_cuda


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their dtype.

    On CUDA half-precision factors are summed in float32 and rounded once: left to itself, cuBLAS may add parts of a
    long sum in half precision (`allow_bf16_reduced_precision_reduction` is on by default).
    """
    if a.dtype in _HALF_DTYPES and _on_cuda(a):
        return torch.mm(a, b, out_dtype=torch.float32).to(a.dtype)
    return linear(a, b.T)


def wide_matmul(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """out = a @ b, where `out` may be float32 for half-precision factors: on CUDA their sum is float32 in any case."""
    if out.dtype == a.dtype:
        if _by_onednn(a, b.T):
            out.copy_(linear(a, b.T))
        elif a.dtype in _HALF_DTYPES and _on_cuda(a):
            out.copy_(product(a, b))
        else:
            torch.mm(a, b, out=out)
    elif _on_cuda(a):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # what CUDA computes, for kernels in the interpreter
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product_(total: Tensor, a: Tensor, b: Tensor, *, first: bool = False) -> None:
    """total += a @ b, where `total` may be float32 for half-precision factors. The `first` product overwrites it:
    zeros need not be written and read before."""
    if _by_onednn(a, b.T):
        step = max(1, (1 << 20) // total.shape[1])  # a few rows at a time: the product of all would be as large again
        for s in range(0, total.shape[0], step):
            part = linear(a[s : s + step], b.T)
            total[s : s + step] = part if first else part.add_(total[s : s + step])
    elif total.dtype == a.dtype:
        total.addmm_(a, b, beta=0.0 if first else 1.0)
    elif _on_cuda(a):
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0.0 if first else 1.0, out=total)
    elif a.dtype == torch.float16:  # which may not hold the product
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=0.0 if first else 1.0)
    elif first:
        total.copy_(linear(a, b.T))
    else:
        total += linear(a, b.T)


@torch.library.custom_op("carft::scaled_gradient", mutates_args=())
def scaled_gradient(gradient: Tensor, d_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """A loss's gradient, found in its forward pass, times that of the loss. It has no autograd formula: what was found
    once cannot be differentiated again.

    As an array and not a scalar `d_loss` stays as wide as it is: rounded to half precision first, it would bias every
    element alike.
    """
    if gradient.dtype == d_loss.dtype == dtype:
        return gradient * d_loss
    return torch.mul(gradient, d_loss.reshape(1), out=torch.empty_like(gradient, dtype=dtype))


@scaled_gradient.register_fake
def _(gradient: Tensor, _: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)
