"""Which engine samples, and whether it can run here."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from carft_fast.config.schema import Config
from carft_fast.core.errors import InputError
from carft_fast.core.processes import world_size
from carft_fast.models.causal_lm import CarftModel
from carft_fast.rollout.base import RolloutEngine
from carft_fast.rollout.hf import HFEngine
from carft_fast.rollout.shared import LeaderEngine, SpreadEngine


def check_engine(config: Config, lm_config: Any, device_type: str) -> None:
    """Raises InputError for an engine that cannot run here; cheap where rollout.engine is "hf"."""
    rollout = config.rollout
    if rollout.sleep_level and device_type != "cuda":
        raise InputError(f"rollout.sleep_level = {rollout.sleep_level}: needs model.device cuda, this is {device_type}")
    if rollout.weight_transfer in ("nccl", "ipc") and device_type != "cuda":
        raise InputError(
            f'rollout.weight_transfer = "{rollout.weight_transfer}": needs model.device cuda, this is {device_type}; '
            'allowed here: "files"'
        )
    if rollout.transfer_dir and not os.access(rollout.transfer_dir, os.W_OK | os.X_OK):
        raise InputError(f"rollout.transfer_dir = {rollout.transfer_dir}: not a folder that can be written to")
    if rollout.engine == "vllm" or (rollout.engine == "vllm-server" and not rollout.servers):
        from carft_fast.rollout.vllm import adapter

        adapter.check_installed()
        adapter.check_model(lm_config, device_type)


def build_engine(
    config: Config,
    model: CarftModel,
    tokenizer: Any,
    *,
    folder: Path | None = None,
    log: Callable[[str], None] = print,
) -> RolloutEngine:
    """The engine that `rollout.engine` names, with the model's current weights.

    `folder` gets the logs of servers that are started (absent: the temporary folder); `log` is told what takes long.
    """
    rollout = config.rollout
    several = world_size() > 1
    engine: RolloutEngine
    if rollout.engine == "hf":
        own = HFEngine(model, tokenizer, batch_size=rollout.batch_size)
        return SpreadEngine(own, own.forwards_together) if several else own
    if rollout.engine == "vllm":
        from carft_fast.rollout.vllm.engine import VLLMEngine

        log("starting vLLM")
        engine = VLLMEngine(config, model, tokenizer.eos_token_id)
        engine = SpreadEngine(engine) if several else engine
    else:
        from carft_fast.rollout.vllm.adapter import engine_dtype
        from carft_fast.rollout.vllm.servers import VLLMServerEngine

        def start() -> VLLMServerEngine:
            return VLLMServerEngine(config, model, tokenizer.eos_token_id, folder=folder, log=log)

        engine = LeaderEngine(start, engine_dtype(config)) if several else start()
    try:
        engine.sync(model)
    except BaseException:
        engine.close()
        raise
    return engine
