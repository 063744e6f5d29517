"""SFT's validation loss on several real processes (gloo) is that of one."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config.toml import load_config
from carft_fast.core.console import Console
from carft_fast.models.load import load_model
from carft_fast.objective.passes import build_passes
from carft_fast.training.parallel import build_learner
from carft_fast.training.pipeline import prepare
from carft_fast.training.sft import validation_figures
from tests.processes import spawn

from ..conftest import TINY_RUN


def eval_loss(strategy: str, folder: str) -> float:
    """Five rows: the processes get unequal shares, one of them none in its last turn."""
    options = ["sft.eval_loss=true", "data.eval_rows=5", "sft.micro_batch_tokens=160", "data.train_rows=20"]
    config = load_config(str(QUICKSTART_CONFIG), [*TINY_RUN, *options, f"distributed.strategy={strategy}"])
    run = prepare(config, Path(folder) / "run", Console(), stages=("sft",))
    model = load_model(config, "synthetic", run.device, heads=True)
    model = build_learner(config, model, config.sft, run.device).model
    return validation_figures(run, model, build_passes(config, model, 160))["eval_loss"]


def _rank(rank: int, strategy: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    Path(f"{folder}/{rank}").write_text(repr(eval_loss(strategy, folder)))
    dist.barrier()


def over_processes(strategy: str) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (strategy, folder), 2)
        return [float(Path(f"{folder}/{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_find_the_loss_of_one(strategy: str, tmp_path: Path) -> None:
    alone = eval_loss("ddp", str(tmp_path))
    assert over_processes(strategy) == pytest.approx([alone, alone], rel=1e-6)
