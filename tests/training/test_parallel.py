"""How a model in training is divided: what is asked for, what is refused, and gradients that are summed."""

import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate.commands import launch
from torch import Tensor, nn

import carft_fast.training.parallel
from carft_fast.config.schema import Config
from carft_fast.config.toml import load_config
from carft_fast.core.console import Console
from carft_fast.core.errors import InputError
from carft_fast.core.processes import leave
from carft_fast.training.parallel import Learner, strategy
from carft_fast.training.pipeline import prepare
from tests.processes import spawn

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "accelerate"
ASKS = ("ACCELERATE_", "FSDP_", "DEEPSPEED_")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Sets the environment of one of two processes: nothing of accelerate's but what is given."""
    monkeypatch.setattr(carft_fast.training.parallel, "world_size", lambda: 2)
    for name in os.environ:
        if name.startswith(ASKS):
            monkeypatch.delenv(name)

    def change(values: dict[str, str]) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return change


def of_launcher(config: str, *words: str) -> dict[str, str]:
    """What `accelerate launch` sets for a process: its own code, which starts nothing here."""
    found: dict[str, str] = {}

    def prepared_by(prepare: Callable[..., Any]) -> Callable[[Any], None]:
        def start(arguments: Any) -> None:
            made = prepare(arguments)
            found.update(made[1] if isinstance(made, tuple) else made)

        return start

    parser = launch.launch_command_parser()
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(launch, "multi_gpu_launcher", prepared_by(launch.prepare_multi_gpu_env)),
        mock.patch.object(launch, "deepspeed_launcher", prepared_by(launch.prepare_deepspeed_cmd_env)),
    ):
        launch.launch_command(parser.parse_args(["--config_file", str(CONFIGS / config), *words, "train.py"]))
    return {name: value for name, value in found.items() if name.startswith(ASKS)}


@pytest.mark.parametrize(
    ("config", "words", "expected"),
    [
        *((path.name, [], path.stem) for path in sorted(CONFIGS.glob("*.yaml"))),
        ("ddp.yaml", ["--use_fsdp", "--fsdp_version", "2"], "fsdp2"),
        ("ddp.yaml", ["--use_deepspeed", "--zero_stage", "2"], "zero2"),
        ("zero2.yaml", ["--zero_stage", "3"], "zero3"),
    ],
)
def test_what_accelerates_launcher_asks_for(
    config: str, words: list[str], expected: str, environment: Callable[[dict[str, str]], None]
) -> None:
    environment(of_launcher(config, *words))
    assert strategy(Config()) == expected


def test_a_config_file_of_deepspeed_decides(tmp_path: Path, environment: Callable[[dict[str, str]], None]) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}))
    environment({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    assert strategy(Config()) == "zero3"


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        (
            "ddp.yaml",
            ["--mixed_precision", "fp16"],
            'mixed_precision "fp16": set it to "no", model.compute_dtype decides',
        ),
        ("fsdp2.yaml", ["--mixed_precision", "bf16"], 'mixed_precision "bf16": set it to "no"'),
        ("ddp.yaml", ["--use_fsdp"], "fsdp_version 1: 2 is needed, see configs/accelerate"),
        ("zero3.yaml", ["--zero_stage", "1"], "zero_stage 1: allowed here are 2 and 3"),
        ("zero3.yaml", ["--zero_stage", "0"], "zero_stage 0: allowed here are 2 and 3"),
        ("zero2.yaml", ["--offload_optimizer_device", "cpu"], 'offload_optimizer_device "cpu"'),
        ("zero3.yaml", ["--offload_param_device", "cpu"], 'offload_param_device "cpu"'),
    ],
)
def test_what_the_launcher_may_not_ask_for(
    config: str, words: list[str], message: str, environment: Callable[[dict[str, str]], None]
) -> None:
    environment(of_launcher(config, *words))
    with pytest.raises(InputError, match=re.escape(message)):
        strategy(Config())


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1", "fsdp2"), ("yes", "fsdp2"), ("True", "fsdp2"), ("false", "ddp"), ("0", "ddp"), ("", "ddp")],
)
def test_every_way_to_write_true(value: str, expected: str, environment: Callable[[dict[str, str]], None]) -> None:
    environment({"ACCELERATE_USE_FSDP": value, "FSDP_VERSION": "2"})
    assert strategy(Config()) == expected


@pytest.mark.parametrize("configured", ["ddp", "fsdp2", "zero2", "zero3"])
def test_the_config_wins_and_one_process_divides_nothing(
    configured: str, environment: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
    environment(other | {"ACCELERATE_USE_FSDP": "true"} if configured == "ddp" else other)
    config = load_config(None, [f"distributed.strategy={configured}"])
    assert strategy(config) == configured
    monkeypatch.setattr(carft_fast.training.parallel, "world_size", lambda: 1)
    assert strategy(config) == strategy(Config()) == "ddp"


def test_a_missing_deepspeed_is_named(
    environment: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as Python says: there is none
    for how in ("zero2", "zero3"):
        with pytest.raises(InputError, match=rf'strategy "{how}" needs DeepSpeed: pip install "\.\[deepspeed\]"'):
            strategy(load_config(None, [f"distributed.strategy={how}"]))


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
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("guard.action=rollback", r'guard.action = "rollback" .* "{}" \(DeepSpeed\): allowed are "off"'),
        ("rl.gradient_terms=true", r'rl.gradient_terms = true .* "{}" \(DeepSpeed\): allowed are false'),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_before_anything_is_written(
    option: str, message: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carft_fast.training.parallel, "world_size", lambda: 2)
    options = [option, f"distributed.strategy={how}"]
    config = load_config(str(ROOT / "carft_fast" / "config" / "quickstart.toml"), options)
    with pytest.raises(InputError, match=message.format(how)):
        prepare(config, tmp_path / "run", Console(), stages=("sft", "rl"))
    assert not (tmp_path / "run").exists()
    prepare(config, tmp_path / "run", Console(), stages=("sft",))  # which has neither


# --- gradients of whole copies ---

BUCKET_BYTES = 400
SHAPES: dict[str, tuple[int, ...]] = {
    "small": (7,),
    "fills": (31, 3),
    "larger": (20, 30),
    "unused": (5,),
    "transposed": (12, 9),
    "scalar": (),
    "last": (3, 3, 3),
}


def gradient_of(name: str, rank: int, micro_batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * list(SHAPES).index(name) + 10 * rank + micro_batch)
    return torch.randn(SHAPES[name], generator=generator)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    carft_fast.training.parallel.BUCKET = BUCKET_BYTES
    model: Any = nn.Module()
    for name, shape in SHAPES.items():
        model.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    model.transposed = nn.Parameter(torch.zeros(SHAPES["transposed"][::-1]).T)  # and so is its gradient
    learner = Learner(model, torch.optim.SGD(model.parameters()))
    reduced, all_reduce = [], dist.all_reduce

    def recorded(flat: Tensor, *rest: Any) -> Any:
        reduced.append(flat.nbytes)
        return all_reduce(flat, *rest)

    with mock.patch.object(dist, "all_reduce", recorded):
        for micro_batch, last in ((0, False), (1, True)):
            used = [(name, p) for name, p in model.named_parameters() if name != "unused"]
            terms = [(p * gradient_of(name, rank, micro_batch)).sum() for name, p in used]
            learner.backward(torch.stack(terms).sum(), last=last)
            found = {name: p.grad for name, p in model.named_parameters()}
            torch.save({"gradients": found, "reduced": reduced}, f"{folder}/{rank}-{micro_batch}.pt")
    leave()


def test_gradients_are_summed_over_processes_a_bucket_at_a_time(tmp_path: Path) -> None:
    """Once a step; never averaged. With a gradient that is larger than a bucket, one that is not contiguous, and a
    parameter without any."""
    spawn(_rank, (str(tmp_path),), 2)
    trained = [name for name in SHAPES if name != "unused"]
    own = {rank: [{n: gradient_of(n, rank, m) for n in trained} for m in range(2)] for rank in range(2)}
    for rank in range(2):
        first, second = (torch.load(tmp_path / f"{rank}-{micro_batch}.pt") for micro_batch in range(2))
        assert first["reduced"] == []
        assert all(torch.equal(first["gradients"][name], own[rank][0][name]) for name in trained)
        assert second["gradients"]["unused"] is None
        for name in trained:
            total = (own[0][0][name] + own[0][1][name]) + (own[1][0][name] + own[1][1][name])
            assert torch.equal(second["gradients"][name], total), name
        sizes, buckets = [4 * math.prod(SHAPES[name]) for name in trained], [0]
        for size in sizes:  # a bucket takes gradients until it is full
            buckets[-1] += size
            if buckets[-1] >= BUCKET_BYTES:
                buckets.append(0)
        assert second["reduced"] == buckets == [400, 2400, 432, 112]
