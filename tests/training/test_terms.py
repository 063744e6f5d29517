"""`rl.gradient_terms`: against differences of whole gradients, which know nothing of terms taken apart."""

import pytest
import torch
from torch import Tensor

from carft_fast.reports.metrics import METRICS
from carft_fast.training.terms import GradientTerms

from .stepcase import METHODS, Case, gradients, quick_config, random_case, take_apart, update

COEFFICIENTS = ["rl.kl_loss_coef=0.3", "contrastive.coef=0.3", "rl.ppo_epochs=1"]
VARIANTS = {
    "both signals": METHODS["carft_both"],
    "many micro-batches": [*METHODS["carft_both"], "rl.micro_batch_tokens=160"],
    "padded": [*METHODS["carft_both"], "model.impl=padded"],
    "ratios of sequences": ["rl.ratio=sequence", "rl.kl_estimate=k2"],
    "cispo, corrected": ["rl.loss=cispo", 'rollout.correction="truncated"'],
}
WITHOUT = {
    "value": ["rl.value_coef=0.0"],
    "kl": ["rl.kl_loss_coef=0.0", "rl.kl_estimate=k3"],
    "contrastive": ["contrastive.coef=0.0"],
}


def whole_gradient(options: list[str], case: Case) -> Tensor:
    """float64, of the language model's parameters end to end."""
    found, _ = gradients(quick_config(*COEFFICIENTS, *options), case)
    return torch.cat([x.double().flatten() for name, x in found.items() if name.startswith("lm.")])


def by_differences(options: list[str], case: Case) -> dict[str, Tensor]:
    """Each term's gradient: what the whole lacks without it; the policy's is what is left."""
    whole = whole_gradient(options, case)
    terms = {term: whole - whole_gradient([*options, *off], case) for term, off in WITHOUT.items()}
    return {"policy": whole - torch.stack(list(terms.values())).sum(0)} | terms


@pytest.mark.parametrize("name", VARIANTS)
def test_the_terms_are_what_the_gradient_lacks_without_them_and_add_up(name: str) -> None:
    options, case = VARIANTS[name], random_case(1, "mixed")
    config = quick_config(*COEFFICIENTS, *options, "rl.gradient_terms=true")
    parts = take_apart(config, case)
    correct = [grade.correct for grade in case.grades]
    terms = GradientTerms(config, parts.learner, parts.experience, parts.advantages, correct, parts.live)
    found = {
        term: torch.cat([g.double().flatten() for g in gradient if g is not None])
        for term, gradient in terms.gradients(parts.plan[0][0])
    }
    expected = by_differences(options, case)
    whole = torch.stack(list(expected.values())).sum(0)
    assert list(found) == ["policy", "value", "kl", "contrastive"]
    for term, gradient in expected.items():
        assert gradient.norm() > 1e-3 * whole.norm(), f"{term} has no part in this test"
        assert (found[term] - gradient).norm() < 1e-5 * whole.norm(), term
    assert (torch.stack(list(found.values())).sum(0) - whole).norm() < 1e-6 * whole.norm()


def test_a_steps_record_has_norms_and_cosines() -> None:
    options, case = VARIANTS["many micro-batches"], random_case(2, "mixed")
    parts = take_apart(quick_config(*COEFFICIENTS, *options, "rl.gradient_terms=true"), case)
    metrics = update(parts, case, torch.optim.SGD(parts.policy.parameters(), lr=0.1))
    assert METRICS.keys() >= metrics.keys()
    expected = by_differences(options, case)
    for term, gradient in expected.items():
        assert metrics.pop(f"grad_norm_{term}") == pytest.approx(float(gradient.norm()), rel=1e-4), term
        if term != "policy":
            cosine = torch.cosine_similarity(gradient, expected["policy"], dim=0)
            assert metrics.pop(f"grad_cosine_{term}") == pytest.approx(float(cosine), abs=1e-4), term
    assert not [name for name in metrics if name.startswith("grad_") and name != "grad_norm"]


def test_a_term_without_gradient_has_no_cosine() -> None:
    """Of the update's two mini-batches none has a correct rollout, and no group has an advantage."""
    options = ["rl.gradient_terms=true", "rl.mini_batch_size=6", "rl.kl_coef=0.0"]
    case = random_case(3, "all wrong")
    parts = take_apart(quick_config(*options), case)
    metrics = update(parts, case, torch.optim.SGD(parts.policy.parameters(), lr=0.1))
    assert metrics["grad_norm_contrastive"] == 0
    assert "grad_cosine_contrastive" not in metrics
    assert "grad_norm_kl" not in metrics, "rl.kl_loss_coef is 0"
    assert -1 < metrics["grad_cosine_value"] < 1


@pytest.mark.parametrize("method", ["carft_both", "dr_grpo"])
def test_the_update_is_the_same_to_the_bit(method: str) -> None:
    options = [*METHODS[method], "rl.mini_batch_size=6", "rl.micro_batch_tokens=400", "contrastive.coef=0.3"]
    case = random_case(4, "mixed", prompts=3, per_prompt=4)

    def trained(*more: str) -> tuple[dict[str, Tensor], dict[str, float]]:
        parts = take_apart(quick_config(*options, *more), case)
        optimizer = torch.optim.AdamW(parts.policy.parameters(), lr=1e-3, fused=True)
        metrics = update(parts, case, optimizer, lr=1e-3)
        return {name: p.detach() for name, p in parts.policy.named_parameters()}, metrics

    (weights, metrics), (expected, without) = trained("rl.gradient_terms=true"), trained()
    assert [name for name, weight in expected.items() if not weight.equal(weights[name])] == []
    assert metrics.items() > without.items()
