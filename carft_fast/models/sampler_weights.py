"""The policy's weights as a sampler loads them: Hugging Face names, the sampler's dtype, one layer at a time.

The stream is made from `state_dict()`, not `named_parameters()`: with tied embeddings the latter has no
`lm_head.weight`, and an engine that reloads layer by layer would silently keep an old one. The trainer's weights are
not changed: LoRA is merged into the copy that is sent, or sent beside it (`adapter_weights`).
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from carft_fast.core import InputError

_LAYER = re.compile(r"^.*?\.\d+\.")
_ADAPTER = re.compile(r"\.(lora_|original_module\.)")
_WRAPPERS = re.compile(r"\.base_layer(?=\.|$)|\.modules_to_save\.[^.]+(?=\.)")


def base_lm(lm: nn.Module) -> nn.Module:
    """The causal LM under peft's wrapper, if there is one."""
    unwrap: Callable[[], nn.Module] | None = getattr(lm, "get_base_model", None)
    return lm if unwrap is None else unwrap()


class WeightInfo(NamedTuple):
    name: str
    shape: tuple[int, ...]


class SamplerWeights:
    """Iterate for (name, tensor), whole and in `dtype`, in a fixed order; every pass starts anew.

    Sharded parameters (FSDP2's DTensor, ZeRO-3) are gathered a layer at a time: a pass holds one whole layer at most,
    and every rank has to iterate. `merge`: with the adapters' products; without it the frozen weights as they are.
    Raises InputError for an adapter that a plain weight cannot express.
    """

    def __init__(self, lm: nn.Module, dtype: torch.dtype, *, merge: bool = True) -> None:
        self.dtype = dtype
        base = base_lm(lm)
        adapted = _adapted_layers(base) if merge else {}
        self._parts: dict[str, _Part] = {}
        for name, tensor in base.state_dict(keep_vars=True).items():
            if not _ADAPTER.search(name):
                plain = _WRAPPERS.sub("", name)
                self._parts[plain] = _Part(tensor, adapted.get(plain, []))

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
        """The same, a list for each layer. A tensor outside the layers has a list of its own."""
        for _, names in itertools.groupby(self._parts, _layer_of):
            parts = {name: self._parts[name] for name in names}
            with gathered([p for part in parts.values() for p in part.parameters()]):
                yield [(name, part.merged(self.dtype)) for name, part in parts.items()]


class HeldWeights:
    """The same from a copy in host memory, given out on `device`. All processes make it; those with `keep` keep it."""

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


class WeightUpdate(NamedTuple):
    """What a sync gives to a sampler."""

    weights: SamplerWeights | HeldWeights | None
    """None: frozen ones, which it holds already."""
    adapters: dict[str, Tensor] | None = None
    """LoRA's matrices, where the sampler applies them itself."""

    @classmethod
    def of(cls, lm: nn.Module, dtype: torch.dtype, *, unmerged: bool, frozen: bool = True) -> "WeightUpdate":
        """`unmerged`: LoRA beside the weights, and these only with `frozen`. Every rank has to call it."""
        if not unmerged:
            return cls(SamplerWeights(lm, dtype))
        return cls(SamplerWeights(lm, dtype, merge=False) if frozen else None, adapter_weights(lm, dtype))

    def held(self, device: torch.device, *, keep: bool) -> "WeightUpdate":
        """With the weights in host memory on the process with `keep`; every rank has to call it."""
        weights = self.weights
        return self._replace(
            weights=HeldWeights(weights, device, keep=keep) if isinstance(weights, SamplerWeights) else weights
        )


def adapter_weights(lm: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """LoRA's matrices by the names of peft's files, whole, in `dtype`, in host memory; every rank has to call it.

    Raises InputError for adapters that vLLM cannot load: it knows LoRA of linear layers.
    """
    found: dict[str, Tensor] = {}
    matrices = {name: tensor for name, tensor in base_lm(lm).state_dict(keep_vars=True).items() if "lora_" in name}
    for _, names in itertools.groupby(matrices, _layer_of):
        group = {name: matrices[name] for name in names}
        with gathered(list(group.values())):
            for name, tensor in group.items():
                module, matched, matrix = name.partition(".lora_")
                parts = matrix.split(".")
                if not matched or parts[0] not in ("A", "B") or parts[2:] != ["weight"]:
                    raise InputError(
                        f'{name}: vLLM takes LoRA of linear layers as adapters: set rollout.lora_sync = "merge"'
                    )
                whole = _whole(tensor.detach()).to("cpu", dtype, copy=True)
                found[f"base_model.model.{module}.lora_{parts[0]}.weight"] = whole
    return found


def lora_tensors(lm: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """What LoRA added to the model, by its own names, whole, in host memory; every rank has to call it. Those with
    `keep` keep it."""
    found: dict[str, Tensor] = {}
    for name, tensor in base_lm(lm).state_dict(keep_vars=True).items():
        if _ADAPTER.search(name):
            with gathered([tensor]):
                whole = _whole(tensor.detach())
                if keep:
                    found[name] = whole.to("cpu", copy=True)
    return found


class _Part(NamedTuple):
    """A weight, and the LoRA layers whose products are added to it."""

    tensor: Tensor
    lora: list[Any]

    def parameters(self) -> list[Tensor]:
        return [self.tensor, *(parameter for layer in self.lora for parameter in layer.parameters())]

    def merged(self, dtype: torch.dtype) -> Tensor:
        """The trainer's tensor itself where nothing has to be computed."""
        weight = _whole(self.tensor.detach())
        for layer in self.lora:
            if layer.merged or layer.disable_adapters:
                continue
            for adapter in layer.active_adapters:
                if adapter in layer.scaling:
                    weight = weight.float() + _whole(layer.get_delta_weight(adapter).detach()).float()
        return weight.to(dtype) if weight.is_floating_point() else weight


def _adapted_layers(base: nn.Module) -> Mapping[str, list[Any]]:
    """LoRA layers by the plain name of the weight they change. Those of a mixture of experts wrap one another."""
    layers: dict[str, list[Any]] = {}
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
        changed = f"{_WRAPPERS.sub('', name)}.{getattr(module, 'parameter_name', 'weight')}"
        layers.setdefault(changed, []).append(module)
    return layers


def _layer_of(name: str) -> str:
    """`model.layers.3.` for a weight of that layer, the name itself outside the layers."""
    match = _LAYER.match(name)
    return match.group() if match else name


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
