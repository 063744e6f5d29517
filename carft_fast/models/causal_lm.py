"""A transformers causal LM with CARFT's two heads, run on packed batches.

D hidden size, E embedding size, V vocabulary; T, C, B as in `batch`. Dropout is off in both stages: the log-prob
ratio of PPO is meaningless with it.
"""

import contextlib
import copy
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from carft_fast.core import InputError, TrainingError, first_line, is_main
from carft_fast.models.attention import PACKED, soft_cap
from carft_fast.models.heads import CarftHeads
from carft_fast.models.packing import PackedBatch, pack
from carft_fast.models.sampler_weights import SamplerWeights, base_lm, lora_tensors
from carft_kernels import cpu_linear

T = TypeVar("T")

ADAPTER = "adapter"
"""Folder of a saved model that has LoRA by itself."""

logger = logging.getLogger(__name__)


class CPULinear(nn.Linear):
    """What linear layers become on a CPU in float32, see `cpu_linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return cpu_linear(input, self.weight, self.bias)


class Gathered(NamedTuple):
    """Whole weights in host memory, LoRA merged in, by the names of plain modules."""

    lm: dict[str, Tensor]
    heads: dict[str, Tensor]
    adapters: dict[str, Tensor] | None = None
    """LoRA's own, by the model's names."""


class ModelOutput(NamedTuple):
    hidden_TD: Tensor
    logits_CV: Tensor | None
    """Logits that predict the completion tokens; only where the LM head is more than hidden @ weight.T."""


class CarftModel(nn.Module):
    """Policy (with heads) or frozen reference (without)."""

    def __init__(
        self,
        lm: PreTrainedModel,
        heads: CarftHeads | None,
        compute_dtype: torch.dtype,
        *,
        packs: bool = True,
        check: bool = True,
    ) -> None:
        """`packs`: sequences are packed, or never are. `check` False: the caller has yet to call `check`."""
        super().__init__()
        self.lm = lm
        self.heads = heads
        self.compute_dtype = compute_dtype
        self.attention: str = lm.config._attn_implementation
        # `generate` would take each of these that is left open: Qwen2.5's top_k is 20, its top_p 0.8
        self._generation_config: GenerationConfig | None = lm.generation_config
        lm.generation_config = GenerationConfig()
        self._compiled = False
        self.divided = False
        """Whether processes share its weights (FSDP2, DeepSpeed)."""
        self._packs = packs
        self.plain_head: bool | None = None
        """Whether logits are hidden @ weight.T; None before `check`."""
        if check:
            self.check()

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def forward(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """function(self, ...): `model(function, ...)` is the way to everything that reads weights.

        FSDP2 and DeepSpeed gather weights that no layer's own forward uses (the LM head in the losses, the two heads)
        around it. Processes that share weights call it together.
        """
        return function(self, *args, **options)

    def check(self) -> None:
        """Find out with a few tokens whether packing keeps the model's meaning, and how its head makes logits.

        Where the weights are to compute: on their device, divided or not. Processes that share them call
        `model(CarftModel.check)` together. Raises InputError for a model that cannot be run as it is set.
        """
        if self._packs:
            self._check_attention()
        self.plain_head = self._has_plain_head()
        if not self.plain_head:
            logger.warning("the LM head is not hidden @ weight.T (bias, scale or soft cap): logits are materialised")

    @property
    def eos_ids(self) -> list[int]:
        """Ids that end a text by the generation config the model came with. Raises InputError for what are none."""
        found: Any = getattr(self._generation_config, "eos_token_id", None)
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(isinstance(i, int) for i in ids):
            raise InputError(f"eos_token_id = {found!r} in the model's generation_config.json: expected token ids")
        return list(ids)

    @property
    def head_weight_VD(self) -> Tensor:
        return self.lm.get_output_embeddings().weight

    @property
    def has_adapters(self) -> bool:
        return bool(getattr(base_lm(self.lm), "_hf_peft_config_loaded", False))

    def value(self, hidden_TD: Tensor) -> Tensor:
        assert self.heads is not None, "the reference model has no heads"
        return self.heads.value(hidden_TD)

    def embed(self, pooled_BD: Tensor) -> Tensor:
        assert self.heads is not None, "the reference model has no heads"
        return self.heads.embed(pooled_BD)

    def hidden_states(self, batch: PackedBatch, *, need_logits: bool = True) -> ModelOutput:
        """Last hidden states [T, D] after the final norm, in the packed order of `batch`.

        `need_logits=False` skips the LM head where it would be materialised.
        """
        inputs: dict[str, Any] = {
            "input_ids": batch.ids_T[None],
            "position_ids": batch.position_T[None],
            "use_cache": False,
        }
        segments = batch.segments
        if self.attention == PACKED:
            inputs["segments"] = segments
        elif self.attention.startswith("flash_attention"):
            inputs |= {"cu_seq_lens_q": segments.cu_q, "cu_seq_lens_k": segments.cu_k}
            inputs |= {"max_length_q": max(segments.q_lengths), "max_length_k": max(segments.k_lengths)}
        with self.autocast():  # for the others transformers makes a block-diagonal mask of the positions
            if self.plain_head or not need_logits:
                return ModelOutput(self.lm.base_model(**inputs).last_hidden_state[0], None)
            with self._captured_hidden() as captured:
                logits_1CV = self.lm(**inputs, logits_to_keep=batch.predict_index_C).logits
        return ModelOutput(captured[0][0], logits_1CV[0])

    def autocast(self, *, keep_casts: bool = False) -> contextlib.AbstractContextManager[Any]:
        """Matmuls in `compute_dtype`; training and sampling both run in it.

        `keep_casts`: trained weights stay cast until the end, for code that uses them again and again. A forward uses
        each once, and would hold a copy of all of them.
        """
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, self.compute_dtype, enabled=enabled, cache_enabled=keep_casts)

    @contextlib.contextmanager
    def padded(self) -> Iterator[PreTrainedModel]:
        """The causal LM for padded batches and `generate`: evaluation mode, transformers' own SDPA, no compilation."""
        was_training = self.lm.training
        self.lm.eval()  # gradient checkpointing (training mode) would switch the KV cache off
        if self.attention == PACKED or self.attention.startswith("flash_attention"):  # flash-attn refuses float32
            self.lm.config._attn_implementation = "sdpa"
        try:
            with torch.compiler.set_stance("force_eager") if self._compiled else contextlib.nullcontext():
                yield self.lm
        finally:
            self.lm.config._attn_implementation = self.attention
            self.lm.train(was_training)

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator["CarftModel"]:
        """The model as it was before LoRA."""
        lm: Any = self.lm
        lm.disable_adapters()
        try:
            yield self
        finally:
            lm.enable_adapters()

    @contextlib.contextmanager
    def _captured_hidden(self) -> Iterator[list[Tensor]]:
        captured: list[Tensor] = []
        handle = self.lm.base_model.register_forward_hook(lambda _m, _i, out: captured.append(out.last_hidden_state))
        try:
            yield captured
        finally:
            handle.remove()

    def _check_attention(self) -> None:
        """Raises InputError where packing changes what a sequence's own attention gives, found with a few tokens."""
        difference = self._packing_difference()
        if difference is None:
            return
        own, allowed = self.attention, ['model.impl = "padded", which pads']
        for shown, name in (("eager", "eager"), ("sdpa", "sdpa"), ("packed", PACKED)):
            self.attention = self.lm.config._attn_implementation = name
            if name != own and self._packing_difference() is None:
                allowed.insert(0, f'"{shown}"')
        raise InputError(
            f'model.attention = "{"packed" if own == PACKED else own}": {type(self.lm).__name__} cannot run it '
            f"({difference}); allowed here: {' or '.join(allowed)}"
        )

    @torch.no_grad()
    def _packing_difference(self) -> str | None:
        """What packing would change, None where nothing."""
        if self.attention == "sdpa" and soft_cap(self.lm.config):
            return "it leaves the soft cap of attention logits out"
        embedding: Any = self.lm.get_input_embeddings()
        vocabulary = int(embedding.weight.shape[0])
        sequences = [[i % vocabulary for i in range(5)], [i % vocabulary for i in range(3, 10)]]
        try:
            batch = pack([ids[:3] for ids in sequences], [ids[3:] for ids in sequences], self.device)
            found_TD = self.hidden_states(batch, need_logits=False).hidden_TD
            with self.padded() as lm, self.autocast():
                expected_TD = torch.cat(
                    [lm.base_model(torch.tensor([ids], device=self.device)).last_hidden_state[0] for ids in sequences]
                )
        except Exception as error:  # whatever a model's code makes of it
            return first_line(error)
        read = torch.cat([batch.predict_index_C, batch.read_index_C])
        worst = float((found_TD - expected_TD)[read].abs().max() / expected_TD.abs().max())
        if worst < (1e-3 if self.compute_dtype == torch.float32 else 0.1):
            return None
        return f"its states differ by {worst:.1e} of the largest"

    @torch.no_grad()
    def _has_plain_head(self) -> bool:
        """Whether logits are hidden @ weight.T, found by asking the model with a few tokens. Raises InputError where
        neither that is so nor the hidden states can be had beside the logits."""
        head = self.lm.get_output_embeddings()
        weight = getattr(head, "weight", None)
        vocabulary = weight.shape[0] if isinstance(weight, Tensor) else 8
        ids_BL = torch.arange(8, device=self.device)[None] % vocabulary
        with self.padded() as lm, self.autocast(), self._captured_hidden() as captured:
            logits_BLV = lm(input_ids=ids_BL, use_cache=False).logits
            hidden_BLD = lm.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
            if isinstance(weight, Tensor) and getattr(head, "bias", None) is None:
                plain_BLV = nn.functional.linear(hidden_BLD, self.head_weight_VD)  # ZeRO-3 has released `weight`
                rounding = 1e-3 if self.compute_dtype == torch.float32 else 2**-7
                if plain_BLV.shape == logits_BLV.shape and torch.allclose(
                    plain_BLV.float(), logits_BLV.float(), rtol=rounding, atol=1e-3
                ):
                    return True
        if len(captured) < 2:  # the second is the base model's own call
            raise InputError(
                f"{type(self.lm).__name__}: its LM head is more than a matrix, and its hidden states cannot be "
                "read separately from the logits"
            )
        return False

    @torch.no_grad()
    def hold_frozen_weights_in_compute_dtype(self) -> None:
        """Linear layers that are not trained in `compute_dtype`: half the memory and no cast per use, the same bits.

        Norms, embeddings and the LM head stay as they are: autocast computes with them in float32.
        """
        head = self.lm.get_output_embeddings()
        for module in self.lm.modules():
            if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad:
                for parameter in module.parameters():
                    parameter.data = parameter.data.to(self.compute_dtype)

    def use_cpu_linear(self) -> None:
        for module in self.modules():
            if type(module) is nn.Linear:
                module.__class__ = CPULinear

    def layers(self) -> nn.ModuleList:
        """The decoder layers. Raises InputError for a model that does not keep them in a list."""
        depth = self.lm.config.get_text_config().num_hidden_layers
        layers = next((m for m in self.lm.modules() if isinstance(m, nn.ModuleList) and len(m) == depth), None)
        if layers is None:
            raise InputError(f"{type(self.lm).__name__} has no list of its layers, which model.compile and fsdp2 need")
        return layers

    def compile_layers(self) -> None:
        """torch.compile of every decoder layer."""
        for layer in self.layers():
            layer.compile(dynamic=True)
        self._compiled = True

    def gather(self) -> "Gathered | None":
        """What the main process needs to `save` where weights are divided or LoRA is to be merged in, else None.

        Processes that share weights call it together; the others' result holds no tensors.
        """
        if not (self.divided or self.has_adapters):
            return None

        def on_host(module: nn.Module) -> dict[str, Tensor]:
            return {name: x.to("cpu", copy=True) for name, x in SamplerWeights(module, torch.float32) if is_main()}

        adapters = lora_tensors(self.lm, keep=is_main())
        return Gathered(on_host(self.lm), {} if self.heads is None else on_host(self.heads), adapters)

    def write_generation_config(self, folder: Path) -> None:
        """The one the model came with, as it was: transformers would refuse to write some that it reads."""
        if self._generation_config is not None:
            self._generation_config.to_json_file(folder / GENERATION_CONFIG_NAME)

    def save(self, folder: Path, gathered: "Gathered | None" = None) -> None:
        """Write a plain Hugging Face model folder, LoRA merged in, with the heads beside it; LoRA by itself goes into
        its folder `adapter`, as peft reads it."""
        gathered = gathered or self.gather()
        if gathered is None:
            self.lm.save_pretrained(folder)
        else:
            with torch.device("meta"):
                build: Any = type(base_lm(self.lm))
                plain = build._from_config(copy.deepcopy(self.lm.config), attn_implementation="eager")
            expected = {name: tensor.shape for name, tensor in plain.state_dict().items()}
            found = {name: tensor.shape for name, tensor in gathered.lm.items()}
            if wrong := sorted({name for name, _ in expected.items() ^ found.items()}):
                raise TrainingError(
                    f"{folder}: not written: {len(wrong)} weights are not those of a {build.__name__}: {wrong[0]} is "
                    f"{found.get(wrong[0], 'absent')}, expected {expected.get(wrong[0], 'none')}"
                )
            names = {name for name, _ in plain.named_parameters(remove_duplicate=False)}
            tied = names - {name for name, _ in plain.named_parameters()}  # saved once, under their first name
            plain.save_pretrained(folder, state_dict={n: x for n, x in gathered.lm.items() if n not in tied})
            if gathered.adapters:
                self._save_adapter(folder / ADAPTER, gathered.adapters)
        self.write_generation_config(folder)
        if self.heads is not None:
            self.heads.save(folder, None if gathered is None else gathered.heads)

    def _save_adapter(self, folder: Path, adapters: dict[str, Tensor]) -> None:
        """As peft reads it. It names its base where that is a Hub id: models are given away, folders here stay."""
        folder.mkdir()
        self.lm.save_pretrained(folder, state_dict=adapters)
        file = folder / "adapter_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        if (base := settings.get("base_model_name_or_path")) and Path(base).exists():
            settings["base_model_name_or_path"] = None
            file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
