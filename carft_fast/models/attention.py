"""Causal attention over packed sequences: each sees itself alone, and there is no pad to compute.

Registered with transformers under `PACKED`. A batch is cut into segments; a segment's queries see its keys, the last
query all of them. Without sharing, a segment is a whole sequence. With sharing, a prompt is one segment and each of its
completions another, whose keys are the prompt's followed by its own: the prompt goes through the model once. Keys of
prompts may also come from an earlier forward: `PromptStates`.

On CUDA in half precision one FlashAttention kernel of torch takes all segments; elsewhere torch's SDPA takes them one
by one, which on a CPU is as fast: its work is linear in the segments, and no [T, T] mask exists.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import AttentionInterface

PACKED = "carft_packed"
KEPT_MASK = 1 << 16
"""Elements: larger ones cost little beside what they are for, and much memory together."""


@dataclass(slots=True)
class PromptStates:
    """Keys and values of P prompt tokens in every layer, without gradient: what a completion needs of its prompt.

    `at`: where each prompt begins. `layers`: by attention module, keys and values [1, H_kv, P, d].
    """

    at: Mapping[tuple[int, ...], int]
    tokens: int
    layers: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    closed: bool = False
    """Nothing more is to be kept when activation checkpointing runs the layers again."""

    def close(self) -> None:
        self.closed = True
        self.layers.clear()


@dataclass(frozen=True, slots=True)
class Segments:
    """Which keys each run of queries sees. T queries, K keys, S segments; `lengths` are the host's copy of the offsets.

    `cu_q`, `cu_k`: int32 [S + 1] on the batch's device. `key_index`: int64 [K], positions of the keys in the packed
    order, after those of `before` where there are some; None where the keys are the tokens themselves.
    """

    cu_q: Tensor
    cu_k: Tensor
    key_index: Tensor | None
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    before: PromptStates | None = None
    keep: PromptStates | None = None
    """To be filled with the states at `keep_index` (int64 [P])."""
    keep_index: Tensor | None = None
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)
    """The small ones, by queries, keys and window: made once for all layers."""


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    segments: Segments | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """For transformers: query [1, H, T, d], key and value [1, H_kv, T, d] -> [1, T, H, d].

    Raises ValueError for what it does not compute: a mask, a soft cap, attention sinks, a missing `segments`.
    """
    if segments is None:
        raise ValueError(
            f"{type(module).__name__} got no `segments`: its model does not hand them on, or was called by itself, "
            "not through CarftModel (CarftModel.padded() is for plain batches)"
        )
    if attention_mask is not None or softcap or s_aux is not None or dropout:
        raise ValueError(f"{type(module).__name__} uses a mask, a soft cap, sinks or dropout: it cannot be packed")
    if segments.keep is not None and not segments.keep.closed:
        assert segments.keep_index is not None
        key_P, value_P = (x.detach().index_select(2, segments.keep_index) for x in (key, value))
        segments.keep.layers[module] = key_P, value_P
    if segments.before is not None:
        key, value = (torch.cat(pair, 2) for pair in zip(segments.before.layers[module], (key, value), strict=True))
    if segments.key_index is not None:
        key, value = (_keys_at(x, segments.key_index) for x in (key, value))
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave queries and keys in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    attend = _varlen if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else _by_segment
    return attend(query, key, value, scaling, sliding_window, segments), None


def take_rows(x_TF: Tensor, index_K: Tensor) -> Tensor:
    """x_TF[index_K], of any float dtype. The gradients of a row that is taken several times are added in a fixed order.

    As an embedding, whose backward pass sorts the index. `index_select` adds with atomics on CUDA, and indexing does on
    several CPU threads.
    """
    return embedding(index_K, x_TF)


def _keys_at(x: Tensor, index_K: Tensor) -> Tensor:
    """[1, H_kv, T, d] -> [1, H_kv, K, d]. Heads lie side by side in memory, so nothing else is copied."""
    _, heads, tokens, size = x.shape
    rows = take_rows(x[0].transpose(0, 1).reshape(tokens, heads * size), index_K)
    return rows.view(-1, heads, size).transpose(0, 1)[None]


def _by_segment(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, segments: Segments
) -> Tensor:
    outputs = []
    parts = (
        query.split(segments.q_lengths, 2),
        key.split(segments.k_lengths, 2),
        value.split(segments.k_lengths, 2),
    )
    for q, k, v in zip(*parts, strict=True):
        mask = _causal_mask(q, k.shape[2], window, segments.masks)
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, segments: Segments
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if _takes_grouped_heads(varlen_attn):
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    output = varlen_attn(
        q,
        k,
        v,
        segments.cu_q,
        segments.cu_k,
        max(segments.q_lengths),
        max(segments.k_lengths),
        scale=scaling,
        window_size=((window or 0) - 1, 0),
        **options,
    )
    assert isinstance(output, Tensor)
    return output[None]


@functools.cache
def _takes_grouped_heads(varlen_attn: Callable[..., Any]) -> bool:
    """From torch 2.12 on: before, keys and values need as many heads as queries."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _causal_mask(
    query: Tensor, keys: int, window: int | None, made: dict[tuple[int, int, int | None], Tensor]
) -> Tensor | None:
    """[queries, keys], to be added to the scores; None where it is the plain triangle that SDPA knows by itself."""
    queries = query.shape[2]
    if queries == keys and (window is None or window >= keys):
        return None
    if (mask := made.get((queries, keys, window))) is None:
        at = torch.arange(keys, device=query.device)
        behind = at[keys - queries :, None] - at
        unseen = (behind < 0) if window is None else (behind < 0) | (behind >= window)
        mask = query.new_zeros(queries, keys).masked_fill_(unseen, -torch.inf)
        if mask.numel() <= KEPT_MASK:
            made[queries, keys, window] = mask
    return mask


def soft_cap(lm_config: Any) -> bool:
    """Whether attention logits are capped (Gemma 2), which sdpa cannot."""
    return bool(getattr(lm_config.get_text_config(), "attn_logit_softcapping", None))


AttentionInterface.register(PACKED, packed_attention)
