"""A few sequences, the synthetic model, and what transformers makes of them."""

import torch
from torch import Tensor

from carft_fast.config.schema import Config
from carft_fast.config.toml import load_config
from carft_fast.models.causal_lm import CarftModel

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]
COMPLETIONS = [[20, 21, 2], [22, 2], [23, 24, 25, 26, 2]]


def config(*overrides: str) -> Config:
    return load_config(None, ["model.path=synthetic", *overrides])


def logits_of(model: CarftModel, ids_BL: Tensor) -> Tensor:
    """transformers' own forward with its own attention."""
    with model.padded() as lm:
        return lm(ids_BL).logits


def alone(model: CarftModel) -> list[Tensor]:
    """Each sequence by itself through transformers: its log-probs."""
    found = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        logits = logits_of(model, torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return found
