"""The two heads on the last hidden state: value and CoT embedding."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from carft_fast.config import ModelConfig
from carft_fast.core import InputError, derive_seed, read_json_object

HEADS_WEIGHTS = "carft_heads.safetensors"
HEADS_CONFIG = "carft_heads.json"


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
        """Raises InputError for weights that are none, or another model's."""
        try:
            self.load_state_dict(load_file(folder / HEADS_WEIGHTS))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"{folder / HEADS_WEIGHTS}: cannot be loaded: {' '.join(str(error).split())[:300]}"
            ) from None


def check_heads(path: str, config: ModelConfig) -> None:
    """Raises InputError when heads saved at `path` are not those the config asks for."""
    file = Path(path) / HEADS_CONFIG
    if not file.is_file():
        return
    saved = read_json_object(file)
    for name, wanted in (("embedding_dim", config.embedding_dim), ("value_head", config.value_head)):
        if saved.get(name) != wanted:
            raise InputError(f"{file}: the saved heads have {name} {saved.get(name)!r}, the config asks for {wanted!r}")
