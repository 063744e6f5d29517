"""Rollouts that the loss leaves out: cut ones (`rl.mask_truncated`), and those far from the sampler
(`rollout.sequence_mask`). Against the loss written out in float64, a rollout at a time."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from carft_fast.config.schema import Config
from carft_fast.core.example import Example
from carft_fast.data.prompts import EncodedExample
from carft_fast.rollout.base import Rollout
from carft_fast.training.rl import as_samples

from .stepcase import METHODS, Case, Parts, gradients, quick_config, random_case, take_apart
from .test_step import assert_same

LEFT_OUT = frozenset({0, 4, 5, 11})
ONE_UPDATE = ["rl.ppo_epochs=1", "rollout.max_new_tokens=40"]


def with_left_out(case: Case, rows: frozenset[int] = LEFT_OUT) -> Case:
    return case._replace(samples=replace(case.samples, left_out=rows))


def by_formula(parts: Parts, config: Config, kept: Sequence[int], factor_N: Tensor) -> dict[str, Tensor]:
    """Gradients of policy and value loss in float64, ratio 1 before the first update; `factor_N` weighs the policy
    term of a rollout."""
    exact = copy.deepcopy(parts.policy.lm).double()
    for module in exact.modules():
        if isinstance(module, torch.nn.Linear):
            module.__class__ = torch.nn.Linear
    exact.config._attn_implementation = "eager"
    heads = copy.deepcopy(parts.policy.heads).double()
    rollouts = parts.samples.rollouts
    lengths = rollouts.lengths
    advantages = parts.advantages.advantage_C.double().split(lengths)
    returns = None if parts.advantages.return_C is None else parts.advantages.return_C.double().split(lengths)
    divisor = {
        "sequence": lambda i: len(kept) * lengths[i],
        "token": lambda i: sum(lengths[k] for k in kept),
        "constant": lambda i: len(kept) * 40,
    }[config.rl.loss_mean]
    for i in kept:
        prompt, completion = rollouts.prompts[i], rollouts.completions[i]
        output = exact(torch.tensor([prompt + completion]), output_hidden_states=True)
        before = slice(len(prompt) - 1, -1)
        logprob = output.logits[0, before].log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        loss = -(factor_N[i] * advantages[i] * (logprob - logprob.detach()).exp()).sum() / divisor(i)
        if returns is not None:
            hidden = output.hidden_states[-1][0, before]
            value = heads.summary(heads.proj(hidden).relu()).squeeze(-1)
            loss = loss + config.rl.value_coef * 0.5 * (value - returns[i]).square().sum() / divisor(i)
        loss.backward()
    named = [(f"lm.{n}", p) for n, p in exact.named_parameters()] + [
        (f"heads.{n}", p) for n, p in heads.named_parameters()
    ]
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        size = float(gradient.norm()) + 1e-6 * sum(float(g.norm()) for g in expected.values())
        assert float((found[name].double() - gradient).norm()) < 1e-4 * size, name


@pytest.mark.parametrize("impl", ["fast", "padded"])
@pytest.mark.parametrize("loss_mean", ["sequence", "token", "constant"])
@pytest.mark.parametrize("method", ["reft", "dr_grpo"])
def test_truncated_rollouts_are_in_no_loss_and_no_denominator(method: str, loss_mean: str, impl: str) -> None:
    case = with_left_out(random_case(3, "mixed", prompts=3, per_prompt=4))
    options = [*METHODS[method], *ONE_UPDATE, f"rl.loss_mean={loss_mean}", f"model.impl={impl}"]
    config = quick_config(*options, "rl.micro_batch_tokens=170", "rl.mask_truncated=true")
    parts = take_apart(config, case)
    kept = [i for i in range(12) if i not in LEFT_OUT]
    expected = by_formula(parts, config, kept, torch.ones(12, dtype=torch.float64))
    assert_gradients(gradients(config, case)[0], expected)
    unmasked = gradients(config, with_left_out(case, frozenset()))[0]
    assert any(not torch.allclose(unmasked[n].double(), g, rtol=1e-2) for n, g in expected.items()), "it can fail"


@pytest.mark.parametrize("method", ["carft", "carft_both"])
def test_truncated_rollouts_are_no_part_of_the_contrast(method: str) -> None:
    """Fast and padded path agree, and what such a rollout says changes nothing."""
    options = [*METHODS[method], *ONE_UPDATE, "rl.micro_batch_tokens=170", "contrastive.coef=0.3"]
    options += ["rl.value_coef=0.0", "rl.whiten_advantages=false", "rl.kl_coef=0.0", "rl.mask_truncated=true"]
    case = with_left_out(random_case(4, "mixed"))
    found = [gradients(quick_config(*options, f"model.impl={impl}"), case) for impl in ("fast", "padded")]
    other = list(case.samples.rollouts.completions)
    for i in LEFT_OUT:
        other[i] = [3 + (token + 1) % 90 for token in other[i]]
    changed = replace(case.samples, rollouts=case.samples.rollouts._replace(completions=other))
    again = gradients(quick_config(*options), case._replace(samples=changed))
    assert_same(*found)
    for name, gradient in found[0][0].items():
        torch.testing.assert_close(again[0][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["reft", "dr_grpo", "carft"])
def test_a_mini_batch_of_truncated_rollouts_alone_is_finite(method: str) -> None:
    case = with_left_out(random_case(3, "mixed", prompts=3, per_prompt=4), frozenset(range(12)))
    config = quick_config(*METHODS[method], *ONE_UPDATE, "rl.mask_truncated=true")
    found, metrics = gradients(config, case)
    assert not any(g.any() for g in found.values())
    assert metrics["loss"] == metrics["skipped_updates"] == 0


def test_which_rollouts_are_truncated() -> None:
    rows = [EncodedExample(Example(str(i), "q", (), "1"), [5], ([6],)) for i in range(3)]
    reasons = ["stop", "length", "stop"]
    rollouts = [Rollout([7], [-1.0], reason, 1) for reason in reasons]  # type: ignore[arg-type]
    device = torch.device("cpu")
    assert as_samples(rows, rollouts, device).left_out == frozenset()
    assert as_samples(rows, rollouts, device, mask_truncated=True).left_out == {1}


@pytest.mark.parametrize("loss_mean", ["sequence", "token"])
@pytest.mark.parametrize("mask", ["plain", "weighted"])
def test_the_sequence_mask_is_its_formula(mask: str, loss_mean: str) -> None:
    """Product of a rollout's ratios in float64; masked rollouts keep their value loss and their place in the mean."""
    case = random_case(5, "mixed")
    bounds = ["rollout.sequence_mask_cap=1.4", "rollout.sequence_mask_floor=0.5"]
    options = [*METHODS["reft"], *ONE_UPDATE, f"rl.loss_mean={loss_mean}", f"rollout.sequence_mask={mask}", *bounds]
    config = quick_config(*options)
    parts = take_apart(config, case)
    assert parts.experience.support_logprob_C is not None
    lengths = case.samples.rollouts.lengths
    generator = torch.Generator().manual_seed(2)
    # sampler's log-probs so far from the trainer's that some products are within the bounds and some beyond
    target = torch.exp(0.8 * torch.randn(12, generator=generator, dtype=torch.float64))
    own = parts.experience.support_logprob_C.double().split(lengths)
    sampled = torch.cat([x - target[i].log() / len(x) for i, x in enumerate(own)]).float()
    case = case._replace(samples=replace(case.samples, sampled_logprob_C=sampled))
    keep = (target >= 0.5) & (target <= 1.4)
    assert 0 < int(keep.sum()) < 12
    factor = keep.double() * (target if mask == "weighted" else 1.0)
    found, metrics = gradients(config, case)
    assert_gradients(found, by_formula(take_apart(config, case), config, range(12), factor))
    assert metrics["sequence_masked"] == pytest.approx(1 - float(keep.double().mean()))
