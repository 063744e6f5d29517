"""Sampling completions: one interface (`base`), an engine a file, and the choice between them."""

from typing import Any

from carft_fast.config import RolloutConfig
from carft_fast.model import CarftModel
from carft_fast.rollout.base import Rollout, RolloutEngine, SamplingParams
from carft_fast.rollout.hf import HFEngine

__all__ = ["Rollout", "RolloutEngine", "SamplingParams", "build_engine"]


def build_engine(config: RolloutConfig, model: CarftModel, tokenizer: Any) -> RolloutEngine:
    """The engine that `rollout.engine` names, on the model's current weights."""
    return HFEngine(model, tokenizer, batch_size=config.batch_size)
