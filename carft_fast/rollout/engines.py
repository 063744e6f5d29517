"""Which engine samples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from carft_fast.config import Config
from carft_fast.core import world_size
from carft_fast.data import PromptFormat
from carft_fast.models import CarftModel
from carft_fast.rollout.base import RolloutEngine
from carft_fast.rollout.hf import HFEngine
from carft_fast.rollout.shared import LeaderEngine, SpreadEngine


def build_engine(
    config: Config, model: CarftModel, tokenizer: Any, *, folder: Path | None = None, log: Callable[[str], None] = print
) -> RolloutEngine:
    """The engine that `rollout.engine` names, with the model's current weights.

    `folder` gets the logs of servers that are started (None: a temporary folder). `log` is told what takes long.
    """
    several = world_size() > 1
    ends = PromptFormat.of(config, tokenizer).end_ids(model.eos_ids)
    engine: RolloutEngine
    if config.rollout.engine == "hf":
        hf = HFEngine(model, tokenizer, batch_size=config.rollout.batch_size, ends=ends)
        return SpreadEngine(hf, hf.forwards_together) if several else hf
    if config.rollout.engine == "vllm":
        from carft_fast.rollout.vllm.engine import VLLMEngine

        log("starting vLLM")
        engine = VLLMEngine(config, model, ends)
        engine = SpreadEngine(engine) if several else engine
    else:
        from carft_fast.rollout.vllm.adapter import engine_dtype, sends_adapters
        from carft_fast.rollout.vllm.servers import VLLMServerEngine

        def start() -> VLLMServerEngine:
            return VLLMServerEngine(config, model, ends, folder=folder, log=log)

        unmerged = sends_adapters(config, model.device.type)
        engine = LeaderEngine(start, engine_dtype(config), unmerged=unmerged) if several else start()
    try:
        engine.sync(model)
    except BaseException:
        engine.close()
        raise
    return engine
