"""The policy's weights as a sampler loads them: Hugging Face names, the sampler's dtype, one layer at a time.

The stream is made from `state_dict()`, not `named_parameters()`: with tied embeddings the latter has no
`lm_head.weight`, and an engine that reloads layer by layer then keeps an old one without a word. Nothing of the
trainer is written to: LoRA is merged into the copy that is sent, so there is nothing to undo.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from carft_fast.core import InputError

_LAYER = re.compile(r"^.*?\.\d+\.")
_ADAPTER = re.compile(r"\.(lora_|original_module\.)")


def base_lm(lm: nn.Module) -> nn.Module:
    """The causal LM under peft's wrapper, if there is one."""
    unwrap: Callable[[], nn.Module] | None = getattr(lm, "get_base_model", None)
    return lm if unwrap is None else unwrap()


class WeightInfo(NamedTuple):
    name: str
    shape: tuple[int, ...]


class SamplerWeights:
    """Iterate for (name, tensor), whole and in `dtype`, in a fixed order; every pass starts anew.

    Sharded parameters (FSDP2's DTensor, ZeRO-3) are gathered a layer at a time, so a pass holds one whole layer at
    most; that is a collective, so every rank has to iterate. Raises InputError for an adapter that a plain weight
    cannot express.
    """

    def __init__(self, lm: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        base = base_lm(lm)
        adapted = _adapted_layers(base)
        self._parts: dict[str, _Part] = {}
        for name, tensor in base.state_dict(keep_vars=True).items():
            if _ADAPTER.search(name):
                continue
            layer = adapted.get(name.rpartition(".base_layer.")[0])
            delta = layer if layer is not None and name.endswith(".base_layer.weight") else None
            plain = re.sub(r"\.base_layer\.|\.modules_to_save\.[^.]+\.", ".", name)
            self._parts[plain] = _Part(tensor, delta)

    def metadata(self) -> list[WeightInfo]:
        """Names and whole shapes, in the order of iteration; gathers nothing."""
        return [
            WeightInfo(name, tuple(getattr(part.tensor, "ds_shape", part.tensor.shape)))
            for name, part in self._parts.items()
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.groups():
            yield from group

    @torch.no_grad()
    def groups(self) -> Iterator[list[tuple[str, Tensor]]]:
        """The same, a list for each layer; what lies outside the layers goes a tensor at a time."""
        for names in _by_layer(list(self._parts)):
            parts = [self._parts[name] for name in names]
            with gathered([p for part in parts for p in part.parameters()]):
                yield [(name, part.merged(self.dtype)) for name, part in zip(names, parts, strict=True)]


class HeldWeights:
    """The same from a copy in host memory, handed out on `device`: made by all processes, kept by one (`keep`)."""

    def __init__(self, weights: SamplerWeights, device: torch.device, *, keep: bool) -> None:
        self.dtype, self._device, self._metadata = weights.dtype, device, weights.metadata()
        self._groups = [
            [(name, tensor.to("cpu", copy=True)) for name, tensor in group] for group in weights.groups() if keep
        ]

    def metadata(self) -> list[WeightInfo]:
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.groups():
            yield from group

    def groups(self) -> Iterator[list[tuple[str, Tensor]]]:
        for group in self._groups:
            yield [(name, tensor.to(self._device)) for name, tensor in group]


class _Part(NamedTuple):
    """One weight, and the LoRA layer whose product belongs on top of it."""

    tensor: Tensor
    lora: Any | None

    def parameters(self) -> list[Tensor]:
        return [self.tensor, *([] if self.lora is None else self.lora.parameters())]

    def merged(self, dtype: torch.dtype) -> Tensor:
        """A tensor of its own where anything had to be computed, else the trainer's."""
        weight = _whole(self.tensor.detach())
        if self.lora is not None and not (self.lora.merged or self.lora.disable_adapters):
            weight = weight.float()
            for adapter in self.lora.active_adapters:
                if adapter in self.lora.scaling:
                    weight = weight + _whole(self.lora.get_delta_weight(adapter).detach()).float()
        return weight.to(dtype) if weight.is_floating_point() else weight


def _adapted_layers(base: nn.Module) -> Mapping[str, Any]:
    """LoRA layers by module name."""
    layers = {}
    for name, module in base.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        if getattr(module, "lora_variant", None) or any(getattr(module, "lora_bias", {}).values()):
            raise InputError(
                f"{name}: this LoRA variant (DoRA or a bias of its own) cannot be merged for the sampler; plain and "
                "rank-stabilised LoRA can"
            )
        if not hasattr(module, "lora_A"):
            raise InputError(f"{name}: a {type(module).__name__} adapter cannot be merged for the sampler; LoRA can")
        layers[name] = module
    return layers


def _by_layer(names: list[str]) -> Iterator[list[str]]:
    """Neighbours of one layer together: `model.layers.3.` is a group, `lm_head.weight` one of its own."""
    key: str | None = None
    group: list[str] = []
    for name in names:
        match = _LAYER.match(name)
        if group and (match is None or match.group() != key):
            yield group
            group = []
        key = match.group() if match else None
        group.append(name)
    if group:
        yield group


def _whole(tensor: Tensor) -> Tensor:
    full: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def gathered(parameters: list[Tensor]) -> contextlib.AbstractContextManager[Any]:
    """ZeRO-3 parameters whole inside the context. FSDP2's are gathered where they are used."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)
