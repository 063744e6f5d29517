"""The two contrastive signals: the published code's numbers, and the paper's formulas written out in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from carft_fast.config.sections import ContrastiveConfig
from carft_fast.objective.losses import ContrastTargets, contrastive_loss, negative_signal, positive_signal

from ..conftest import assert_golden

CPU = torch.device("cpu")


def settings(**values: Any) -> ContrastiveConfig:
    return ContrastiveConfig(**values)


@pytest.mark.parametrize(
    ("gradient", "variant", "loss_key"),
    [
        ("published", "broadcast_constgather", "loss_official"),
        ("full", "masked_mean_diffgather", "loss_masked_mean"),
        ("local", "masked_mean_diffgather", "loss_masked_mean"),
    ],
)
def test_positive_signal_against_the_published_code(golden: Any, gradient: str, variant: str, loss_key: str) -> None:
    """Loss and gradient; "published" is its training, "full" the paper's (in one process "local" is the same)."""
    checked = 0
    for name, params, a in golden("cl_pos").cases():
        expected = a.get(f"grad_z2_{variant}")
        if "z_other" in a or expected is None or params.get("clamp", 0.9) != 0.9:
            continue
        z_2 = a["z_2"].clone().requires_grad_()
        loss = positive_signal(
            z_2, ContrastTargets(a["z_1"], a["corr_mask"]), settings(gradient=gradient, temperature=params["tau"])
        )
        assert_golden(loss, a[loss_key], loose=True, name=name)
        (found,) = torch.autograd.grad(loss, z_2)
        assert_golden(found, expected, loose=True, name=name)
        checked += 1
    assert checked >= 3, "too few vectors apply"


def random_targets(seed: int, n: int = 7) -> tuple[Tensor, ContrastTargets]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def bits() -> Tensor:
        return torch.rand(n, generator=generator) < 0.6

    correct = bits()
    z_2 = normal(n, 3, 5).requires_grad_()
    common = z_2.detach()[:, 1] + 0.3 * normal(n, 5)  # some cosines above the clamp, some below
    return z_2, ContrastTargets(normal(n, 5), correct, common, bits() & ~correct, bits() & ~correct)


def negative_by_hand(z_2: Tensor, t: ContrastTargets, tau: float, clamp: float) -> Tensor:
    """Spec of eq. 8, a row at a time."""
    assert t.common is not None
    assert t.has_common_B is not None
    assert t.has_excluded_B is not None

    def cos(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y) / (x.norm() * y.norm())

    rows = []
    for i in range(len(z_2)):
        if not t.has_common_B[i]:
            continue
        own = cos(t.common[i], z_2[i, 1])
        away = sum((cos(z_2[i, 1], z_2[j, 2]) / tau).exp() for j in range(len(z_2)) if t.has_excluded_B[j])
        rows.append(-((own.clamp(max=clamp) / tau).exp() / ((own / tau).exp() + away)).log())
    return torch.stack(rows).mean() if rows else z_2.sum() * 0


@pytest.mark.parametrize("seed", range(6))
def test_negative_signal_is_the_papers(seed: int) -> None:
    z_2, targets = random_targets(seed)
    config = settings(mode="negative", temperature=0.3)
    found = contrastive_loss(z_2, targets, config)
    expected = negative_by_hand(z_2, targets, 0.3, 0.9)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, z_2, retain_graph=True)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][:, 0].any(), "the whole completion takes no part"


@pytest.mark.parametrize("seed", range(4))
def test_answer_states_are_drawn_by_the_positive_signal_without_those_that_lack_one(seed: int) -> None:
    """Spec of eq. 7, a row at a time: rows with a state that are correct, over all that have one."""
    z_2, targets = random_targets(seed)
    has = torch.arange(7) % 3 != seed % 3
    targets = ContrastTargets(targets.z_1, targets.correct_B & has, candidate_B=has)
    cosine_BB = torch.nn.functional.cosine_similarity(targets.z_1[:, None], z_2[None, :, -1], dim=2)
    rows = [
        (cosine_BB[i, has] / 0.3).exp().sum().log() - cosine_BB[i, i].clamp(max=0.9) / 0.3
        for i in range(7)
        if targets.correct_B[i]
    ]
    expected = torch.stack(rows).mean()
    found = contrastive_loss(z_2, targets, settings(mode="answer", temperature=0.3))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, z_2, retain_graph=True)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][~has].any()
    assert not gradients[0][:, :-1].any()


def test_both_signals_are_their_weighted_mean() -> None:
    """A half of each by default; a weight has no say where only one signal is there."""
    z_2, targets = random_targets(3)
    one, other, both = (contrastive_loss(z_2, targets, settings(mode=m)) for m in ("positive", "negative", "both"))
    torch.testing.assert_close(both, (one + other) / 2)
    assert float(one.detach()) != pytest.approx(float(other.detach()))
    for weight, expected in ((0.0, one), (0.3, 0.7 * one + 0.3 * other), (1.0, other)):
        found = contrastive_loss(z_2, targets, settings(mode="both", negative_weight=weight))
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(x, z_2, retain_graph=True)[0] for x in (found, expected)]
        torch.testing.assert_close(*gradients)
    for mode, alone in (("positive", one), ("negative", other)):
        assert torch.equal(contrastive_loss(z_2, targets, settings(mode=mode, negative_weight=0.3)), alone)


def test_published_negatives_carry_no_gradient() -> None:
    z_2, targets = random_targets(4)
    wrong = torch.arange(7) < 3
    targets = targets._replace(has_common_B=wrong, has_excluded_B=wrong)
    common, excluded = z_2.detach()[:, 1].requires_grad_(), z_2.detach()[:, 2].requires_grad_()
    full = negative_signal(common, excluded, targets, settings(mode="negative"))
    published = negative_signal(common, excluded, targets, settings(mode="negative", gradient="published"))
    assert torch.equal(full, published)
    assert torch.autograd.grad(full, excluded, retain_graph=True)[0].any()
    assert torch.autograd.grad(published, excluded, allow_unused=True)[0] is None


@pytest.mark.parametrize("mode", ["positive", "negative", "both", "answer"])
def test_no_rollout_to_speak_of_is_zero_with_zero_gradient(mode: str) -> None:
    z_2, targets = random_targets(5)
    nobody = torch.zeros(7, dtype=torch.bool)
    targets = targets._replace(correct_B=nobody, has_common_B=nobody, has_excluded_B=nobody)
    if mode == "answer":
        targets = targets._replace(candidate_B=nobody)
    loss = contrastive_loss(z_2, targets, settings(mode=mode))
    assert float(loss.detach()) == 0
    assert not torch.autograd.grad(loss, z_2)[0].any()


def test_one_wrong_rollout_without_negatives_is_drawn_until_the_clamp() -> None:
    """Its denominator holds its own similarity alone: -log exp(min(c, 0.9) / tau) / exp(c / tau)."""
    z_2, targets = random_targets(1)
    alone = torch.arange(7) == 2
    targets = targets._replace(has_common_B=alone, has_excluded_B=torch.zeros(7, dtype=torch.bool))
    assert targets.common is not None
    cosine = float(torch.cosine_similarity(targets.common[2], z_2[2, 1].detach(), dim=0))
    loss = contrastive_loss(z_2, targets, settings(mode="negative"))
    assert float(loss.detach()) == pytest.approx(max(0.0, cosine - 0.9) / 0.2)
