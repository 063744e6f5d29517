"""Steps on several real processes (gloo) against the same steps on one: metrics, and weights after three of them."""

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from carft_fast.model import load_model
from carft_fast.parallel import build_learner
from tests.integration.stepcase import CPU, METHODS, Case, look_at, quick_config, random_case, spread_out

OPTIONS = ["rl.lr=1e-3", "rl.eps=1e-4", "rl.max_grad_norm=1.0", "model.gradient_checkpointing=false"]
GROUPS = {
    "ddp, 2 processes": (2, "ddp"),
    "ddp, 3 processes": (3, "ddp"),
    "fsdp2, 2 processes": (2, "fsdp2"),
    "fsdp2, 3 processes": (3, "fsdp2"),
    "zero2, 2 processes": (2, "zero2"),
    "zero3, 2 processes": (2, "zero3"),
}
BRIEF = ["carft_both", "reft", "dr_grpo", "dr_grpo, all wrong", "carft_both, nothing extracted", "lora"]
"""What all but DDP and FSDP2 on two processes are held to."""
EDGES = ["all correct", "all wrong", "nothing extracted"]


class Setting(NamedTuple):
    name: str
    options: list[str]
    cases: Callable[[], list[Case]]


def settings() -> list[Setting]:
    """Every method for three steps, then what might leave a process without work."""

    def three(per_prompt: int) -> list[Case]:
        return [random_case(s, "mixed", prompts=12 // per_prompt, per_prompt=per_prompt) for s in range(3)]

    many = ["rl.micro_batch_tokens=80", "data.max_length=80"]
    found = []
    for method in ("carft_both", "reft", "dr_grpo"):
        per_prompt = 4 if method == "dr_grpo" else 1
        found.append(Setting(method, METHODS[method], lambda n=per_prompt: three(n)))
        found.append(Setting(f"{method}, many micro-batches", [*METHODS[method], *many], lambda n=per_prompt: three(n)))
        for verdicts in EDGES:
            found.append(
                Setting(
                    f"{method}, {verdicts}",
                    METHODS[method],
                    lambda v=verdicts, n=per_prompt: [random_case(5, v, prompts=2, per_prompt=n)],
                )
            )
    found.append(Setting("lora", [*METHODS["carft_both"], "lora.rank=4"], lambda: three(1)))
    found.append(Setting("padded", [*METHODS["carft_both"], 'model.impl="reference"'], lambda: three(1)))
    return found


def train(setting: Setting, strategy: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Metrics of every step, and the weights in the end (on the main process)."""
    config = quick_config(*OPTIONS, *setting.options, f"distributed.strategy={strategy}")
    policy = load_model(config, "synthetic", CPU, heads=True)
    if not config.lora.rank:
        spread_out(policy)
    learner = build_learner(config, policy, config.rl, CPU)
    metrics = []
    for case in setting.cases():
        p = look_at(config, case, learner)
        correct = [grade.correct for grade in case.grades]
        found = p.step.update(p.samples, p.plan, p.experience, p.advantages, correct, p.live, 1e-3).metrics
        advantage_C = p.advantages.raw_advantage_C
        metrics.append(found | {"advantage": float(advantage_C.sum()), "score": float(p.score_N.sum())})
    gathered = policy.gather()
    if gathered is not None:
        return metrics, gathered.lm | {f"heads.{name}": x for name, x in gathered.heads.items()}
    assert policy.heads is not None
    whole = {name: x.detach().clone() for name, x in policy.lm.state_dict().items()}
    return metrics, whole | {f"heads.{name}": x.detach().clone() for name, x in policy.heads.state_dict().items()}


def _rank(rank: int, group: str, folder: str) -> None:
    size, strategy = GROUPS[group]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}  # DeepSpeed asks for them
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    for setting in chosen(group):
        torch.save(train(setting, strategy), f"{folder}/{setting.name}-{rank}.pt")
    dist.destroy_process_group()


def chosen(group: str) -> list[Setting]:
    full = group in ("ddp, 2 processes", "fsdp2, 2 processes")
    return [setting for setting in settings() if full or setting.name in BRIEF]


@functools.cache
def alone(name: str) -> Any:
    return train(next(setting for setting in settings() if setting.name == name), "auto")


@functools.cache
def together(group: str) -> dict[str, Any]:
    """By setting: what each process found."""
    size, _ = GROUPS[group]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (group, folder), nprocs=size)
        return {
            setting.name: [torch.load(Path(folder) / f"{setting.name}-{rank}.pt") for rank in range(size)]
            for setting in chosen(group)
        }


@pytest.mark.parametrize(("group", "name"), [(group, setting.name) for group in GROUPS for setting in chosen(group)])
def test_several_processes_train_like_one(group: str, name: str) -> None:
    expected_metrics, expected_weights = alone(name)
    for metrics, _ in together(group)[name]:
        for ours, expected in zip(metrics, expected_metrics, strict=True):
            assert ours.keys() == expected.keys()
            for key, value in expected.items():
                assert ours[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    _, weights = together(group)[name][0]
    assert weights.keys() == expected_weights.keys()
    for key, expected in expected_weights.items():
        torch.testing.assert_close(weights[key], expected, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
