"""Tiny runs of the whole pipeline, for tests that need one."""

import json
from pathlib import Path
from typing import Any

from carft_fast.config.schema import Config
from carft_fast.config.toml import load_config
from carft_fast.core.console import Console
from carft_fast.training.pipeline import prepare, train


def tiny_config(tiny_run: list[str], *overrides: str) -> Config:
    from carft_fast.cli import QUICKSTART_CONFIG

    return load_config(str(QUICKSTART_CONFIG), [*tiny_run[1::2], *overrides])


def run_pipeline(folder: Path, config: Config, stages: tuple[str, ...] = ("sft", "rl")) -> dict[str, Any]:
    prepared = prepare(config, folder, Console(), stages=stages)
    return train(prepared, stages, resume=False)


def records(folder: Path, stage: str, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if (r["stage"], r["kind"]) == (stage, kind)]
