"""A transformers causal LM with CARFT's two heads, run on packed batches.

D hidden size, E embedding size, V vocabulary; T, C, B as in `batch`. Dropout is off in both stages: the log-prob
ratio of PPO is meaningless with it.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from carft_fast.batch import PackedBatch, derive_seed
from carft_fast.config import SYNTHETIC, Config, ModelConfig
from carft_fast.errors import InputError
from carft_fast.synthetic import build_model_config, build_tokenizer

HEADS_WEIGHTS = "carft_heads.safetensors"
HEADS_CONFIG = "carft_heads.json"

logger = logging.getLogger(__name__)


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

    def save(self, folder: Path) -> None:
        save_file(
            {name: p.detach().cpu().contiguous() for name, p in self.state_dict().items()},
            folder / HEADS_WEIGHTS,
        )
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


def base_lm(lm: nn.Module) -> nn.Module:
    """The causal LM under peft's wrapper, if there is one."""
    unwrap: Callable[[], nn.Module] | None = getattr(lm, "get_base_model", None)
    return lm if unwrap is None else unwrap()


class ModelOutput(NamedTuple):
    hidden_TD: Tensor
    logits_CV: Tensor | None
    """Logits that predict the completion tokens; only where the LM head is more than hidden @ weight.T."""


class CarftModel(nn.Module):
    """Policy (with heads) or frozen reference (without)."""

    def __init__(self, lm: PreTrainedModel, heads: CarftHeads | None, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.lm = lm
        self.heads = heads
        self.compute_dtype = compute_dtype
        self.plain_head = self._has_plain_head()
        if not self.plain_head:
            logger.warning("the LM head is not hidden @ weight.T (bias, scale or soft cap): logits are materialised")

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def head_weight_VD(self) -> Tensor:
        return self.lm.get_output_embeddings().weight

    def value(self, hidden_TD: Tensor) -> Tensor:
        assert self.heads is not None, "the reference model has no heads"
        return self.heads.value(hidden_TD)

    def embed(self, pooled_BD: Tensor) -> Tensor:
        assert self.heads is not None, "the reference model has no heads"
        return self.heads.embed(pooled_BD)

    def forward(self, batch: PackedBatch, *, need_logits: bool = True) -> ModelOutput:
        """Last hidden states [T, D] after the final norm, in the packed order of `batch`.

        Rows are right-padded for the forward only: under causal attention no real token sees a pad on its right, so
        no mask is needed. `need_logits=False` skips the LM head where it would be materialised.
        """
        lengths = torch.tensor(batch.lengths, device=batch.ids_T.device)
        real_BL = torch.arange(max(batch.lengths), device=batch.ids_T.device) < lengths[:, None]
        ids_BL = torch.zeros_like(real_BL, dtype=torch.int64).masked_scatter_(real_BL, batch.ids_T)
        with self.autocast():
            if self.plain_head or not need_logits:
                return ModelOutput(
                    self.lm.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state[real_BL], None
                )
            with self._captured_hidden() as captured:
                logits_BLV = self.lm(input_ids=ids_BL, use_cache=False).logits
        return ModelOutput(captured[0][real_BL], logits_BLV[real_BL][batch.predict_index_C])

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Matmuls in `compute_dtype`; training and sampling both run in it."""
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, self.compute_dtype, enabled=enabled)

    @contextlib.contextmanager
    def _captured_hidden(self) -> Iterator[list[Tensor]]:
        captured: list[Tensor] = []
        handle = self.lm.base_model.register_forward_hook(lambda _m, _i, out: captured.append(out.last_hidden_state))
        try:
            yield captured
        finally:
            handle.remove()

    @torch.no_grad()
    def _has_plain_head(self) -> bool:
        """Whether logits are hidden @ weight.T, found by asking the model with a few tokens."""
        head = self.lm.get_output_embeddings()
        if head is None or not isinstance(getattr(head, "weight", None), Tensor):
            return False
        ids_BL = torch.arange(8, device=self.device)[None] % head.weight.shape[0]
        with self._captured_hidden() as captured:
            logits_BLV = self.lm(input_ids=ids_BL, use_cache=False).logits.float()
        plain_BLV = captured[0].float() @ head.weight.float().T
        return plain_BLV.shape == logits_BLV.shape and torch.allclose(plain_BLV, logits_BLV, rtol=1e-3, atol=1e-3)

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face model folder, with the heads beside it."""
        self.lm.save_pretrained(folder)
        if self.heads is not None:
            self.heads.save(folder)


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError('model.device = "cuda": torch sees no GPU; allowed here: "auto", "cpu"')
    return torch.device(name)


def load_tokenizer(config: ModelConfig) -> Any:
    """Raises InputError for a folder without model or tokenizer, or a Hub id that cannot be had."""
    if config.path == SYNTHETIC:
        return build_tokenizer()
    _check_folder(config.path)
    try:
        return AutoTokenizer.from_pretrained(config.path, revision=config.revision)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f'model.path = "{config.path}": no tokenizer could be loaded: {_first_line(error)}') from None


def load_lm_config(config: ModelConfig) -> Any:
    if config.path == SYNTHETIC:
        return build_model_config(len(build_tokenizer()))
    _check_folder(config.path)
    try:
        lm_config = AutoConfig.from_pretrained(config.path, revision=config.revision)
    except (OSError, ValueError) as error:
        raise InputError(
            f'model.path = "{config.path}": no model config could be loaded: {_first_line(error)}'
        ) from None
    for name in vars(lm_config):
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(getattr(lm_config, name), float):
            setattr(lm_config, name, 0.0)
    return lm_config


def load_model(config: Config, path: str, device: torch.device, *, heads: bool) -> CarftModel:
    """The causal LM at `path` (folder, Hub id, "synthetic") in float32, with its heads (fresh ones if it has none)."""
    model_config = config.model.model_copy(update={"path": path})
    lm_config = load_lm_config(model_config)
    if path == SYNTHETIC:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "model"))
            lm = AutoModelForCausalLM.from_config(lm_config, attn_implementation=config.model.attention)
    else:
        try:
            lm = AutoModelForCausalLM.from_pretrained(
                path,
                config=lm_config,
                revision=config.model.revision,
                dtype=torch.float32,
                attn_implementation=config.model.attention,
                use_safetensors=True,
            )
        except (OSError, ValueError, ImportError) as error:
            raise InputError(f'model.path = "{path}": weights could not be loaded: {_first_line(error)}') from None
    lm.to(device).eval()
    if heads and config.model.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lm.train()  # transformers checkpoints in training mode only; dropout is zero in the config
    carft_heads = None
    if heads:
        size = lm.get_input_embeddings().weight.shape[1]
        hidden_size = getattr(lm_config.get_text_config(), "hidden_size", size)
        carft_heads = CarftHeads(hidden_size, config.model.embedding_dim, config.model.value_head, config.seed)
        if (Path(path) / HEADS_CONFIG).is_file():
            carft_heads.load(Path(path))
        carft_heads.to(device)
    model = CarftModel(lm, carft_heads, getattr(torch, config.model.compute_dtype))
    if not heads:
        model.requires_grad_(False)
    return model


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
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise InputError(f'model.path = "{path}": no *.safetensors weights (pickled weights can run code: not loaded)')


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
