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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from carft_fast.config.schema import SYNTHETIC, Config, LoraConfig, ModelConfig
from carft_fast.core.errors import InputError
from carft_fast.core.processes import is_main, world_size
from carft_fast.core.seeds import derive_seed
from carft_fast.data.synthetic import build_model_config, build_tokenizer
from carft_fast.models.attention import PACKED
from carft_fast.models.last_layer import LastLayer, decoder_layers
from carft_fast.models.packing import PackedBatch, pack
from carft_fast.models.safe_weights import check_hub, check_safetensors
from carft_fast.models.sampler_weights import SamplerWeights, base_lm
from carft_kernels import cpu_linear

T = TypeVar("T")

HEADS_WEIGHTS = "carft_heads.safetensors"
HEADS_CONFIG = "carft_heads.json"

logger = logging.getLogger(__name__)


class CPULinear(nn.Linear):
    """What linear layers become on a CPU in float32, see `cpu_linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return cpu_linear(input, self.weight, self.bias)


class CarftHeads(nn.Module):
    """Value head and embedding head on the last hidden state, in float32.

    Embedding e = W_e h + b_e. Value: "shared" v = u.relu(e) + c, "separate" v = u.h + c (spec of the two published
    variants). Weights start as torch's default Linear initialisation, from `seed`.
    """

    def __init__(self, hidden_size: int, embedding_dim: int, value_head: str, seed: int = 0) -> None:
        super().__init__()
        self.description = {
            "hidden_size": hidden_size,
            "embedding_dim": embedding_dim,
            "value_head": value_head,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "heads"))
            self.proj = nn.Linear(hidden_size, embedding_dim)
            self.summary = nn.Linear(embedding_dim if value_head == "shared" else hidden_size, 1)

    def value(self, hidden_TD: Tensor) -> Tensor:
        """float32 [T] from hidden states [T, D]."""
        hidden_TD = hidden_TD.float()
        if self.description["value_head"] == "shared":
            hidden_TD = self.proj(hidden_TD).relu()
        return self.summary(hidden_TD).squeeze(-1)

    def embed(self, pooled_BD: Tensor) -> Tensor:
        """CoT embeddings [B, E] from pooled hidden states [B, D]: pool first, project after (the weights sum to 1)."""
        return self.proj(pooled_BD.float())

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        weights = self.state_dict() if weights is None else weights
        save_file({name: p.detach().cpu().contiguous() for name, p in weights.items()}, folder / HEADS_WEIGHTS)
        (folder / HEADS_CONFIG).write_text(json.dumps(self.description, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        self.load_state_dict(load_file(folder / HEADS_WEIGHTS))


def check_heads(path: str, config: ModelConfig) -> None:
    """Raises InputError when heads saved at `path` are not those the config asks for."""
    file = Path(path) / HEADS_CONFIG
    if not file.is_file():
        return
    saved = json.loads(file.read_text())
    for name, wanted in (("embedding_dim", config.embedding_dim), ("value_head", config.value_head)):
        if saved[name] != wanted:
            raise InputError(f"{file}: the saved heads have {name} {saved[name]!r}, the config asks for {wanted!r}")


class Gathered(NamedTuple):
    """Whole weights in host memory, LoRA merged in, by the names of plain modules."""

    lm: dict[str, Tensor]
    heads: dict[str, Tensor]


class ModelOutput(NamedTuple):
    hidden_TD: Tensor
    logits_CV: Tensor | None
    """Logits that predict the completion tokens; only where the LM head is more than hidden @ weight.T."""


class CarftModel(nn.Module):
    """Policy (with heads) or frozen reference (without)."""

    def __init__(
        self, lm: PreTrainedModel, heads: CarftHeads | None, compute_dtype: torch.dtype, *, packs: bool = True
    ) -> None:
        """`packs`: sequences are packed, or never are."""
        super().__init__()
        self.lm = lm
        self.heads = heads
        self.compute_dtype = compute_dtype
        self.attention: str = lm.config._attn_implementation
        # `generate` would take each of these that is left open: Qwen2.5's top_k is 20, its top_p 0.8
        self._generation_config: GenerationConfig | None = lm.generation_config
        lm.generation_config = GenerationConfig()
        self._compiled = False
        self._outer: Callable[[Callable[[CarftModel], Any]], Any] | None = None
        layers = decoder_layers(lm) if self.attention == PACKED else None
        self._last_layer = LastLayer.of(layers[-1]) if layers else None
        if packs:
            self._check_attention()
        self.plain_head = self._has_plain_head()
        if not self.plain_head:
            logger.warning("the LM head is not hidden @ weight.T (bias, scale or soft cap): logits are materialised")

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def run(self, work: "Callable[[CarftModel], T]") -> T:
        """work(self) with the weights it needs in place. Processes that share weights have to call it together."""
        return work(self) if self._outer is None else self._outer(work)

    def run_through(self, outer: nn.Module | None) -> None:
        """From now on `run` goes through the module that brings this model's weights together; None lets go of it."""
        self._outer = None if outer is None else outer.__call__

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

    def forward(self, batch: PackedBatch, *, need_logits: bool = True) -> ModelOutput:
        """Last hidden states [T, D] after the final norm, in the packed order of `batch`: those at its indices. What
        the others are is undefined where `batch.segments.read` says that nobody reads them.

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

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Matmuls in `compute_dtype`; training and sampling both run in it."""
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, self.compute_dtype, enabled=enabled)

    @contextlib.contextmanager
    def padded(self) -> Iterator[PreTrainedModel]:
        """The causal LM for padded batches and `generate`: evaluation mode, transformers' own SDPA, no compilation."""
        was_training = self.lm.training
        self.lm.eval()  # gradient checkpointing (training mode) would switch the KV cache off
        if self.attention == PACKED:
            self.lm.config._attn_implementation = "sdpa"
        if self._last_layer:
            self._last_layer.read = None
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
        own, allowed = self.attention, ['model.impl = "reference", which pads']
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
        self.plain_head = True
        if self.attention == "sdpa" and _soft_cap(self.lm.config):
            return "it leaves the soft cap of attention logits out"
        embedding: Any = self.lm.get_input_embeddings()
        vocabulary = int(embedding.weight.shape[0])
        sequences = [[i % vocabulary for i in range(5)], [i % vocabulary for i in range(3, 10)]]
        try:
            batch = pack([ids[:3] for ids in sequences], [ids[3:] for ids in sequences], self.device)
            found_TD = self(batch, need_logits=False).hidden_TD
            with self.padded() as lm, self.autocast():
                expected_TD = torch.cat(
                    [lm.base_model(torch.tensor([ids], device=self.device)).last_hidden_state[0] for ids in sequences]
                )
        except Exception as error:  # whatever a model's code makes of it
            return _first_line(error)
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
        with self.padded() as lm, self._captured_hidden() as captured:
            logits_BLV = lm(input_ids=ids_BL, use_cache=False).logits.float()
            hidden_BLD = lm.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
        if isinstance(weight, Tensor):
            plain_BLV = hidden_BLD.float() @ weight.float().T
            if plain_BLV.shape == logits_BLV.shape and torch.allclose(plain_BLV, logits_BLV, rtol=1e-3, atol=1e-3):
                return True
        if len(captured) < 2:  # the second is the base model's own call
            raise InputError(
                f"{type(self.lm).__name__}: its LM head is more than a matrix, and its hidden states cannot be had "
                "beside the logits"
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
        layers = decoder_layers(self.lm)
        if layers is None:
            raise InputError(f"{type(self.lm).__name__} has no list of its layers, which model.compile and fsdp2 need")
        return layers

    def compile_layers(self) -> None:
        """torch.compile of every decoder layer."""
        for layer in self.layers():
            layer.compile(dynamic=True)
        self._compiled = True

    @property
    def divided(self) -> bool:
        """Whether processes may share its weights."""
        return self._outer is not None

    def gather(self) -> "Gathered | None":
        """What the main process needs to `save` where weights are divided or LoRA is to be merged in, else None.

        Processes that share weights call it together; the others' result holds no tensors.
        """
        if not (self.divided or self.has_adapters):
            return None

        def on_host(module: nn.Module) -> dict[str, Tensor]:
            return {name: x.to("cpu", copy=True) for name, x in SamplerWeights(module, torch.float32) if is_main()}

        return Gathered(on_host(self.lm), {} if self.heads is None else on_host(self.heads))

    def write_generation_config(self, folder: Path) -> None:
        """The one the model came with, as it was: transformers would refuse to write some that it reads."""
        if self._generation_config is not None:
            self._generation_config.to_json_file(folder / GENERATION_CONFIG_NAME)

    def save(self, folder: Path, gathered: "Gathered | None" = None) -> None:
        """Write a plain Hugging Face model folder, LoRA merged in, with the heads beside it."""
        gathered = gathered or self.gather()
        if gathered is None:
            self.lm.save_pretrained(folder)
        else:
            with torch.device("meta"):
                build: Any = type(base_lm(self.lm))
                plain = build._from_config(copy.deepcopy(self.lm.config), attn_implementation="eager")
            names = {name for name, _ in plain.named_parameters(remove_duplicate=False)}
            tied = names - {name for name, _ in plain.named_parameters()}  # saved once, under their first name
            plain.save_pretrained(folder, state_dict={n: x for n, x in gathered.lm.items() if n not in tied})
        self.write_generation_config(folder)
        if self.heads is not None:
            self.heads.save(folder, None if gathered is None else gathered.heads)


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError('model.device = "cuda": torch sees no GPU; allowed here: "auto", "cpu"')
    if (name, world_size() > 1) == ("cuda", True):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def load_tokenizer(config: ModelConfig) -> Any:
    """Raises InputError for a folder without model or tokenizer, or a Hub id that cannot be had."""
    if config.path == SYNTHETIC:
        return build_tokenizer()
    _check_folder(config.path)
    try:
        return AutoTokenizer.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise _load_failure(config.path, "no tokenizer could be loaded", error) from None


def load_lm_config(config: ModelConfig) -> Any:
    if config.path == SYNTHETIC:
        return build_model_config(len(build_tokenizer()))
    _check_folder(config.path)
    try:
        lm_config = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _load_failure(config.path, "no model config could be loaded", error) from None
    for name in vars(lm_config):
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(getattr(lm_config, name), float):
            setattr(lm_config, name, 0.0)
    return lm_config


def load_model(
    config: Config, path: str, device: torch.device, *, heads: bool, trained: Path | None = None
) -> CarftModel:
    """The causal LM at `path` (folder, Hub id, "synthetic") in float32, with its heads (fresh ones if it has none).

    With heads it is a policy to train: with LoRA it gets adapters and its own weights are frozen. `trained` is a
    checkpoint of it; without heads it is a frozen reference.
    """
    lora = config.lora if heads and config.lora.rank else None
    if trained is not None and lora is None:
        path = str(trained)
    lm = _load_lm(config, path).to(device).eval()
    if heads and getattr(lm, "_hf_peft_config_loaded", False):
        raise _has_adapter(path)
    carft_heads = None
    if heads:
        size = lm.get_input_embeddings().weight.shape[1]
        hidden_size = getattr(lm.config.get_text_config(), "hidden_size", size)
        carft_heads = CarftHeads(hidden_size, config.model.embedding_dim, config.model.value_head, config.seed)
        saved = Path(path) if trained is None else trained
        if (saved / HEADS_CONFIG).is_file():
            carft_heads.load(saved)
        carft_heads.to(device)
    packs = config.model.impl == "fast"
    model = CarftModel(lm, carft_heads, getattr(torch, config.model.compute_dtype), packs=packs)
    if not heads:
        model.requires_grad_(False)
    if lora:
        _add_adapters(lm, lora, config.seed, trained)
    model.hold_frozen_weights_in_compute_dtype()
    if device.type == "cpu" and model.compute_dtype == torch.float32 and config.model.impl == "fast":
        model.use_cpu_linear()
    if heads and config.model.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lm.train()  # transformers checkpoints in training mode only; dropout is zero in the config
    if config.model.compile:
        model.compile_layers()
    return model


def _load_lm(config: Config, path: str) -> Any:
    model_config = config.model.model_copy(update={"path": path})
    lm_config = load_lm_config(model_config)
    attention: str | None = PACKED if config.model.attention == "packed" else config.model.attention
    if config.model.impl == "reference" and attention == PACKED:
        attention = "eager" if _soft_cap(lm_config) else None  # transformers' choice: "sdpa" where the model has it
    try:
        if path == SYNTHETIC:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(config.seed, "model"))
                return AutoModelForCausalLM.from_config(lm_config, attn_implementation=attention)
        if not Path(path).is_dir():
            check_hub(path, config.model.revision)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=lm_config,
            revision=config.model.revision,
            dtype=torch.float32,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=config.model.trust_remote_code,
            output_loading_info=True,
        )
    except InputError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise _load_failure(path, "weights could not be loaded", error) from None
    except Exception as error:  # broken files, and what a model's own code makes of its config
        if PACKED in str(error):
            raise InputError(
                f'model.attention = "packed": model_type "{lm_config.model_type}" has attention classes of its own: '
                'try "eager", or model.impl = "reference", which pads'
            ) from None
        raise _load_failure(path, "weights could not be loaded", error) from error
    lm, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f'model.path = "{path}": {len(missing)} weights are missing in its files and would be random, {missing[0]} '
            "is the first"
        )
    return lm


def _add_adapters(lm: Any, lora: LoraConfig, seed: int, trained: Path | None) -> None:
    """LoRA in place: everything else is frozen. Raises InputError for modules the model does not have."""
    import peft

    targets = lora.target_modules[0] if lora.target_modules == ["all-linear"] else lora.target_modules
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=targets,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lora"))
        try:
            lm.add_adapter(settings)
        except ValueError as error:
            raise InputError(f"lora.target_modules = {lora.target_modules}: {_first_line(error)}") from None
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    for module, what in ((head, "LM head"), (embedding, "input embedding, whose weight is also its LM head's")):
        if isinstance(module, peft.tuners.lora.LoraLayer) and (tied or module is head):
            raise InputError(
                f"lora.target_modules = {lora.target_modules}: an adapter on the model's {what}: the losses read the "
                "head's weight itself and would not see it"
            )
    if trained is not None:
        loaded: Any = peft.set_peft_model_state_dict(lm, load_file(trained / "adapter_model.safetensors"))
        if loaded.unexpected_keys:
            raise InputError(f"{trained}: its adapters are not those of [lora]: {loaded.unexpected_keys[0]} is unknown")


def _check_folder(path: str) -> None:
    if not path:
        raise InputError('model.path is not set: give a model folder, a Hub id or "synthetic"')
    folder = Path(path)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if folder.is_file() or (looks_local and not folder.is_dir()):
        raise InputError(f'model.path = "{path}": not a folder')
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f'model.path = "{path}": the folder has no config.json, so it is not a Hugging Face model')
    if folder.is_dir() and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise InputError(f'model.path = "{path}": the folder has no tokenizer (tokenizer.json)')


def check_weights(path: str, *, training: bool = False) -> None:
    """Raises InputError for a local folder whose weights are not safetensors, or cannot be trained."""
    if Path(path).is_dir():
        check_safetensors(Path(path), heads=(HEADS_CONFIG, HEADS_WEIGHTS))
        if training and (Path(path) / "adapter_config.json").is_file():
            raise _has_adapter(path)


def _has_adapter(path: str) -> InputError:
    return InputError(
        f'model.path = "{path}": it comes with a LoRA adapter, which would be neither trained nor part of the frozen '
        "reference: merge it into the weights first (peft's merge_and_unload)"
    )


def _load_failure(path: str, what: str, error: Exception) -> InputError:
    if "trust_remote_code" in str(error):
        return InputError(
            f'model.path = "{path}": transformers does not know this model without the Python files that come with it. '
            "They can do whatever you can: read them, then set model.trust_remote_code = true"
        )
    return InputError(f'model.path = "{path}": {what}: {_first_line(error)}')


def _soft_cap(lm_config: Any) -> bool:
    """Whether attention logits are capped (Gemma 2), which sdpa cannot."""
    return bool(getattr(lm_config.get_text_config(), "attn_logit_softcapping", None))


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    plain = isinstance(error, (OSError, ValueError, ImportError))
    return text if text and plain else f"{type(error).__name__}: {text}".removesuffix(": ")
