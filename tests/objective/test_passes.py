"""Micro-batches, and the two ways through the model: packed and padded find the same on the same rows.

What calls the passes is in the functions at the top.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.load import load_model
from carft_fast.objective.losses import Normaliser, RolloutTargets
from carft_fast.objective.passes import Rows, Want, build_passes

from ..models.checks import config

CPU = torch.device("cpu")
IMPLEMENTATIONS = {"packed": "fast", "padded": "padded"}
WHOLE = Normaliser(sequences=9, tokens=80, max_new_tokens=12)


def build(model: CarftModel, how: str, budget: int, *options: str, share_prompts: bool = False) -> Any:
    chosen = config(f"model.impl={IMPLEMENTATIONS[how]}", *options)
    return build_passes(chosen, model, budget, share_prompts=share_prompts)


def micro_batches(passes: Any, lengths: Sequence[tuple[int, int]], multiple_of: int) -> list[list[int]]:
    """Of rows with so many prompt and completion tokens; prompts of one length are the same prompt."""
    rows = Rows([[7] * p for p, _ in lengths], [[8] * c for _, c in lengths])
    return passes.micro_batches(rows, multiple_of=multiple_of)


def found_by(passes: Any, model: CarftModel, rows: Rows) -> dict[str, Tensor]:
    """What a forward without gradient finds."""
    outputs, _ = passes.outputs(model, rows, Want(logprob=True, value=True, embedding=True))
    with torch.no_grad():
        loss = passes.cross_entropy(model, rows, WHOLE.tokens)
    return {"log-probs": outputs.logprob_C, "values": outputs.value_C, "embeddings": outputs.z, "cross-entropy": loss}


def trained_by(
    passes: Any, model: CarftModel, rows: Rows, targets: RolloutTargets
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The update's loss, its metrics and the embeddings it used; every parameter's gradient of loss and embeddings."""
    model.zero_grad()
    live = [True] * len(rows.prompts)
    found = passes.loss(model, rows, targets, WHOLE, live, embedding=True)
    (found.loss + found.z.square().mean()).backward()
    results = {"loss": found.loss.detach(), "log-probs": found.logprob_C, "embeddings": found.z.detach()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return results | {name: x.float() for name, x in found.metrics.items()}, gradients


@pytest.fixture(scope="module")
def models() -> dict[str, CarftModel]:
    """One for each way, with the same weights: away from their initial values."""
    found = {}
    for how, value in IMPLEMENTATIONS.items():
        model = load_model(config(f"model.impl={value}"), "synthetic", CPU, heads=True)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        found[how] = model
    return found


LENGTHS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), min_size=1, max_size=40)


@pytest.mark.parametrize("how", ["packed", "packed, prompts shared", "padded"])
@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(50, 300), st.integers(1, 4))
def test_micro_batches_have_every_row_once_within_the_budget(
    how: str, models: dict[str, CarftModel], lengths: list[tuple[int, int]], budget: int, multiple_of: int
) -> None:
    way = how.partition(",")[0]
    passes = build(models[way], way, budget, share_prompts="shared" in how)
    batches = micro_batches(passes, lengths, multiple_of)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) % multiple_of == 0
    assert multiple_of > 1 or all(batches), "one process computes no empty batch"
    for batch in filter(None, batches):
        prompts, completions = zip(*(lengths[i] for i in batch), strict=True)
        tokens = {
            "packed": sum(prompts) + sum(completions),
            "packed, prompts shared": sum(set(prompts)) + sum(completions),
            "padded": len(batch) * (max(prompts) + max(completions)),
        }
        assert tokens[how] <= budget


def random_rows(parts: bool) -> Rows:
    """Two rows have one prompt; completions of one token, and the longest not behind the longest prompt."""
    generator = torch.Generator().manual_seed(4)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 90, (n,), generator=generator).tolist()

    prompts = [ids(n) for n in (3, 9, 1, 5)]
    completions = [ids(n) for n in (7, 1, 11, 4, 6)]
    masks = [torch.rand(2, len(c), generator=generator) < 0.6 for c in completions] if parts else None
    for mask in masks or ():
        mask[:, -1] = True
    return Rows([*prompts, prompts[0]], completions, masks)


def random_targets(rows: Rows, logprob: Tensor, value: Tensor) -> RolloutTargets:
    """Not far from what the model says, so that some ratios and values are clipped and others not."""
    generator = torch.Generator().manual_seed(5)

    def noise(size: float) -> Tensor:
        return size * torch.randn(len(logprob), generator=generator)

    return RolloutTargets(
        advantage_C=noise(1.0),
        old_logprob_C=logprob + noise(0.3),
        correction_C=noise(1.0).exp(),
        ref_logprob_C=logprob + noise(0.5),
        old_value_C=value + noise(0.3),
        return_C=value + noise(1.0),
    )


@pytest.mark.parametrize("parts", [False, True], ids=["whole completions", "parts of them"])
@pytest.mark.parametrize("share_prompts", [False, True], ids=["prompts apart", "prompts shared"])
def test_packed_and_padded_find_the_same(models: dict[str, CarftModel], parts: bool, share_prompts: bool) -> None:
    rows = random_rows(parts)
    options = ["rollout.temperature=0.8", "rl.kl_loss_coef=0.3", "rl.loss_mean=token"]
    both = [
        (build(models["packed"], "packed", 500, *options, share_prompts=share_prompts), models["packed"], rows),
        (build(models["padded"], "padded", 500, *options), models["padded"], rows),
    ]
    looked = [found_by(*way) for way in both]
    targets = random_targets(rows, looked[1]["log-probs"], looked[1]["values"])
    losses, gradients = zip(*(trained_by(*way, targets) for way in both), strict=True)
    for ours, plain in (looked, losses, gradients):
        assert ours.keys() == plain.keys()
        for name, expected in plain.items():
            assert float((ours[name] - expected).norm()) <= 1e-5 * max(float(expected.norm()), 1e-3), name
