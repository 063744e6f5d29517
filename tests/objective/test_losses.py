"""Loss terms against transformers, and against their formulas in float64, a token at a time."""

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from carft_fast.config.sections import RlConfig
from carft_fast.models.causal_lm import CarftModel, ModelOutput
from carft_fast.models.load import load_model
from carft_fast.models.packing import PackedBatch, pack
from carft_fast.objective.losses import (
    Normaliser,
    RolloutTargets,
    cot_embeddings,
    explained_variance,
    sft_loss,
    update_loss,
)

from ..models.checks import COMPLETIONS, PROMPTS, config

CPU = torch.device("cpu")
LENGTHS = [(3, 5), (1, 9), (6, 1), (2, 12), (4, 7), (5, 8)]
"""Prompt and completion tokens of a batch that is one part of a mini-batch with `WHOLE` in all."""
WHOLE = Normaliser(sequences=7, tokens=59, max_new_tokens=16)


@pytest.fixture
def model() -> CarftModel:
    return load_model(config(), "synthetic", CPU, heads=True)


@pytest.fixture
def batch() -> PackedBatch:
    return pack(PROMPTS, COMPLETIONS, CPU)


@dataclass
class Inputs:
    """What the losses are functions of, in float32 for ours and, the same numbers, in float64 for the formulas."""

    model: CarftModel
    batch: PackedBatch
    output: ModelOutput
    prompts: list[list[int]]
    completions: list[list[int]]
    leaves: dict[str, Tensor]
    exact: dict[str, Tensor]

    def tokens(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Of every completion token: its sequence, its id, and in float64 the state before it and its own."""
        start = 0
        for i, (prompt, completion) in enumerate(zip(self.prompts, self.completions, strict=True)):
            for t, token in enumerate(completion):
                at = start + len(prompt) + t
                yield i, token, self.exact["hidden"][at - 1], self.exact["hidden"][at]
            start += len(prompt) + len(completion)

    def logprobs(self, state: Tensor, temperature: float = 1.0) -> Tensor:
        """[V]"""
        return (self.exact["weight"] @ state / temperature).log_softmax(-1)

    def value(self, state: Tensor) -> Tensor:
        e = self.exact
        hidden = torch.relu(e["proj.weight"] @ state + e["proj.bias"])
        return (e["summary.weight"] @ hidden + e["summary.bias"])[0]

    def assert_same_gradients(self, ours: Tensor, expected: Tensor) -> None:
        """And the same value. A gradient may cancel to less than rounding, so its error goes by its layer's size."""
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-7)
        found = torch.autograd.grad(ours, list(self.leaves.values()), allow_unused=True)
        wanted = torch.autograd.grad(expected, list(self.exact.values()), allow_unused=True)
        of_layer: dict[str, float] = {}
        for name, gradient in zip(self.exact, wanted, strict=True):
            layer = name.partition(".")[0]
            of_layer[layer] = of_layer.get(layer, 0.0) + (0.0 if gradient is None else float(gradient.norm()) ** 2)
        for name, a, b in zip(self.leaves, found, wanted, strict=True):
            if b is None:
                assert a is None or not a.any(), name
                continue
            assert a is not None, name
            error, size = float((a.double() - b).norm()), of_layer[name.partition(".")[0]] ** 0.5
            assert size > 0, name
            assert error < 1e-5 * size, f"{name}: {error:.1e} of {size:.1e}"


@pytest.fixture(params=["hidden states", "logits"])
def inputs(request: pytest.FixtureRequest, model: CarftModel) -> Inputs:
    """The last hidden states of a packed batch, for a head that is a matrix and for one that gives logits."""
    generator = torch.Generator().manual_seed(3)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 90, (n,), generator=generator).tolist()

    prompts, completions = [ids(p) for p, _ in LENGTHS], [ids(c) for _, c in LENGTHS]
    batch = pack(prompts, completions, CPU)
    assert model.heads is not None
    with torch.no_grad():
        hidden = model.hidden_states(batch).hidden_TD.clone()
    leaves = {"hidden": hidden.requires_grad_(), "weight": model.head_weight_VD, **dict(model.heads.named_parameters())}
    logits = None
    if request.param == "logits":
        model.plain_head = False
        logits = hidden[batch.predict_index_C] @ model.head_weight_VD.T
    exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    return Inputs(model, batch, ModelOutput(hidden, logits), prompts, completions, leaves, exact)


def test_what_each_mean_divides_by() -> None:
    batch = pack([[1, 2], [3], [4]], [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]], CPU)
    normaliser = Normaliser(sequences=4, tokens=17, max_new_tokens=8)
    expected = {
        "sequence": [1 / (3 * 4)] * 3 + [1 / (2 * 4)] * 2 + [1 / (5 * 4)] * 5,
        "token": [1 / 17] * 10,
        "constant": [1 / (4 * 8)] * 10,
    }
    for how, weights in expected.items():
        torch.testing.assert_close(normaliser.weights(batch, how), torch.tensor(weights), rtol=1e-6, atol=0)


def targets_around(inputs: Inputs, rl: RlConfig, temperature: float) -> RolloutTargets:
    """Ratios and values on either side of every clip, with advantages and returns of either sign; none near a border,
    where rounding decides. Two tokens that the correction leaves out."""
    logprob = torch.stack([inputs.logprobs(s, temperature)[token] for _, token, s, _ in inputs.tokens()]).detach()
    value = torch.stack([inputs.value(s) for _, _, s, _ in inputs.tokens()]).detach()
    n = len(value)
    generator = torch.Generator().manual_seed(1)
    near = 1 + 0.05 * torch.rand(n, generator=generator, dtype=torch.float64)
    ratio = near * torch.tensor([0.5, 1.0, 1.2, 1.5], dtype=torch.float64).repeat(n)[:n]
    sign = torch.tensor([1.0] * 4 + [-1.0] * 4, dtype=torch.float64).repeat(n)[:n]
    moved = near * torch.tensor([0.1, -0.1, 0.5, -0.5, 0.8], dtype=torch.float64).repeat(n)[:n]
    side = torch.tensor([1.0, -1.0, 0.3], dtype=torch.float64).repeat(n)[:n]
    outside = (ratio < 1 - rl.clip_low).int() - (ratio > 1 + rl.clip_high).int()
    assert len(set(zip(outside.tolist(), sign.tolist(), strict=True))) == 6
    far = moved.abs() > rl.value_clip
    assert len(set(zip(far.tolist(), moved.sign().tolist(), side.tolist(), strict=True))) == 12
    correction = 0.5 + torch.rand(n, generator=generator)
    correction[[2, 11]] = 0.0
    return RolloutTargets(
        advantage_C=(sign * (0.2 + torch.rand(n, generator=generator))).float(),
        old_logprob_C=(logprob - ratio.log()).float(),
        correction_C=correction,
        ref_logprob_C=(logprob + torch.randn(n, generator=generator)).float(),
        old_value_C=(value - moved).float(),
        return_C=(value + side).float(),
    )


def by_formula(
    inputs: Inputs, targets: RolloutTargets, rl: RlConfig, temperature: float
) -> tuple[Tensor, dict[str, float]]:
    """Paper eq. 5 with GRPO's KL term, which correction does not weigh, and the metrics.

    Every sum is a loop, every denominator written out.
    """
    policy = value = torch.zeros((), dtype=torch.float64)
    counted, clipped, moved, differences, entropies = 0, 0, 0, [], []
    log_ratios: dict[int, list[Tensor]] = {}
    for k, (i, token, state, _) in enumerate(inputs.tokens()):
        own = inputs.logprobs(state, temperature)[token]
        old = own.detach() if targets.old_logprob_C is None else targets.old_logprob_C[k].double()
        log_ratios.setdefault(i, []).append(own - old)
    for k, (i, token, state, _) in enumerate(inputs.tokens()):
        logp = inputs.logprobs(state, temperature)
        of_sequence = log_ratios[i]
        log_ratio = of_sequence.pop(0) if rl.ratio == "token" else sum(of_sequence) / len(of_sequence)
        ratio = log_ratio.exp()
        advantage = targets.advantage_C[k].double()
        correction = 1.0 if targets.correction_C is None else float(targets.correction_C[k])
        clipped_ratio = ratio.clamp(1 - rl.clip_low, 1 + rl.clip_high)
        if rl.loss == "cispo":
            term = -correction * clipped_ratio.detach() * advantage * logp[token]
        else:
            surrogate = torch.min(ratio * advantage, clipped_ratio * advantage)
            if rl.dual_clip is not None and advantage < 0:
                surrogate = torch.max(surrogate, rl.dual_clip * advantage)
            term = -correction * surrogate
        if targets.ref_logprob_C is not None:
            difference = targets.ref_logprob_C[k].double() - logp[token]
            kl = difference**2 / 2 if rl.kl_estimate == "k2" else difference.exp() - difference - 1
            if rl.kl_clamp is not None and float(kl.detach()) > rl.kl_clamp:
                kl = kl.detach() * 0 + rl.kl_clamp
            term = term + rl.kl_loss_coef * kl
        divided_by = {
            "sequence": len(inputs.completions[i]) * WHOLE.sequences,
            "token": WHOLE.tokens,
            "constant": WHOLE.sequences * WHOLE.max_new_tokens,
        }[rl.loss_mean]
        policy = policy + term / divided_by
        counted += 1
        clipped += not 1 - rl.clip_low <= float(ratio.detach()) <= 1 + rl.clip_high
        differences.append(float((ratio - 1 - ratio.log()).detach()))
        entropies.append(float(-(logp.exp() * logp).sum().detach()))
        if targets.old_value_C is not None and targets.return_C is not None:
            v, before, target = inputs.value(state), targets.old_value_C[k].double(), targets.return_C[k].double()
            near = before + (v - before).clamp(-rl.value_clip, rl.value_clip)
            value = value + 0.5 * torch.max((v - target) ** 2, (near - target) ** 2) / divided_by
            moved += bool((v - before).abs() > rl.value_clip)
    metrics = {
        "policy_loss": float(policy.detach()),
        "policy_tokens": counted,
        "clip_fraction": clipped / counted,
        "approx_kl": statistics.fmean(differences),
        "entropy": statistics.fmean(entropies),
    }
    if targets.return_C is not None:
        metrics |= {"value_loss": float(value.detach()), "value_clip_fraction": moved / sum(c for _, c in LENGTHS)}
    return policy + rl.value_coef * value, metrics


@pytest.mark.parametrize("loss_mean", ["sequence", "token", "constant"])
def test_the_update_loss_is_its_formula(inputs: Inputs, loss_mean: str) -> None:
    """Loss, metrics and gradients, with every term there is and a different number for every coefficient."""
    rl = RlConfig(clip_low=0.2, clip_high=0.35, value_clip=0.3, value_coef=0.7, kl_loss_coef=0.4, loss_mean=loss_mean)
    targets = targets_around(inputs, rl, 0.7)
    weight = WHOLE.weights(inputs.batch, loss_mean)
    loss, logprob, metrics = update_loss(
        inputs.model, inputs.output, inputs.batch, targets, rl, weight_C=weight, temperature=0.7
    )
    expected, expected_metrics = by_formula(inputs, targets, rl, 0.7)
    inputs.assert_same_gradients(loss, expected)
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(expected_metrics, rel=1e-5, abs=1e-7)
    own = torch.stack([inputs.logprobs(s, 0.7)[token] for _, token, s, _ in inputs.tokens()])
    torch.testing.assert_close(logprob.double(), own.detach(), rtol=1e-5, atol=1e-6)
    assert not logprob.requires_grad


@pytest.mark.parametrize(
    "variant",
    [
        {"dual_clip": 1.4},
        {"loss": "cispo", "clip_low": 0.3},
        {"kl_estimate": "k2"},
        {"kl_estimate": "k2", "kl_clamp": 0.02},
        {"kl_clamp": 0.02},
        {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.02},
        {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.02, "dual_clip": 1.1, "kl_clamp": 0.05},
    ],
    ids=str,
)
def test_variants_of_the_policy_loss_are_their_formula(inputs: Inputs, variant: dict[str, Any]) -> None:
    """Loss, metrics and gradients, with a correction and a KL term; the padded path has the same formulas."""
    rl = RlConfig.model_validate({"clip_high": 0.35, "value_coef": 0.7, "kl_loss_coef": 0.4} | variant)
    targets = targets_around(inputs, rl, 0.7)
    weight = WHOLE.weights(inputs.batch, "sequence")
    loss, _, metrics = update_loss(
        inputs.model, inputs.output, inputs.batch, targets, rl, weight_C=weight, temperature=0.7
    )
    expected, expected_metrics = by_formula(inputs, targets, rl, 0.7)
    inputs.assert_same_gradients(loss, expected)
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(expected_metrics, rel=1e-5, abs=1e-7)
    plain = rl.model_copy(update={name: RlConfig.model_fields[name].default for name in variant})
    other, _ = by_formula(inputs, targets, plain, 0.7)
    assert float((other - expected).detach().abs()) > 1e-3, "the variant changes nothing: the test tests nothing"


def test_without_old_log_probs_the_ratio_is_one_and_has_a_gradient(inputs: Inputs) -> None:
    """What a group method trains on where there is one update: no KL, no value, no correction."""
    rl = RlConfig(kl_loss_coef=0.0, loss_mean="constant")
    advantage = torch.linspace(-1, 2, sum(c for _, c in LENGTHS))
    targets = RolloutTargets(advantage, None, None, None, None, None)
    loss, _, metrics = update_loss(
        inputs.model,
        inputs.output,
        inputs.batch,
        targets,
        rl,
        weight_C=WHOLE.weights(inputs.batch, "constant"),
        temperature=1.0,
    )
    expected, expected_metrics = by_formula(inputs, targets, rl, 1.0)
    inputs.assert_same_gradients(loss, expected)
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(expected_metrics, rel=1e-5, abs=1e-7)


def test_sft_loss_divides_by_the_tokens_of_the_whole_step(inputs: Inputs) -> None:
    expected = torch.zeros((), dtype=torch.float64)
    for _, token, state, _ in inputs.tokens():
        expected = expected - inputs.logprobs(state)[token] / 100
    inputs.assert_same_gradients(sft_loss(inputs.model, inputs.output, inputs.batch, total_tokens=100), expected)


@pytest.mark.parametrize("inputs", ["hidden states"], indirect=True)
@pytest.mark.parametrize("with_parts", [False, True])
def test_cot_embeddings_are_their_formula(inputs: Inputs, with_parts: bool) -> None:
    """Paper eq. 6 a token at a time, every state projected before the average; parts that overlap, cover all or one."""
    generator = torch.Generator().manual_seed(2)
    parts = None
    if with_parts:
        parts = [torch.rand(3, c, generator=generator) < 0.5 for _, c in LENGTHS]
        for part in parts:
            part[0] = True
            part[1:, -1] = True  # no part is empty
    tokens = list(inputs.tokens())
    rows = []
    for i in range(len(LENGTHS)):
        own = [state for row, _, _, state in tokens if row == i]
        for part in [[True] * len(own)] if parts is None else parts[i].tolist():
            states = list(itertools.compress(own, part))
            total = torch.stack([inputs.value(s).exp() for s in states]).sum()
            projected = [inputs.exact["proj.weight"] @ s + inputs.exact["proj.bias"] for s in states]
            shares = [inputs.value(s).exp() / total for s in states]
            rows.append(sum(share * e for share, e in zip(shares, projected, strict=True)))
    expected = torch.stack(rows).view(len(LENGTHS), -1, len(rows[0]))
    found = cot_embeddings(inputs.model, inputs.output.hidden_TD, inputs.batch, parts)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(found.shape, generator=generator)
    for leaves in (inputs.leaves, inputs.exact):
        del leaves["weight"]  # not read
    inputs.assert_same_gradients((found * upstream).sum(), (expected * upstream).sum())


def test_explained_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    returns = torch.randn(50, generator=generator)
    value = 0.5 * returns + 0.3 * torch.randn(50, generator=generator) + 7.0  # a constant error explains as much
    errors = [float(r) - float(v) for r, v in zip(returns, value, strict=True)]
    expected = 1 - statistics.pvariance(errors) / statistics.pvariance(returns.tolist())
    assert 0.2 < expected < 0.9
    assert float(explained_variance(value, returns)) == pytest.approx(expected, rel=1e-5)
    assert float(explained_variance(returns, returns)) == 1
    assert float(explained_variance(-returns, returns)) == pytest.approx(-3)
    assert float(explained_variance(value, torch.full((50,), 0.25))) == 0, "nothing to explain"


def test_sft_loss_is_that_of_transformers(model: CarftModel, batch: PackedBatch) -> None:
    longest = max(batch.segments.q_lengths)
    ids = torch.zeros(len(PROMPTS), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        ids[row, : len(prompt + completion)] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : len(prompt + completion)] = torch.tensor(completion)
    with model.padded() as lm:
        theirs = lm(input_ids=ids, labels=labels).loss
    ours = sft_loss(model, model.hidden_states(batch), batch, total_tokens=len(batch.read_index_C))
    torch.testing.assert_close(ours, theirs)
    weight = model.head_weight_VD
    (our_gradient,), (their_gradient,) = torch.autograd.grad(ours, weight), torch.autograd.grad(theirs, weight)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-6)


def test_cot_embedding_reads_the_completion_tokens_themselves(model: CarftModel, batch: PackedBatch) -> None:
    """Paper eq. 6 by hand, one sequence: states AT the tokens, projected first and pooled after."""
    with torch.no_grad():
        hidden = model.hidden_states(batch).hidden_TD
        ours = cot_embeddings(model, hidden, batch)[:, 0]
        with model.padded() as lm:
            last = lm.base_model(torch.tensor([PROMPTS[1] + COMPLETIONS[1]])).last_hidden_state[0]
        states = last[len(PROMPTS[1]) :]
        by_hand = (model.value(states).softmax(0)[:, None] * model.embed(states)).sum(0)
    torch.testing.assert_close(ours[1], by_hand, rtol=1e-4, atol=1e-5)
