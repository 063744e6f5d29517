"""The last decoder layer, on the tokens whose state is read.

Of a prompt that is its last token, which predicts the completion's first. The layers below need every token's state; in
the last one the others are keys and values and no more: their queries attend to nothing, and they skip the MLP. Zeros
stand in there, so that what follows keeps its shapes; their last states mean nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ATTRIBUTE = "carft_last_layer"
"""Of the last layer's attention and MLP: their `LastLayer`."""


@dataclass(frozen=True, slots=True)
class ReadTokens:
    """Of T packed tokens in S segments the R whose last state is read: in every segment its last ones, or none."""

    index: Tensor
    """int64 [R], their positions in the packed order."""
    cu: Tensor
    """int32 [S + 1], offsets."""
    lengths: tuple[int, ...]
    """How many in each segment, on the host."""


class _Take(torch.autograd.Function):
    """index_select. Its own backward would add into the gradient, an atomic operation each; no index comes twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.dim, ctx.size = dim, x.shape[dim]
        return x.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return _spread(d, index, ctx.dim, ctx.size), None, None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, dim: int, size: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.dim = dim
        return _spread(x, index, dim, size)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None, None]:
        (index,) = ctx.saved_tensors
        return d.index_select(ctx.dim, index), None, None, None


def _spread(x: Tensor, index: Tensor, dim: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return x.new_zeros(shape).index_copy_(dim, index, x)


def take(x: Tensor, read: ReadTokens, dim: int) -> Tensor:
    """The read tokens of x [..., T, ...]."""
    found: Tensor = _Take.apply(x, read.index, dim)
    return found


def put(x: Tensor, read: ReadTokens, dim: int, tokens: int) -> Tensor:
    """Back in their places among all `tokens`, the others 0."""
    found: Tensor = _Put.apply(x, read.index, dim, tokens)
    return found


def decoder_layers(lm: nn.Module) -> nn.ModuleList | None:
    """Of a transformers causal LM; None where it does not keep them in a list."""
    config: Any = lm.config
    depth = config.get_text_config().num_hidden_layers
    return next((m for m in lm.modules() if isinstance(m, nn.ModuleList) and len(m) == depth), None)


def dense_mlp(layer: nn.Module) -> nn.Module | None:
    """The MLP, where it is one: linear layers alone, which a mixture of experts is not, under transformers' name."""
    mlp = getattr(layer, "mlp", None)
    if not isinstance(mlp, nn.Module) or not hasattr(layer, "self_attn"):
        return None
    parts = list(mlp.modules())
    linear = {id(p) for part in parts if isinstance(part, nn.Linear) for p in part.parameters()}
    dense = linear >= set(map(id, mlp.parameters())) and not any(isinstance(part, nn.ModuleList) for part in parts)
    return mlp if dense else None


class LastLayer:
    """Of one model, by `of`.

    `read` is of the forward under way: packed attention sets it, also when activation checkpointing runs it again; for
    any other forward it has to be None.
    """

    read: ReadTokens | None = None

    @staticmethod
    def of(layer: nn.Module) -> "LastLayer | None":
        """From now on `layer`, a model's last, leaves out what is not read. None where it has no such MLP."""
        mlp = dense_mlp(layer)
        if mlp is None:
            return None
        if not hasattr(mlp, ATTRIBUTE):
            last = LastLayer()
            setattr(layer.self_attn, ATTRIBUTE, last)
            setattr(mlp, ATTRIBUTE, last)
            # Not by hooks: torch.compile does not guard on them and may take a layer without them for this one.
            kind = type(mlp)
            mlp.__class__ = type(kind.__name__, (_OnReadTokens, kind), {})
        found: LastLayer = getattr(mlp, ATTRIBUTE)
        return found


class _OnReadTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        read: ReadTokens | None = getattr(self, ATTRIBUTE).read
        if read is None:
            return super().forward(x)
        return put(super().forward(take(x, read, 1)), read, 1, x.shape[1])
