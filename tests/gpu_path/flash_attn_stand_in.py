"""Stands in for the package flash_attn: the signature of 2.8.3, what it refuses, and a note of every call."""

from typing import Any

import torch
from torch import Tensor

__version__ = "2.8.3"
calls: list[dict[str, Any]] = []


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    calls.append({name: _shown(value) for name, value in locals().items()})
    return _depends_on(q, k, v)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    return _depends_on(q, k, v)


def flash_attn_with_kvcache(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("nothing here decodes from a cache")


def _depends_on(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if not {x.dtype for x in (q, k, v)} <= {torch.float16, torch.bfloat16}:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    return q + (k.sum() + v.sum())


def _shown(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [str(value.dtype), value.device.type, list(value.shape)]
    return [type(value).__name__, value]
