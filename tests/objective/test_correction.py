"""What trainer and sampler disagree on: measured on the sampler's support, and weighted away on request."""

import pytest
import torch

from carft_fast.config.toml import load_config
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.load import load_model
from carft_fast.models.packing import pack
from carft_fast.objective.losses import (
    Normaliser,
    RolloutTargets,
    completion_logprobs,
    correction_weights,
    sampler_support_logprobs,
    update_loss,
)
from carft_fast.rollout.base import SamplingParams
from carft_fast.rollout.hf import HFEngine
from carft_fast.training.agreement import Mismatch, sampled_logprobs

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 17], [21, 6, 40, 8, 13], [33], [7, 7, 50, 12]]


@pytest.fixture
def model() -> CarftModel:
    model = load_model(load_config(None, ["model.path=synthetic"]), "synthetic", CPU, heads=True)
    with torch.no_grad():  # far from uniform
        for parameter in model.lm.parameters():
            parameter.mul_(1.5)
    return model


@pytest.mark.parametrize("plain_head", [True, False])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.0, 0.8, 0), (1.3, 1.0, 7), (0.6, 0.7, 9), (1.0, 0.05, 0), (1.0, 1.0, 1000)],
)
def test_equal_weights_give_ratio_one_whatever_the_sampler_cut_off(
    model: CarftModel, temperature: float, top_p: float, top_k: int, plain_head: bool
) -> None:
    sampling = SamplingParams(20, temperature=temperature, top_p=top_p, top_k=top_k, samples_per_prompt=4, seed=1)
    rollouts = HFEngine(model, build_tokenizer(), batch_size=64).generate(PROMPTS, sampling)
    model.plain_head = plain_head
    jobs = [prompt for prompt in PROMPTS for _ in range(4)]
    batch = pack(jobs, [r.completion_ids for r in rollouts], CPU)
    with torch.no_grad():
        output = model.hidden_states(batch)
        logprob = completion_logprobs(model, output, batch, temperature=temperature)
        support = sampler_support_logprobs(
            model, output, batch, logprob, temperature=temperature, top_p=top_p, top_k=top_k
        )
    sampled = sampled_logprobs(rollouts, CPU)
    found = Mismatch.of(support, sampled)
    assert found.max < 2e-5
    assert found.material == 0
    assert found.tokens == len(sampled)
    for mode in ("truncated", "masked"):
        config = load_config(None, [f"rollout.correction={mode}"]).rollout
        weights = correction_weights(support, sampled, batch.completion_cu, config)
        assert weights is not None
        torch.testing.assert_close(weights, torch.ones_like(weights), rtol=1e-4, atol=1e-4)
    if top_p < 1 or 0 < top_k < 50:  # over the full vocabulary the kept mass would look like a disagreement
        biased = (logprob - sampled).exp()
        assert float(biased.mean()) < 0.97
        assert bool((biased <= 1 + 1e-4).all())


def test_a_sampled_token_outside_the_trainers_cut_is_still_finite(model: CarftModel) -> None:
    batch = pack([PROMPTS[0]], [[3, 4, 5]], CPU)
    with torch.no_grad():
        output = model.hidden_states(batch)
        logprob = completion_logprobs(model, output, batch)
        support = sampler_support_logprobs(model, output, batch, logprob, temperature=1.0, top_p=1.0, top_k=1)
        best = output.hidden_TD[batch.predict_index_C] @ model.head_weight_VD.T
    top = best.log_softmax(-1).max(-1).values
    both = torch.where(batch.target_C == best.argmax(-1), top, torch.logaddexp(top, logprob))
    torch.testing.assert_close(support, logprob - both)


def test_weights_by_hand() -> None:
    ratio = torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0])
    sampled = torch.full((5,), -3.0)
    logprob = sampled + ratio.log()

    def weights(*overrides: str) -> torch.Tensor | None:
        cu = torch.tensor([0, 2, 4, 5])
        return correction_weights(logprob, sampled, cu, load_config(None, [f"rollout.{o}" for o in overrides]).rollout)

    def expect(found: torch.Tensor | None, values: list[float]) -> None:
        assert found is not None
        torch.testing.assert_close(found, torch.tensor(values))

    assert weights() is None
    expect(weights("correction=truncated"), [0.1, 0.5, 1.0, 2.0, 2.0])
    expect(weights("correction=truncated", "correction_cap=3.0"), [0.1, 0.5, 1.0, 2.0, 3.0])
    expect(weights("correction=masked", "correction_cap=3.0"), [0.1, 0.5, 1.0, 2.0, 0.0])
    expect(weights("correction=masked", "correction_cap=5.0", "correction_floor=0.3"), [0.0, 0.5, 1.0, 2.0, 4.0])
    # the completions' products are 0.05, 2 and 4
    expect(weights("sequence_mask=plain"), [1.0, 1.0, 1.0, 1.0, 0.0])
    expect(weights("sequence_mask=plain", "sequence_mask_floor=0.1"), [0.0, 0.0, 1.0, 1.0, 0.0])
    expect(weights("sequence_mask=weighted", "sequence_mask_cap=5.0"), [0.05, 0.05, 2.0, 2.0, 4.0])
    expect(weights("sequence_mask=plain", "correction=truncated"), [0.1, 0.5, 1.0, 2.0, 0.0])


@pytest.mark.parametrize("plain_head", [True, False])
def test_the_policy_gradient_is_weighted_and_the_value_loss_is_not(model: CarftModel, plain_head: bool) -> None:
    """Against the surrogate written out, at ratio 1: sum of weight * correction * -A * grad log-prob."""
    model.plain_head = plain_head
    config = load_config(None, ["rl.value_coef=0.5"]).rl
    batch = pack(PROMPTS[:2], [[8, 9, 10], [11, 12]], CPU)
    advantage = torch.tensor([0.5, -1.0, 2.0, 1.0, -0.3])
    correction = torch.tensor([0.0, 1.7, 1.0, 0.4, 0.0])
    returns = torch.linspace(-1, 1, 5)

    def gradients(correction: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        output = model.hidden_states(batch)
        value = model.value(output.hidden_TD)[batch.predict_index_C].detach()
        old = completion_logprobs(model, output, batch).detach()
        targets = RolloutTargets(advantage, old, correction, None, value, returns)
        weight = Normaliser(2, 5, 99).weights(batch, "sequence")
        loss, _, _ = update_loss(model, output, batch, targets, config, weight_C=weight, temperature=1.0)
        loss.backward()
        return [p.grad.clone() for p in model.lm.parameters() if p.grad is not None]

    output = model.hidden_states(batch)
    value = model.value(output.hidden_TD)[batch.predict_index_C]
    logprob = completion_logprobs(model, output, batch)
    weight = torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 4])
    model.zero_grad()
    expected_loss = (weight * (-correction * advantage * logprob + 0.25 * (value - returns) ** 2)).sum()
    expected_loss.backward()
    expected = [p.grad.clone() for p in model.lm.parameters() if p.grad is not None]
    for found, wanted in zip(gradients(correction), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    different = [not torch.allclose(a, b) for a, b in zip(gradients(torch.ones(5)), expected, strict=True)]
    assert any(different)
