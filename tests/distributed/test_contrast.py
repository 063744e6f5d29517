"""Contrastive signals over real processes (gloo): their parts add up to the one-process loss, gradients included."""

import itertools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from carft_fast.config.sections import ContrastiveConfig
from carft_fast.objective.losses import ContrastTargets, contrastive_loss
from tests.processes import spawn


class Inputs(NamedTuple):
    z_2: Tensor
    targets: ContrastTargets


def inputs(n: int) -> Inputs:
    generator = torch.Generator().manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def bits() -> Tensor:
        return torch.rand(n, generator=generator) < 0.6

    correct = bits()
    return Inputs(normal(n, 3, 5), ContrastTargets(normal(n, 5), correct, normal(n, 5), bits() & ~correct, ~correct))


def part(whole: Inputs, rows: slice, counts: list[int]) -> Inputs:
    return Inputs(whole.z_2[rows], ContrastTargets(*(x[rows] for x in whole.targets[:5]), counts=counts))


def loss_and_gradient(part: Inputs, config: ContrastiveConfig) -> tuple[Tensor, Tensor]:
    z_2 = part.z_2.clone().requires_grad_()
    loss = contrastive_loss(z_2, part.targets, config)
    loss.backward()
    assert z_2.grad is not None
    return loss.detach(), z_2.grad


def _rank(rank: int, cuts: list[int], settings: dict[str, Any], folder: str) -> None:
    world = len(cuts) - 1
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    counts = [end - start for start, end in itertools.pairwise(cuts)]
    mine = part(inputs(cuts[-1]), slice(cuts[rank], cuts[rank + 1]), counts)
    torch.save(loss_and_gradient(mine, ContrastiveConfig(**settings)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def over_processes(cuts: list[int], **settings: Any) -> tuple[Tensor, Tensor]:
    """The sum of the processes' losses, and their gradients side by side."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (cuts, settings, folder), len(cuts) - 1)
        found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(len(cuts) - 1)]
    return torch.stack([loss for loss, _ in found]).sum(), torch.cat([gradient for _, gradient in found])


@pytest.mark.parametrize("cuts", [[0, 4, 11], [0, 5, 5, 9]], ids=["two unequal", "three, one without rows"])
@pytest.mark.parametrize("gradient", ["full", "published"])
def test_processes_together_are_one(cuts: list[int], gradient: str) -> None:
    whole = loss_and_gradient(inputs(cuts[-1]), ContrastiveConfig(mode="both", gradient=gradient))
    for ours, expected in zip(over_processes(cuts, mode="both", gradient=gradient), whole, strict=True):
        torch.testing.assert_close(ours, expected)


def test_local_candidates_of_other_processes_are_constants() -> None:
    """The same loss; the gradient of each process's rows is that of its own loss alone."""
    cuts, config = [0, 4, 11], ContrastiveConfig(mode="positive")
    whole, (loss, gradient) = inputs(11), over_processes([0, 4, 11], mode="positive", gradient="local")
    expected_loss, full_gradient = loss_and_gradient(whole, config)
    torch.testing.assert_close(loss, expected_loss)
    for start, end in itertools.pairwise(cuts):
        rows = slice(start, end)
        mine = (torch.arange(11) >= start) & (torch.arange(11) < end)
        z_2 = whole.z_2.clone().requires_grad_()
        own_rows = whole.targets._replace(correct_B=whole.targets.correct_B & mine)
        share = own_rows.correct_B.sum() / whole.targets.correct_B.sum()
        (contrastive_loss(z_2, own_rows, config) * share).backward()
        assert z_2.grad is not None
        torch.testing.assert_close(gradient[rows], z_2.grad[rows])
        assert not torch.allclose(gradient[rows], full_gradient[rows])
