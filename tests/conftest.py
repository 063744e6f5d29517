"""Shared fixtures: the reference material beside the repository, and a run small enough for a test."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# index ranges are checked on every device, a GPU's too
os.environ.setdefault("CARFT_KERNELS_CHECK_INDICES", "1")
# Triton reads this when it is imported, which nothing above does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"

# The quickstart's task and model, cut to seconds: every phase runs, with more than one mini- and micro-batch.
TINY_RUN = [
    "sft.max_steps=6",
    "sft.batch_size=16",
    "sft.micro_batch_tokens=400",
    "sft.warmup_steps=2",
    "sft.save_every=2",
    "rl.max_steps=4",
    "rl.batch_size=12",
    "rl.mini_batch_size=8",
    "rl.micro_batch_tokens=200",
    "rl.eval_every=2",
    "rl.save_every=1",
    "rollout.max_new_tokens=24",
    "data.eval_rows=20",
]


def as_set_options(overrides: list[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


@pytest.fixture(scope="session")
def tiny_run() -> list[str]:
    """--set options of a tiny quickstart."""
    return as_set_options(TINY_RUN)


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """A file of ../shared/data."""

    def find(name: str) -> Path:
        path = SHARED / "data" / name
        if not path.parent.is_dir():
            pytest.skip(f"reference data folder {path.parent} does not exist")
        return path

    return find
