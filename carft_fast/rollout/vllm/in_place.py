"""Weights of a sync copied straight into vLLM's parameters, where it is known which part of which parameter they are.

vLLM's `reload_weights` builds every layer anew and copies each weight three times. Here the places are found once: the
model's own `load_weights` runs on tensors without data (the meta device), and every copy that its loaders make is
recorded with its slice of the source and of the parameter. The first sync still goes through `reload_weights`; the
values it leaves are compared with what the recorded slices should hold. From the second on weights are copied in place,
and packed again where vLLM's CPU build packs them. A model with anything else (quantised weights, experts, latent
attention, a loader that computes) keeps `reload_weights`.
"""

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from carft_fast.core import EngineError
from carft_fast.models import SamplerWeights, WeightInfo

logger = logging.getLogger(__name__)

ATTRIBUTE = "carft_in_place"
PROBES = 4
"""Columns of every matrix that are compared after the first sync."""


class _UnmappableError(Exception):
    """Why weights of this model cannot be copied in place."""


class _View(NamedTuple):
    """A strided part of a tensor's storage, in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> "_View":
        return cls(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))

    def on(self, tensor: Tensor) -> Tensor:
        return tensor.as_strided(self.size, self.stride, self.offset)


@dataclass(eq=False)
class _Target:
    """A parameter of a layer, in the layout that weights are loaded in."""

    layer: nn.Module
    name: str
    path: str
    layout: _View
    dtype: torch.dtype
    packed: bool = False
    """The layer keeps only a packed copy: weights are collected in a buffer first."""

    def parameter(self) -> Tensor:
        return self.layer._parameters[self.name].data  # type: ignore[union-attr]


class _Copy(NamedTuple):
    target: _Target
    source: _View
    view: _View

    def key(self) -> tuple[Any, _View]:
        """Equal for copies to the same memory."""
        return (self.target if self.target.packed else self.target.parameter().data_ptr()), self.view


class _Fill(NamedTuple):
    target: _Target
    view: _View
    value: float


@dataclass
class _Step:
    """What to do with one weight of the stream."""

    info: WeightInfo
    copies: list[_Copy] = field(default_factory=list)
    complete: list[nn.Module] = field(default_factory=list)
    """Layers to pack after it: it is the last of their weights."""


class _Recorder(TorchDispatchMode):
    """Records what is written to the targets, and writes nothing there."""

    def __init__(self, targets: dict[int, _Target], sources: dict[int, _Step]) -> None:
        super().__init__()
        self._targets, self._sources = targets, sources
        self.fills: list[_Fill] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor, argument in zip(args, func._schema.arguments, strict=False):
            if not (argument.alias_info and argument.alias_info.is_write and isinstance(tensor, Tensor)):
                continue
            target = self._targets.get(_storage(tensor))
            step = self._sources.get(_storage(args[1])) if func is torch.ops.aten.copy_.default else None
            if target is None and step is None:
                continue
            if target is None:
                assert step is not None
                raise _UnmappableError(f"{step.info.name} is copied to something that is no parameter")
            if step is not None and tensor.shape == args[1].shape and tensor.dtype == target.dtype:
                step.copies.append(_Copy(target, _View.of(args[1]), _View.of(tensor)))
            elif func is torch.ops.aten.fill_.Scalar and tensor.dtype == target.dtype:
                self.fills.append(_Fill(target, _View.of(tensor), args[1]))
            else:
                raise _UnmappableError(f"{target.path} is computed by {func}")
            return tensor
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class InPlace:
    """How one vLLM model takes the weights of a sync; found anew when their names or shapes change.

    A failed `load` leaves a model that the next one mends. `reload` loads a stream of weights vLLM's own way.
    """

    def __init__(
        self, model: nn.Module, vllm_config: Any, reload: Callable[[Iterator[tuple[str, Tensor]]], None]
    ) -> None:
        self._model, self._config, self._reload = model, vllm_config, reload
        self._metadata: list[WeightInfo] = []
        self._steps: list[_Step] = []
        self._fills: list[_Fill] = []
        self._buffers: list[Tensor] = []
        self._attention = [layer for layer in model.modules() if hasattr(layer, "process_weights_after_loading")]
        self._checked = False
        self.reason = ""
        """Why weights are not copied in place; empty where they are, or where no sync has been tried."""

    @torch.no_grad()
    def load(self, metadata: Sequence[WeightInfo], dtype: torch.dtype, weights: Iterable[tuple[str, Tensor]]) -> None:
        """`weights` in the order of `metadata`, each whole; iterated to its end.

        Raises EngineError when they are not the ones `metadata` describes.
        """
        with set_current_vllm_config(self._config):
            if self._metadata != (described := list(metadata)):
                self._metadata, self._steps, self._checked, self.reason = described, [], False, ""
                try:
                    self._find(described, dtype)
                except Exception as error:  # of any kind: these are the loaders of any model
                    self._give_up(str(error) or type(error).__name__)
            if self._checked:
                self._copy(weights)
            elif self.reason:
                self._reload_or_mend(weights)
            else:
                expected: list[Tensor] = []
                self._reload_or_mend(self._watched(weights, expected))
                self._check(expected)

    def _give_up(self, reason: str) -> None:
        self.reason, self._steps = reason, []
        logger.warning("every weight sync goes through vLLM's reload_weights, not in place: %s", reason)

    def _reload_or_mend(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        try:
            self._reload(iter(weights))
        except BaseException:
            # The layers not yet reloaded are on the meta device: unless they are put back, no later load works.
            finalize_layerwise_reload(self._model, self._config.model_config)
            raise

    def _find(self, metadata: Sequence[WeightInfo], dtype: torch.dtype) -> None:
        """Steps and fills. Raises _UnmappableError, or whatever a loader raises on a tensor without data."""
        if self._config.lora_config is not None:
            raise _UnmappableError("vLLM's own LoRA layers")
        if not current_platform.is_cpu() and not current_platform.is_cuda_alike():
            raise _UnmappableError(f"platform {current_platform.device_type}")
        for path, layer in self._model.named_modules():
            method = getattr(layer, "quant_method", None)
            if type(method) not in (type(None), UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
                raise _UnmappableError(f"{path} has the quantisation method {type(method).__name__}")
        for layer in self._attention:
            if type(layer) is not Attention:
                raise _UnmappableError(f"{type(layer).__name__} has work of its own after loading")
        sources = [torch.empty(info.shape, dtype=dtype, device="meta") for info in metadata]
        steps = [_Step(info) for info in metadata]
        initialize_layerwise_reload(self._model)
        try:
            targets: dict[int, _Target] = {}
            for path, layer in self._model.named_modules():
                get_layerwise_info(layer).load_numel_total = 0  # nothing will be loaded, which is no reason to warn
                for tensor in [*layer._parameters.values(), *layer._buffers.values()]:
                    if tensor is not None and hasattr(tensor, "weight_loader"):
                        tensor.weight_loader = _plain(tensor.weight_loader)
                for name, parameter in layer._parameters.items():
                    if parameter is not None:
                        target = _Target(layer, name, f"{path}.{name}", _View.of(parameter), parameter.dtype)
                        if targets.setdefault(_storage(parameter), target) is not target:
                            raise _UnmappableError(f"{target.path} shares its memory with another parameter")
            named = ((info.name, source) for info, source in zip(metadata, sources, strict=True))
            with _Recorder(targets, {_storage(s): step for s, step in zip(sources, steps, strict=True)}) as recorder:
                self._model.load_weights(named)  # type: ignore[operator]
        finally:
            finalize_layerwise_reload(self._model, self._config.model_config)
        for target in targets.values():
            self._place(target, [copy for step in steps for copy in step.copies], recorder.fills)
        # Weights that share memory (a tied head and the embedding) are copied once: the last one, as loading does.
        writer = {copy.key(): index for index, step in enumerate(steps) for copy in step.copies}
        last: dict[nn.Module, int] = {}
        for copy in (copy for step in steps for copy in step.copies):
            last[copy.target.layer] = max(last.get(copy.target.layer, 0), writer[copy.key()])
        for index, step in enumerate(steps):
            step.copies = [copy for copy in step.copies if writer[copy.key()] == index]
            step.complete = [layer for layer, at in last.items() if at == index and _packs(layer)]
        self._steps, self._fills = steps, recorder.fills

    def _place(self, target: _Target, copies: list[_Copy], fills: list[_Fill]) -> None:
        """Checks that the target is covered, once everywhere, and how the layer keeps it."""
        parameter = target.parameter()
        covers = [copy.view for copy in copies if copy.target is target]
        covers += [fill.view for fill in fills if fill.target is target]
        counts = torch.zeros(math.prod(target.layout.size), dtype=torch.uint8, device=parameter.device)
        for view in covers:
            view.on(counts).add_(1)
        if not bool((counts == 1).all()):
            raise _UnmappableError(f"{target.path} is not filled by the weights of the sync, or more than once")
        if _View.of(parameter) == target.layout and parameter.dtype == target.dtype:
            matrix = len(target.layout.size) == 2
            if target.name == "weight" and _packs(target.layer) and not matrix:
                raise _UnmappableError(f"{target.path} is packed and no matrix")
        elif _packs(target.layer) and target.name == "weight" and not parameter.numel():
            width = target.layout.size[-1]
            rows = all(len(v.size) == 2 and v.size[1] == width and v.stride == (width, 1) for v in covers)
            if not rows or any(fill.target is target for fill in fills):
                raise _UnmappableError(f"{target.path} is packed and not made of whole rows")
            target.packed = True
        elif not (target.name == "bias" and _View.of(parameter) == target.layout):  # packing makes biases float32
            raise _UnmappableError(f"vLLM keeps {target.path} in another layout than it loads")

    def _expected(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[_Step, Tensor]]:
        """Each step with its weight. Raises EngineError for weights that `metadata` does not name."""
        for step, pair in itertools.zip_longest(self._steps, weights):
            wanted = step.info if step else None
            sent = WeightInfo(pair[0], tuple(pair[1].shape)) if pair else None
            if sent != wanted:
                raise EngineError(
                    f"a weight sync sent {sent or 'nothing more'}; its metadata says {wanted or 'nothing more'}"
                )
            yield step, pair[1]

    def _copy(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for fill in self._fills:
            fill.view.on(fill.target.parameter()).fill_(
                fill.value
            )  # a sleep may have lost the padding; it is packed too
        held: dict[_Target, Tensor] = {}
        for step, tensor in self._expected(weights):
            source = tensor.contiguous()
            for copy in step.copies:
                target = copy.target
                if not target.packed:
                    into = target.parameter()
                elif target in held:
                    into = held[target]
                else:
                    into = held[target] = self._buffer(target)
                copy.view.on(into).copy_(_part(source, copy.source))
            for layer in step.complete:
                self._pack(layer, held)
        for layer in self._attention:  # as reload_weights does
            layer.process_weights_after_loading(self._config.model_config.dtype)  # type: ignore[operator]

    def _buffer(self, target: _Target) -> Tensor:
        """For one packed weight. Buffers are used again: new memory costs more than the copy."""
        if not self._buffers:
            packed = {copy.target for step in self._steps for copy in step.copies if copy.target.packed}
            most = max(math.prod(each.layout.size) for each in packed)
            self._buffers.append(torch.empty(most, dtype=target.dtype, device=target.parameter().device))
        return self._buffers.pop()

    def _pack(self, layer: Any, held: dict[_Target, Tensor]) -> None:
        pack = functools.partial(layer.quant_method.process_weights_after_loading, layer)
        target = next((target for target in held if target.layer is layer), None)
        if target is None:
            # vLLM packs an embedding as it does a head, but looks its rows up: the packed copy is hardly ever needed.
            _pack_when_used(layer, pack) if type(layer) is VocabParallelEmbedding else pack()
            return
        buffer = held.pop(target)
        kept = layer.weight
        layer.weight = nn.Parameter(target.layout.on(buffer), requires_grad=False)
        try:
            pack()
            if layer.weight.numel():
                raise EngineError(f"vLLM no longer packs {target.path}, as it did before")
        finally:
            layer.weight = kept
        self._buffers.append(buffer)

    def _watched(self, weights: Iterable[tuple[str, Tensor]], expected: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """`weights`, with some of their values kept: those that `_check` reads back, in the same order."""
        for step, tensor in self._expected(weights):
            source = tensor.contiguous()
            expected += [_columns(_part(source, copy.source)).to(copy.target.dtype) for copy in step.copies]
            yield step.info.name, tensor

    def _check(self, expected: list[Tensor]) -> None:
        """Reads back what `reload_weights` has loaded, packed weights by multiplying with columns of the identity."""
        for copy, values in zip((copy for step in self._steps for copy in step.copies), expected, strict=True):
            if not torch.equal(_read(copy), values):
                self._give_up(f"{copy.target.path} is not what its weights say")
                return
        self._checked = True


def _pack_when_used(layer: Any, pack: Callable[[], None]) -> None:
    def pack_and_multiply(*arguments: Tensor) -> Tensor:
        pack()
        return layer.cpu_linear(*arguments)

    layer.cpu_linear = pack_and_multiply


def _plain(loader: Any) -> Any:
    """A weight loader without the wrappers of vLLM's layerwise reload."""
    while loader.__name__ == "online_process_loader":
        loader = loader.__wrapped__
    return loader


def _packs(layer: nn.Module) -> bool:
    return current_platform.is_cpu() and getattr(layer, "quant_method", None) is not None


def _part(source: Tensor, view: _View) -> Tensor:
    whole = view.offset == 0 and view.size == source.shape and view.stride == source.stride()
    return source if whole else source.as_strided(view.size, view.stride, source.storage_offset() + view.offset)


def _columns(tensor: Tensor) -> Tensor:
    """A copy of a few columns of a matrix, of all values of a vector."""
    return tensor.clone() if tensor.ndim < 2 else tensor[..., _chosen(tensor.shape[-1])]


def _chosen(width: int) -> list[int]:
    return sorted({index * (width - 1) // (PROBES - 1) for index in range(PROBES)})


def _read(copy: _Copy) -> Tensor:
    target, view = copy.target, copy.view
    if not target.packed:
        return _columns(view.on(target.parameter()))
    width = target.layout.size[1]
    method: Any = target.layer.quant_method
    chosen = _chosen(width)
    identity = torch.zeros(len(chosen), width, dtype=target.dtype)
    identity[range(len(chosen)), chosen] = 1
    product = method.apply(target.layer, identity, None).T
    first = view.offset // width
    return product[first : first + view.size[0]]


def load_in_place(worker: Any, weights: SamplerWeights) -> None:
    """Called in a worker of vLLM. Keeps its `InPlace` there."""
    if not hasattr(worker, ATTRIBUTE):
        setattr(
            worker,
            ATTRIBUTE,
            InPlace(
                worker.get_model(),
                worker.vllm_config,
                lambda stream: worker.reload_weights(weights_iterator=stream),
            ),
        )
    getattr(worker, ATTRIBUTE).load(weights.metadata(), weights.dtype, weights)
