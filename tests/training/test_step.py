"""A step taken apart: the fast path against the plain one, and what each setting may change and what not."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from carft_fast.config.sections import RlConfig
from carft_fast.models.flops import ModelCost, StepShape, fast_step
from carft_fast.objective.advantage import group_advantages, ppo_advantages
from carft_fast.objective.losses import ContrastTargets, contrastive_loss
from carft_fast.objective.passes import Rows, Want
from carft_fast.rewards.answers import Grade
from carft_fast.training.batch import MiniBatch, Needs, Samples
from carft_fast.training.rl import estimate_advantages, score_rollouts
from carft_kernels import _policy_kernels, _row_kernels, set_index_checks

from .stepcase import METHODS, SEED, Case, gradients, quick_config, random_case, take_apart, update

GRPO_LOSS = ["rl.estimator=grpo", "rl.loss_mean=sequence", "rl.kl_loss_coef=0.1"]


def assert_same(
    found: tuple[dict[str, Tensor], dict[str, float]],
    expected: tuple[dict[str, Tensor], dict[str, float]],
    tolerance: float = 1e-5,
) -> None:
    """Gradients within `tolerance` of their norm, metrics of their size; the same metrics.

    Two sums may cancel to less than the rounding of their terms: the gradient of a bias, which goes with its layer's
    weight, and the loss, which goes with its largest term. `first_ratio_error` is the distance of a ratio from 1.
    """
    of_layer: dict[str, float] = {}
    for name, gradient in expected[0].items():
        layer = name.rpartition(".")[0]
        of_layer[layer] = of_layer.get(layer, 0.0) + float(gradient.norm()) ** 2
    for name, gradient in expected[0].items():
        error, size = float((found[0][name] - gradient).norm()), of_layer[name.rpartition(".")[0]] ** 0.5
        assert error <= tolerance * size, f"{name}: {error:.1e} of {size:.1e}"
    largest = max(abs(expected[1].get(name, 0.0)) for name in ("loss", "policy_loss", "value_loss"))
    for name, value in expected[1].items():
        size = 1.0 if name == "first_ratio_error" else largest
        assert found[1].pop(name) == pytest.approx(value, rel=tolerance, abs=tolerance * size), name
    assert not found[1]


def case_of(method: str, seed: int, verdicts: str = "mixed") -> Case:
    per_prompt = 4 if "grpo" in method else 1
    return random_case(seed, verdicts, prompts=12 // per_prompt, per_prompt=per_prompt)


# --- the fast path equals the plain one -------------------------------------------------------------------------------


@pytest.mark.parametrize("verdicts", ["mixed", "all correct", "all wrong", "nothing extracted"])
@pytest.mark.parametrize("method", METHODS)
def test_fast_equals_plain(method: str, verdicts: str) -> None:
    """One update: loss, every metric, every parameter's gradient; random odd lengths, single-token completions."""
    options = [*METHODS[method], "rl.ppo_epochs=1"] + ["contrastive.coef=0.3"] * method.startswith("carft")
    for seed, budget in ((1, 170), (2, 1000)):
        case = case_of(method, seed, verdicts)
        both = [
            gradients(quick_config(*options, f"rl.micro_batch_tokens={budget}", f"model.impl={impl}"), case)
            for impl in ("fast", "padded")
        ]
        assert_same(*both)
        trained = [name for name, gradient in both[0][0].items() if gradient.any()]
        if method != "dr_grpo":
            assert len(trained) > 20
        elif verdicts != "mixed":
            assert not trained, "groups of one score have no gradient"


@pytest.mark.parametrize(
    "options",
    [
        ["rl.loss_mean=token"],
        ["rl.loss_mean=constant", "rollout.temperature=0.7"],
        ['rollout.correction="truncated"'],
        ['rollout.correction="masked"', "rollout.correction_cap=1.5", "rollout.correction_floor=0.6"],
        ["rl.old_logprobs=sampled"],
        ["rl.ratio=sequence", "rl.clip_low=0.01", "rl.clip_high=0.02"],
        ["rl.ratio=sequence", 'rollout.correction="truncated"', "rl.dual_clip=1.01", "rl.old_logprobs=recompute"],
        ["rl.loss=cispo", 'rollout.correction="truncated"', "rl.clip_low=1.0"],
        ["rl.dual_clip=1.05", "rl.kl_loss_coef=0.2", "rl.kl_estimate=k2", "rl.kl_clamp=0.01"],
        ["model.value_head=separate"],
        ["contrastive.mode=both", "contrastive.gradient=published"],
        ["rl.kl_coef=0.0"],
    ],
    ids=" ".join,
)
def test_fast_equals_plain_in_every_variant_of_the_loss(options: list[str]) -> None:
    """Two PPO epochs of two mini-batches: ratios leave 1, and the mini-batches after the first see new weights."""
    options = ["contrastive.coef=0.3", "rl.mini_batch_size=6", "rl.micro_batch_tokens=170", *options]
    case = random_case(5, "mixed")
    assert_same(
        gradients(quick_config(*options), case),
        gradients(quick_config(*options, "model.impl=padded"), case),
        tolerance=1e-4,  # three updates carry the first one's rounding on
    )


def test_a_head_with_logits_gives_what_the_fused_one_gives() -> None:
    """The path of heads that are more than a matmul, on one that is not; with a KL term and tokens masked away."""
    options = ['rollout.correction="masked"', "rollout.correction_cap=1.5", "rl.kl_loss_coef=0.2", "rl.ppo_epochs=1"]
    case = random_case(6, "mixed")

    def found(plain_head: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
        parts = take_apart(quick_config(*options, "rl.micro_batch_tokens=170"), case)
        parts.policy.plain_head = plain_head
        metrics = update(parts, case, torch.optim.SGD(parts.policy.parameters(), lr=0.1), lr=0.1)
        return {name: p.detach() for name, p in parts.policy.named_parameters()}, metrics

    expected = found(True)
    assert_same(found(False), expected)
    assert expected[1]["sampler_diff_max"] > 0.5, "nothing was masked"


@pytest.mark.parametrize("method", [METHODS["dr_grpo"], METHODS["dr_grpo"] + GRPO_LOSS], ids=["dr_grpo", "grpo"])
def test_fast_equals_plain_for_groups(method: list[str]) -> None:
    """Several updates; in one group all samples score the same, and the fast path leaves it out."""
    options = [*method, "rl.mini_batch_size=6", "rl.micro_batch_tokens=170"]
    case = case_of("dr_grpo", 7)
    case = Case(case.samples, [Grade(i < 4 or i % 2 == 0, 5.0) for i in range(12)])
    parts = take_apart(quick_config(*options), case)
    kept = {i for epoch in parts.plan for mini in epoch for micro in mini.micro for i in micro}
    assert kept == (set(range(12)) if GRPO_LOSS[2] in method else set(range(4, 12)))
    both = [gradients(quick_config(*options, f"model.impl={impl}"), case) for impl in ("fast", "padded")]
    assert_same(*both, tolerance=1e-4)


def test_a_mini_batch_without_gradient_still_moves_the_optimizer() -> None:
    """AdamW goes on by its moments when a gradient is 0; leaving rollouts out must not change that."""
    options = [*METHODS["dr_grpo"], "rl.mini_batch_size=4", "rl.ppo_epochs=2"]
    case = case_of("dr_grpo", 8)
    case = Case(case.samples, [Grade(i in (0, 5), 5.0) for i in range(8)] + [Grade(True, 5.0)] * 4)
    weights = []
    for impl in ("fast", "padded"):
        parts = take_apart(quick_config(*options, f"model.impl={impl}"), case)
        # by hand: one mini-batch of the dead group alone, after updates with a gradient
        parts.experience.plan[1][1] = MiniBatch([8, 9, 10, 11], [[8, 9, 10, 11]])
        assert parts.step.plan_update(parts.experience, parts.advantages)[0][1][1].micro == (
            [] if impl == "fast" else [[8, 9, 10, 11]]
        )
        update(parts, case, torch.optim.AdamW(parts.policy.parameters(), lr=1e-3), lr=1e-3)
        weights.append({name: p.detach() for name, p in parts.policy.named_parameters()})
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], weight, rtol=0, atol=2e-5, msg=name)


def test_twenty_updates_stay_on_the_plain_path() -> None:
    """AdamW over twenty steps of fresh rollouts: both paths' losses and weights go together."""
    options = ["contrastive.coef=0.1", "rl.micro_batch_tokens=300", "rl.ppo_epochs=2", "rl.mini_batch_size=6"]
    curves: dict[str, list[dict[str, float]]] = {}
    for impl in ("fast", "padded"):
        config = quick_config(*options, f"model.impl={impl}")
        parts = take_apart(config, random_case(100, "mixed"))
        optimizer = torch.optim.AdamW(parts.policy.parameters(), lr=3e-4)
        curves[impl] = []
        for number in range(20):
            case = random_case(100 + number, "mixed")
            experience = parts.step.make_experience(case.samples, number)
            score_N = score_rollouts(case.grades, experience.cosine_N, config)
            advantages = estimate_advantages(score_N, experience, config)
            now = parts._replace(experience=experience, advantages=advantages)
            curves[impl].append(update(now, case, optimizer, lr=3e-4))
    losses = [point["loss"] for point in curves["fast"]]
    assert max(losses) > 2 * min(losses), "a flat curve compares nothing"
    for ours, plain in zip(curves["fast"], curves["padded"], strict=True):
        for name in ("loss", "policy_loss", "value_loss", "contrastive_loss", "entropy", "grad_norm"):
            assert ours[name] == pytest.approx(plain[name], rel=2e-3, abs=2e-5), name


# --- settings that change speed or memory, and nothing else -----------------------------------------------------------


@pytest.mark.parametrize("budget", [160, 230, 5000])
def test_micro_batches_change_nothing(budget: int) -> None:
    """One forward or many: the contrastive candidates and every normaliser stay the mini-batch's."""
    options = ["contrastive.coef=0.5", "rl.ppo_epochs=1"]
    case = random_case(3, "mixed")
    one, cut = (quick_config(*options, f"rl.micro_batch_tokens={tokens}") for tokens in (10_000, budget))
    assert len(take_apart(one, case).plan[0][0].micro) == 1
    assert len(take_apart(cut, case).plan[0][0].micro) == {160: 3, 230: 2, 5000: 1}[budget]
    assert_same(gradients(cut, case), gradients(one, case))


def test_gradient_checkpointing_changes_nothing() -> None:
    case = random_case(3, "mixed")
    assert_same(gradients(quick_config("model.gradient_checkpointing=true"), case), gradients(quick_config(), case))


def test_compiled_layers_change_nothing() -> None:
    """torch.compile of every layer; batches of other lengths compile nothing again."""
    case, other = random_case(3, "mixed"), random_case(4, "mixed")
    torch._dynamo.reset()
    compiled = take_apart(quick_config("model.compile=true", "rl.ppo_epochs=1"), case)
    assert_same(
        gradients(quick_config("model.compile=true", "rl.ppo_epochs=1"), case),
        gradients(quick_config("rl.ppo_epochs=1"), case),
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled.step.make_experience(other.samples, 0)


@pytest.mark.parametrize("method", ["carft_both", "reft", "dr_grpo"])
def test_all_settings_together_equal_plain(method: str) -> None:
    """Compiled layers, recomputation, shared prompts and several micro-batches, against the plain path."""
    options = [*METHODS[method], "rollout.samples_per_prompt=4", "rl.ppo_epochs=1"]
    together = ["model.compile=true", "model.gradient_checkpointing=true", "rl.share_prompts=true"]
    together += ["rl.micro_batch_tokens=160"]
    case = case_of("dr_grpo", 23)
    torch._dynamo.reset()
    assert len(take_apart(quick_config(*options, *together), case).plan[0][0].micro) > 1
    assert_same(
        gradients(quick_config(*options, *together), case),
        gradients(quick_config(*options, "model.impl=padded"), case),
    )


@pytest.mark.parametrize("method", ["dr_grpo", "carft"])
def test_shared_prompts_change_nothing(method: str) -> None:
    """Four samples of one prompt: its tokens are forwarded once, loss and gradients stay."""
    options = [*METHODS[method], "rollout.samples_per_prompt=4", "rl.micro_batch_tokens=400", "rl.ppo_epochs=1"]
    case = case_of("dr_grpo", 9)
    assert_same(
        gradients(quick_config(*options, "rl.share_prompts=true"), case),
        gradients(quick_config(*options, "rl.share_prompts=false"), case),
    )


def test_a_group_larger_than_a_micro_batch_is_cut() -> None:
    options = [*METHODS["dr_grpo"], "rl.share_prompts=true", "rl.micro_batch_tokens=160"]
    parts = take_apart(quick_config(*options), case := case_of("dr_grpo", 10))
    rollouts = case.samples.rollouts
    for mini in parts.plan[0]:
        for micro in mini.micro:
            prompts = {tuple(rollouts.prompts[i]) for i in micro}
            assert sum(map(len, prompts)) + sum(len(rollouts.completions[i]) for i in micro) <= 160
        assert sorted(i for micro in mini.micro for i in micro) == sorted(i for i in mini.rows if parts.live[i])


def test_samples_of_one_question_share_their_annotated_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(11, "mixed", prompts=3, per_prompt=4)
    config = quick_config("rollout.samples_per_prompt=4")
    parts = take_apart(config, case)
    seen: list[int] = []
    outputs = parts.step._passes.outputs
    monkeypatch.setattr(
        parts.step._passes,
        "outputs",
        lambda model, rows, *args, **options: (seen.append(len(rows.prompts)), outputs(model, rows, *args, **options))[
            1
        ],
    )
    z_1 = parts.step.make_experience(case.samples, SEED).z_1
    assert sorted(seen) == [3, 12, 12], "and the rollouts by policy and reference"
    monkeypatch.undo()
    torch.testing.assert_close(z_1, parts.experience.z_1)
    annotated = case.samples.annotated
    for row in range(12):
        expected = parts.step._passes.outputs(parts.policy, annotated.pick([row]), Want(embedding=True))[0].z
        torch.testing.assert_close(z_1[row], expected[0, 0], rtol=1e-5, atol=1e-6)


def test_annotated_cots_longer_than_their_rollouts_are_cut_to_the_budget() -> None:
    prompts = [[5 + i] * 5 for i in range(12)]
    cots = [[20 + i] * 60 for i in range(12)]
    case = random_case(16, "mixed")
    samples = Samples(Rows(prompts, [[9]] * 12), Rows(prompts, cots), case.samples.sampled_logprob_C[:12])
    parts = take_apart(quick_config("rl.micro_batch_tokens=160"), case._replace(samples=samples))
    forwards: list[int] = []
    parts.policy.lm.model.layers[0].register_forward_hook(lambda _m, inputs, _o: forwards.append(inputs[0].shape[1]))
    z_1 = parts.step.make_experience(samples, SEED).z_1
    assert forwards[0] == 12 * 6, "all rollouts"
    assert max(forwards) <= 160
    assert sum(forwards[1:]) == 12 * 61
    expected = parts.step._passes.outputs(parts.policy, samples.annotated.pick([7]), Want(embedding=True))[0].z
    torch.testing.assert_close(z_1[7], expected[0, 0], rtol=1e-5, atol=1e-6)


# --- what is not computed ---------------------------------------------------------------------------------------------


def test_forwards_that_nobody_reads_are_not_made() -> None:
    """Counted in the layers: tokens forwarded without gradient, per method."""
    case = random_case(12, "mixed", prompts=3, per_prompt=4)
    rollout_tokens = sum(len(p) + len(c) for p, c in case.samples.rollouts.pairs)
    annotated_tokens = sum(1 + len(c) for _, c in list(case.samples.annotated.pairs)[::4])

    def forwarded(*options: str, share: str = "false") -> tuple[int, int]:
        """Tokens through policy and reference in `make_experience`."""
        chosen = quick_config("rollout.samples_per_prompt=4", f"rl.share_prompts={share}", *options)
        parts = take_apart(chosen, case)
        counts = [0, 0]
        reference = parts.step._reference._copy
        for number, model in enumerate((parts.policy, reference)):

            def count(_: Any, inputs: Any, __: Any, number: int = number) -> None:
                counts[number] += inputs[0].shape[1]

            model.lm.model.layers[0].register_forward_hook(count)
        parts.step.make_experience(case.samples, SEED)
        return counts[0], counts[1]

    assert forwarded() == (rollout_tokens + annotated_tokens, rollout_tokens), "a prompt goes with its rollouts alone"
    prompts = {tuple(p) for p, _ in case.samples.rollouts.pairs}
    shared_tokens = sum(map(len, prompts)) + sum(case.samples.rollouts.lengths)
    whole = "rl.mini_batch_size=12"
    assert forwarded(whole, share="auto") == (shared_tokens + annotated_tokens, shared_tokens), "each prompt once"
    assert forwarded(*METHODS["reft"]) == (rollout_tokens, rollout_tokens)
    assert forwarded(*METHODS["reft"], "rl.kl_coef=0.0") == (rollout_tokens, 0)
    one_update = ["rl.ppo_epochs=1", "rl.mini_batch_size=12"]
    assert forwarded(*METHODS["dr_grpo"]) == (rollout_tokens, 0)
    assert forwarded(*METHODS["dr_grpo"], *one_update) == (0, 0), "the ratio is 1: nothing to compare with"
    assert forwarded(*METHODS["dr_grpo"], "rl.old_logprobs=sampled") == (0, 0)
    assert forwarded(*METHODS["dr_grpo"], *one_update, "rollout.top_p=0.9") == (rollout_tokens, 0)
    assert forwarded(*METHODS["dr_grpo"], *GRPO_LOSS, *one_update) == (0, rollout_tokens)


@pytest.mark.parametrize("method", ["carft", "reft"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_look_at_the_first_micro_batch_is_its_forward(method: str, checkpointing: bool) -> None:
    """Of two mini-batches of six rollouts the second is looked at without gradient and forwarded anew."""
    options = [*METHODS[method], "rl.mini_batch_size=6", f"model.gradient_checkpointing={checkpointing}".lower()]
    forwards: list[bool] = []
    parts = take_apart(quick_config(*options), case := random_case(3, "mixed"))
    parts.policy.lm.model.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    again = parts._replace(experience=parts.step.make_experience(case.samples, SEED))
    beside = [False] * (method == "carft")
    assert forwards == [True, *beside, False, *beside]
    forwards.clear()
    update(again, case, torch.optim.SGD(parts.policy.parameters(), lr=0.1), lr=0.1)
    assert forwards == [True] * (2 * len(parts.plan) - 1)


@pytest.mark.parametrize(
    "options",
    [["rl.micro_batch_tokens=160"], ["model.impl=padded"], [*METHODS["dr_grpo"], "rl.mini_batch_size=6"]],
    ids=["several micro-batches", "plain path", "rollouts may be left out"],
)
def test_no_graph_is_kept_where_it_may_cost_memory_or_serve_nothing(options: list[str]) -> None:
    parts = take_apart(quick_config(*options), random_case(3, "mixed"))
    assert parts.experience.first is None
    assert parts.experience.old_logprob_C is not None


def test_a_kept_graph_is_of_its_own_mini_batch_alone() -> None:
    """An update that begins with another one makes its own forward."""
    losses = []
    for forget in (False, True):
        parts = take_apart(quick_config("rl.mini_batch_size=6"), case := random_case(3, "mixed"))
        assert parts.experience.first is not None
        if forget:
            parts = parts._replace(experience=parts.experience._replace(first=None))
        other = parts._replace(experience=parts.experience._replace(plan=[parts.plan[0][1:]]))
        losses.append(update(other, case, torch.optim.SGD(parts.policy.parameters(), lr=0.1))["loss"])
    assert losses[0] == losses[1]


def test_the_first_contrastive_gradient_costs_no_forward() -> None:
    """With several micro-batches InfoNCE needs every z_2 first; before the first update the look has them."""
    options = ["rl.micro_batch_tokens=160", "rl.ppo_epochs=2"]
    parts = take_apart(quick_config(*options), case := random_case(3, "mixed"))
    forwards: list[bool] = []
    parts.policy.lm.model.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    update(parts, case, torch.optim.SGD(parts.policy.parameters(), lr=0.1), lr=0.1)
    first, second = (len(epoch[0].micro) for epoch in parts.plan)
    assert forwards == [True] * first + [False] * second + [True] * second


def test_the_cost_model_counts_what_a_step_computes() -> None:
    """Against torch's counter over a real step. It sees neither attention nor the LM head inside our operators."""
    case = random_case(21, "mixed")
    parts = take_apart(quick_config("rl.micro_batch_tokens=2000"), case)
    rollouts, annotated = case.samples.rollouts, case.samples.annotated
    shape = StepShape(
        [len(p) for p in rollouts.prompts], rollouts.lengths, annotated.lengths, epochs=2, bytes_per_weight=4
    )
    layers_alone = replace(ModelCost.of(parts.policy.lm), attention_width=0, head_weights=0)
    work = fast_step(layers_alone, shape)
    cut = fast_step(layers_alone, shape, one_micro_batch=False)
    width, embedding = parts.policy.heads.proj.weight.shape[::-1]

    def heads(values: int, embeddings: int) -> int:
        return 2 * values * (width * embedding + embedding) + 2 * embeddings * width * embedding

    tokens, annotated_tokens = sum(rollouts.lengths), sum(annotated.lengths)
    with FlopCounterMode(display=False) as counter:
        parts.step.make_experience(case.samples, SEED)
    assert counter.get_total_flops() == work["log-probs"].flops + heads(2 * tokens + annotated_tokens, 24)
    with FlopCounterMode(display=False) as counter:
        update(parts, case, torch.optim.SGD(parts.policy.parameters(), lr=0.1), lr=0.1)
    # z_2 for the loss; nothing asks for a gradient twice
    assert counter.get_total_flops() == work["update"].flops + 2 * 3 * heads(2 * tokens, 12)
    again = parts._replace(experience=parts.experience._replace(first=None))
    with FlopCounterMode(display=False) as counter:
        update(again, case, torch.optim.SGD(parts.policy.parameters(), lr=0.1), lr=0.1)
    assert counter.get_total_flops() == cut["update"].flops + 2 * 3 * heads(2 * tokens, 12)


@contextmanager
def device_reads() -> Iterator[dict[str, int]]:
    """Counts what would make the host wait for a GPU: values read from tensors, and shapes that depend on values."""
    counts: dict[str, int] = {}
    methods = [
        "item",
        "tolist",
        "cpu",
        "numpy",
        "nonzero",
        "masked_select",
        "unique",
        "__bool__",
        "__float__",
        "__int__",
    ]
    original = {name: getattr(Tensor, name) for name in methods}
    index, repeat = Tensor.__getitem__, Tensor.repeat_interleave

    def counted(name: str) -> Callable[..., Any]:
        def method(self: Tensor, *args: Any, **options: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return original[name](self, *args, **options)

        return method

    def counted_index(self: Tensor, at: Any) -> Tensor:
        for part in at if isinstance(at, tuple) else (at,):
            if isinstance(part, Tensor) and part.dtype == torch.bool:
                counts["boolean index"] = counts.get("boolean index", 0) + 1
        return index(self, at)

    def counted_repeat(self: Tensor, repeats: Any, dim: Any = None, *, output_size: int | None = None) -> Tensor:
        if isinstance(repeats, Tensor) and output_size is None:
            counts["repeat_interleave"] = counts.get("repeat_interleave", 0) + 1
        return repeat(self, repeats, dim, output_size=output_size)

    with pytest.MonkeyPatch.context() as patch:
        for name in methods:
            patch.setattr(Tensor, name, counted(name))
        patch.setattr(Tensor, "__getitem__", counted_index)
        patch.setattr(Tensor, "repeat_interleave", counted_repeat)
        yield counts


def test_the_update_waits_for_the_device_only_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many epochs and micro-batches: the metrics are read once. The operator asks for its live tokens."""
    found = []
    # a CPU takes another way than a GPU's
    monkeypatch.setattr(_row_kernels, "zero_rows_", lambda x, rows: x.masked_fill_(rows[:, None], 0.0))
    for module in (_policy_kernels, sys.modules["carft_kernels.policy_loss"]):
        monkeypatch.setattr(module, "all_count", lambda *_: False)
    set_index_checks(False)  # as on a GPU
    try:
        for options in (["rl.ppo_epochs=1"], ["rl.ppo_epochs=3", "rl.mini_batch_size=4", "rl.micro_batch_tokens=160"]):
            parts = take_apart(quick_config(*options), case := random_case(13, "mixed"))
            optimizer = torch.optim.AdamW(parts.policy.parameters(), lr=1e-4, fused=True)
            update(parts, case, optimizer, lr=1e-4)  # the first call of an operator compiles and imports
            parts = parts._replace(experience=parts.step.make_experience(parts.samples, SEED))
            with device_reads() as counts:
                update(parts, case, optimizer, lr=1e-4)
            micros = sum(len(mini.micro) for epoch in parts.plan for mini in epoch)
            assert counts.pop("nonzero") == micros, "linear_policy_loss: once a chunk, here once a micro-batch"
            found.append((micros, counts))
    finally:
        set_index_checks(None)
    (few, once), (many, again) = found
    assert (few, many) == (1, 12)
    assert once == again
    assert once == {"tolist": 1, "__float__": 5}, "the metrics, the ratio error and four figures of the sampler"


# --- scores and advantages --------------------------------------------------------------------------------------------


def test_the_score_falls_on_the_last_token_truncated_or_not() -> None:
    case = random_case(16, "mixed")
    parts = take_apart(quick_config(), case)
    score = parts.score_N
    tripled = score_rollouts(case.grades, parts.experience.cosine_N, quick_config("reward.correct_score=3.0"))
    for i, grade in enumerate(case.grades):
        partial = 0.2 + 0.1 * float(parts.experience.cosine_N[i])
        assert float(score[i]) == pytest.approx(1.0 if grade.correct else partial, rel=1e-6)
        assert float(tripled[i]) == pytest.approx(3.0 if grade.correct else partial, rel=1e-6)
    # gamma = 1, lambda = 1 and no values: every token's return is what its rollout earns from there on
    cu = parts.experience.completion_cu
    zeros = torch.zeros(parts.experience.completion_tokens)
    plain = RlConfig(lam=1.0, kl_coef=0.0, whiten_advantages=False)
    advantages = ppo_advantages(score, None, None, zeros, cu, plain)
    torch.testing.assert_close(advantages.return_C, score.repeat_interleave(cu.diff()))
    kl = RlConfig(lam=0.0, gamma=0.0, kl_coef=0.5, whiten_advantages=False)
    advantages = ppo_advantages(score, zeros + 2.0, zeros, zeros, cu, kl)
    expected = torch.full_like(zeros, -1.0)
    expected[cu[1:] - 1] += score
    torch.testing.assert_close(advantages.advantage_C, expected)


def test_whitening_adds_its_eps_to_the_variance() -> None:
    cu, score = torch.tensor([0, 1, 2, 3]), torch.tensor([0.0, 1.0, 0.5])
    config = RlConfig(lam=1.0, kl_coef=0.0, whiten_eps=0.75)
    found = ppo_advantages(score, None, None, torch.zeros(3), cu, config).advantage_C
    torch.testing.assert_close(found, torch.tensor([-0.5, 0.5, 0.0]))  # variance 0.25, root of 1


def test_importance_weights_have_an_effective_sample_size() -> None:
    """In a step's record: by hand from the log-probs of trainer and sampler."""
    case = random_case(3, "mixed")
    parts = take_apart(quick_config("rl.ppo_epochs=1"), case)
    metrics = update(parts, case, torch.optim.SGD(parts.policy.parameters(), lr=0.1))
    assert parts.experience.old_logprob_C is not None
    pairs = zip(parts.experience.old_logprob_C.tolist(), case.samples.sampled_logprob_C.tolist(), strict=True)
    weights = [math.exp(a - b) for a, b in pairs]
    expected = sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))
    assert 0.1 < expected < 0.95
    assert metrics["sampler_ess"] == pytest.approx(expected, rel=1e-5)


def test_group_advantages_by_hand() -> None:
    score, cu = torch.tensor([1.0, 0.0, 0.5, 0.1, 0.1, 0.1]), torch.tensor([0, 2, 3, 5, 6, 7, 9])
    found = group_advantages(score, cu, 9, samples_per_prompt=3, std_eps=None)
    torch.testing.assert_close(found.advantage_C, torch.tensor([0.5, 0.5, -0.5, 0.0, 0.0, 0, 0, 0, 0]))
    assert found.return_C is None
    found = group_advantages(score, cu, 9, samples_per_prompt=3, std_eps=1e-4)
    torch.testing.assert_close(found.advantage_C[:3], torch.tensor([0.5, 0.5, -0.5]) / 0.5001)
    assert not found.advantage_C[5:].any(), "0.1 three times is no spread, whatever the mean rounds to"


def test_needs_follow_the_config() -> None:
    usual = {"value": True, "embedding": True, "contrastive": True, "old": True, "reference": True}
    assert Needs.of(quick_config()) == Needs(**usual, negative=False, answer=False)
    assert Needs.of(quick_config("contrastive.mode=answer")) == Needs(**usual, negative=False, answer=True)
    assert Needs.of(quick_config(*METHODS["carft_both"])).negative
    assert Needs.of(quick_config("contrastive.coef=0.0")).embedding, "the partial reward reads the cosine"
    assert not Needs.of(quick_config(*METHODS["reft"])).embedding


def test_carft_without_its_loss_and_without_its_partial_reward() -> None:
    case = random_case(3, "mixed")
    wrong = torch.tensor([not grade.correct for grade in case.grades])
    loss_alone, reward_alone = quick_config("reward.partial=constant"), quick_config("contrastive.mode=none")
    parts = take_apart(loss_alone, case)
    assert parts.score_N[wrong].tolist() == pytest.approx([0.1] * int(wrong.sum()))
    assert update(parts, case, torch.optim.SGD(parts.policy.parameters(), lr=0.1))["contrastive_loss"] > 0
    parts = take_apart(reward_alone, case)
    assert parts.experience.cosine_N is not None
    torch.testing.assert_close(parts.score_N[wrong], 0.2 + 0.1 * parts.experience.cosine_N[wrong])
    assert "contrastive_loss" not in update(parts, case, torch.optim.SGD(parts.policy.parameters(), lr=0.1))


def test_the_contrastive_term_reaches_model_and_heads() -> None:
    case = random_case(3, "mixed")
    with_term, _ = gradients(quick_config("contrastive.coef=0.5"), case)
    without, metrics = gradients(quick_config('contrastive.mode="none"'), case)
    assert "contrastive_loss" not in metrics
    for name in ("heads.proj.weight", "heads.summary.weight", "lm.model.layers.0.mlp.up_proj.weight"):
        assert not torch.allclose(with_term[name], without[name], atol=1e-7), name


def test_descending_the_contrastive_loss_draws_correct_rollouts_to_their_annotation() -> None:
    config = quick_config().contrastive
    generator = torch.Generator().manual_seed(0)
    z_1 = torch.randn(8, 16, generator=generator)
    z_2 = torch.randn(8, 16, generator=generator, requires_grad=True)
    correct = torch.arange(8) < 5
    before = torch.cosine_similarity(z_1, z_2).detach()
    optimizer = torch.optim.SGD([z_2], lr=5.0)
    for _ in range(30):
        optimizer.zero_grad()
        contrastive_loss(z_2[:, None], ContrastTargets(z_1, correct), config).backward()
        optimizer.step()
    after = torch.cosine_similarity(z_1, z_2).detach()
    assert (after[correct] > before[correct] + 0.2).all()
    assert after[correct].mean() > after[~correct].mean() + 0.3
