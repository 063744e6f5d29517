"""From a folder or a Hub id to tokenizer, config and model, or to a sentence that says what is wrong with it."""

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from carft_fast.config import SYNTHETIC, Config, LoraConfig, ModelConfig
from carft_fast.core import InputError, derive_seed, first_line, is_main, on_main, rank, world_size
from carft_fast.data import build_model_config, build_tokenizer
from carft_fast.models.attention import PACKED, soft_cap
from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.heads import HEADS_CONFIG, HEADS_WEIGHTS, CarftHeads
from carft_fast.models.safe_weights import check_hub, check_safetensors
from carft_fast.models.sampler_weights import SamplerWeights

logger = logging.getLogger(__name__)


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
    except Exception as error:  # of many kinds, for the files' content as well
        raise _load_failure(config.path, "no tokenizer could be loaded", error) from None


def load_lm_config(config: ModelConfig) -> Any:
    if config.path == SYNTHETIC:
        return build_model_config(len(build_tokenizer()))
    _check_folder(config.path)
    try:
        lm_config = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        raise _load_failure(config.path, "no model config could be loaded", error) from None
    for name in vars(lm_config):
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(getattr(lm_config, name), float):
            setattr(lm_config, name, 0.0)
    return lm_config


def _leave_deepspeed_alone() -> None:
    """transformers asks accelerate, at every save, whether DeepSpeed has wrapped the model, and accelerate imports
    DeepSpeed to see. What nobody has imported has wrapped nothing."""
    from accelerate.utils import other

    other.is_deepspeed_available = lambda: "deepspeed" in sys.modules


def load_model(
    config: Config, path: str, device: torch.device, *, heads: bool, trained: Path | None = None, divided: bool = False
) -> CarftModel:
    """The causal LM at `path` (folder, Hub id, "synthetic") in float32, with its heads (fresh ones if it has none).

    With heads it is a policy to train: with LoRA it gets adapters and its own weights are frozen. `trained` is a
    checkpoint of it; without heads it is a frozen reference.

    `divided`: for `training.parallel` to divide over the processes, which call this together. It is in host memory and
    unchecked (see `CarftModel`). The main process reads its weights; the others' are on the meta device, without data.
    """
    _leave_deepspeed_alone()
    lora = config.lora if heads and config.lora.rank else None
    if trained is not None and lora is None:
        path = str(trained)
    lm = _load_lm_to_divide(config, path) if divided else _load_lm(config, path).to(device)
    lm.eval()
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
        if not divided:
            carft_heads.to(device)
    packs = config.model.impl == "fast"
    model = CarftModel(lm, carft_heads, getattr(torch, config.model.compute_dtype), packs=packs, check=not divided)
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


def _load_lm_to_divide(config: Config, path: str) -> Any:
    """Weights on the main process alone, by a model of the config on the meta device everywhere else.

    Where that is not the model that was read (weights quantised by their file, a tie that the file undoes, a tensor
    beside parameters and buffers) the others read it as well, and the log says so.
    """
    lm: Any = None

    def read() -> Any:
        nonlocal lm
        lm = _load_lm(config, path)
        return _layout(lm), lm.generation_config

    layout, generation_config = on_main(read)
    if is_main():
        return lm
    lm, difference = _empty_lm(config, path, layout)
    if difference:
        if rank() == 1:  # one line: the others find the same
            logger.warning("every process reads all weights of %s into host memory: %s", path, difference)
        return _load_lm(config, path)
    lm.generation_config = generation_config
    return lm


def _layout(lm: nn.Module) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every weight and buffer, tied ones once."""
    return [(name, tuple(x.shape), x.dtype) for name, x in (*lm.named_parameters(), *lm.named_buffers())]


def _empty_lm(config: Config, path: str, layout: list[Any]) -> tuple[Any, str]:
    """The LM of the config on the meta device, and how it differs from one with this layout, if it does."""
    lm_config, options = _lm_options(config, path)
    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(lm_config, dtype=torch.float32, **options)
    except Exception as error:  # whatever a model's code makes of tensors without data
        return None, f"the model cannot be made without them ({first_line(error)})"
    own = _layout(lm)
    if own != layout:
        names = {name for name, *_ in set(layout) ^ set(own)}
        return None, f"they are not those of its config, {min(names, default='in their order')} for one"
    held = ((name, key) for name, m in lm.named_modules() for key, x in vars(m).items() if _is_empty(x))
    if found := next(held, None):
        return None, f"{'.'.join(found)} is a tensor, but neither a parameter nor a buffer"
    return lm, ""


def _is_empty(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _lm_options(config: Config, path: str) -> tuple[Any, dict[str, Any]]:
    """The LM's config, and how transformers is to build it."""
    lm_config = load_lm_config(config.model.model_copy(update={"path": path}))
    attention: str | None = PACKED if config.model.attention == "packed" else config.model.attention
    if config.model.impl == "padded" and attention == PACKED:
        attention = "eager" if soft_cap(lm_config) else None  # transformers' choice: "sdpa" where the model has it
    return lm_config, {"attn_implementation": attention, "trust_remote_code": config.model.trust_remote_code}


def _load_lm(config: Config, path: str) -> Any:
    lm_config, options = _lm_options(config, path)
    try:
        if path == SYNTHETIC:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(config.seed, "model"))
                return AutoModelForCausalLM.from_config(lm_config, **options)
        if not Path(path).is_dir():
            check_hub(path, config.model.revision)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=lm_config,
            revision=config.model.revision,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except InputError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise _load_failure(path, "weights could not be loaded", error) from None
    except Exception as error:  # broken files, and what a model's own code makes of its config
        if PACKED in str(error):
            raise InputError(
                f'model.attention = "packed": model_type "{lm_config.model_type}" has attention classes of its own: '
                'try "eager", or model.impl = "padded", which pads'
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

    plain = SamplerWeights(lm, torch.float32).metadata()
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
            raise InputError(f"lora.target_modules = {lora.target_modules}: {first_line(error)}") from None
    if changed := set(plain) ^ set(SamplerWeights(lm, torch.float32).metadata()):
        raise InputError(
            f"lora.target_modules = {lora.target_modules}: {type(lm).__name__}'s adapters could not be merged into its "
            f"weights, for example {min(changed).name}"
        )
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
    return InputError(f'model.path = "{path}": {what}: {first_line(error)}')
