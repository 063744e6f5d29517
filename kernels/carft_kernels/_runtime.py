"""What every operator shares: input checks, accumulation dtype, choice of implementation."""

import itertools
import os
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "torch", "triton"]

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _index_checks_from(setting: str | None) -> bool | None:
    allowed = {None: None, "0": False, "1": True}
    if setting not in allowed:
        raise ValueError(f"CARFT_KERNELS_CHECK_INDICES = {setting!r}: allowed are '0', '1' or unset")
    return allowed[setting]


_index_checks = _index_checks_from(os.environ.get("CARFT_KERNELS_CHECK_INDICES"))


def set_index_checks(enabled: bool | None) -> None:
    """Switch checks of index ranges (targets, cu_seqlens, positives), which read device memory.

    None (the default) checks on the CPU and not on CUDA, where reading back would stop the stream. The environment
    variable CARFT_KERNELS_CHECK_INDICES=0/1 sets the start value.
    """
    global _index_checks
    _index_checks = enabled


def index_checks_on(x: Tensor) -> bool:
    return x.device.type == "cpu" if _index_checks is None else _index_checks


def check_impl(op: str, impl: str) -> None:
    """Every operator of this release has a torch implementation; "auto" takes it."""
    if impl not in ("auto", "torch"):
        raise ValueError(f"impl = {impl!r}: {op} has no such implementation in this release; allowed: 'auto', 'torch'")


def check_float(name: str, x: Tensor, ndim: int) -> None:
    if x.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {ndim} dimension{'s' if ndim > 1 else ''}")
    if x.dtype not in _FLOAT_DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}: expected float64, float32, bfloat16 or float16")


def check_like(name: str, x: Tensor, shape: tuple[int, ...], like_name: str, like: Tensor) -> None:
    """Shape as given and device as `like`."""
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


def check_index(name: str, x: Tensor, size: int) -> None:
    """Integers in [0, size)."""
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} has dtype {x.dtype}: expected int64 or int32")
    if x.numel() and index_checks_on(x):
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= size:
            raise ValueError(f"{name} holds {low if low < 0 else high}: expected values in [0, {size})")


def check_cu_seqlens(name: str, cu_seqlens: Tensor, tokens: int, like_name: str, like: Tensor) -> None:
    """B + 1 offsets, from 0 to the number of tokens, never falling."""
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"{name} has shape {tuple(cu_seqlens.shape)}: expected (sequences + 1,)")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} has dtype {cu_seqlens.dtype}: expected int64 or int32")
    if cu_seqlens.device != like.device:
        raise ValueError(f"{name} is on {cu_seqlens.device}: expected {like.device}, where {like_name} is")
    if index_checks_on(cu_seqlens):
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != tokens:
            raise ValueError(f"{name} goes from {offsets[0]} to {offsets[-1]}: expected 0 to {tokens}")
        for i, (a, b) in enumerate(itertools.pairwise(offsets)):
            if b < a:
                raise ValueError(f"{name}[{i + 1}] = {b} comes after {a}: offsets must not fall")


def check_positive(name: str, x: float) -> None:
    if not x > 0 or x == float("inf"):
        raise ValueError(f"{name} = {x}: expected a finite number above 0")


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sequence_index(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """int64 [T]: which sequence each packed token belongs to."""
    lengths = cu_seqlens.diff().long()
    sequences = torch.arange(lengths.numel(), device=cu_seqlens.device)
    return sequences.repeat_interleave(lengths, output_size=tokens)


def chunk_size(tokens: int, vocabulary: int, device: torch.device) -> int:
    """Tokens per chunk so that a chunk's float32 logits take 32 MB on a CPU (its cache matters), 512 MB on a GPU."""
    elements = 1 << (27 if device.type == "cuda" else 23)
    return max(1, min(tokens, max(32, elements // max(vocabulary, 1))))


def softmax_parts_(x: Tensor, target_n1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shift logits [n, V] in place by their row maximum; returns log-prob of the target, exp(x), its row sums.

    Every log-prob of this package goes through here, so that two operators agree to the bit on the same logits: the
    ratio of a policy to itself is exactly 1.
    """
    x.sub_(x.amax(-1, keepdim=True))
    exp = x.exp()
    sum_exp = exp.sum(-1)
    return x.gather(1, target_n1)[:, 0] - sum_exp.log(), exp, sum_exp
