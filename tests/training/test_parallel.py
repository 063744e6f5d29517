"""How a model in training is divided: what is asked for, what is refused, and gradients that are summed."""

import re
from pathlib import Path

import pytest

import carft_fast.training.parallel
from carft_fast.config.schema import Config
from carft_fast.config.toml import load_config
from carft_fast.core.console import Console
from carft_fast.core.errors import InputError
from carft_fast.training.pipeline import prepare

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version 1: 2 is needed"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, 'mixed_precision "bf16": set it to "no"'),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero_stage 1: allowed"),
    ],
)
def test_what_accelerate_asks_for_and_this_trainer_does_not_do(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(carft_fast.training.parallel, "world_size", lambda: 2)
    with pytest.raises(InputError, match=re.escape(message)):
        carft_fast.training.parallel.strategy(Config())


@pytest.mark.parametrize("how", ["zero2", "zero3"])
def test_a_rollback_under_deepspeed_is_refused_before_anything_is_written(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carft_fast.training.parallel, "world_size", lambda: 2)
    options = ["guard.action=rollback", f"distributed.strategy={how}"]
    config = load_config(str(ROOT / "carft_fast" / "config" / "quickstart.toml"), options)
    with pytest.raises(InputError, match=rf'guard.action = "rollback" .* "{how}" \(DeepSpeed\): allowed are "off"'):
        prepare(config, tmp_path / "run", Console(), stages=("sft", "rl"))
    assert not (tmp_path / "run").exists()
    prepare(config, tmp_path / "run", Console(), stages=("sft",))  # which has no guard
