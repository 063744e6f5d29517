"""Contrastive reinforced fine-tuning (CARFT) of language models that reason: the trainer.

`from carft_fast import Trainer, load_config`; see docs/python.md. Names load what they need when they are first used.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from carft_fast.core import EngineError as EngineError
    from carft_fast.core import Example as Example
    from carft_fast.core import InputError as InputError
    from carft_fast.core import RewardError as RewardError
    from carft_fast.core import Stopped as Stopped
    from carft_fast.core import TrainingError as TrainingError
    from carft_fast.rollout import Rollout as Rollout
    from carft_fast.rollout import RolloutEngine as RolloutEngine
    from carft_fast.rollout import SamplingParams as SamplingParams
    from carft_fast.trainer import Trainer as Trainer
    from carft_fast.trainer import load_config as load_config

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # else transformers asks a service to convert pickled weights of the Hub
}
"""No library reports what is run here. Read when they are imported, so set first; what the user has set stays."""

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

_ROOM_OF = {
    **dict.fromkeys(("Trainer", "load_config"), "trainer"),
    **dict.fromkeys(("EngineError", "Example", "InputError", "RewardError", "Stopped", "TrainingError"), "core"),
    **dict.fromkeys(("Rollout", "RolloutEngine", "SamplingParams"), "rollout"),
}
_TRAIN_EXTRA = {
    *("accelerate", "datasets", "lazy_loader", "math_verify", "matplotlib", "pydantic", "rich"),
    *("safetensors", "tensorboard", "tokenizers", "transformers", "typer"),
}
"""Modules that the extra `train` installs."""


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install, where a package of the extra `train` is missing."""
    missing = (error.name or "").partition(".")[0]
    message = f'carft-fast needs {missing}, which is not installed: pip install ".[train]", in the checkout'
    return message if missing in _TRAIN_EXTRA else None


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOM_OF])


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(missing_extra(error) or str(error), name=error.name) from error
