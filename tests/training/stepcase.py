"""One step taken apart: rollouts written by hand, and what a config makes of them. For tests and nothing else."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from carft_fast.config.schema import Config
from carft_fast.config.toml import load_config
from carft_fast.core.seeds import derive_seed
from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.load import load_model
from carft_fast.objective.advantage import Advantages
from carft_fast.objective.annotated import mark_answers
from carft_fast.objective.passes import Rows
from carft_fast.rewards.answers import Grade
from carft_fast.training.batch import Experience, Plan, Samples
from carft_fast.training.parallel import Learner
from carft_fast.training.reference import Reference
from carft_fast.training.rl import estimate_advantages, score_rollouts
from carft_fast.training.step import Step

CPU = torch.device("cpu")
VOCABULARY = 97
SEED = derive_seed(0, "case")
"""Of the mini-batches' order."""
METHODS: dict[str, list[str]] = {
    "carft": [],
    "carft_negative": ["contrastive.mode=negative"],
    "carft_both": ["contrastive.mode=both"],
    "reft": ['contrastive.mode="none"', 'reward.partial="constant"'],
    "dr_grpo": [
        'contrastive.mode="none"',
        'reward.partial="constant"',
        "rl.estimator=dr_grpo",
        "rl.loss_mean=constant",
        "rl.kl_coef=0.0",
        "rollout.samples_per_prompt=4",
    ],
}


def quick_config(*overrides: str) -> Config:
    """The quickstart's model with steps of twelve rollouts."""
    from carft_fast.cli import QUICKSTART_CONFIG

    size = ["rl.batch_size=12", "rl.mini_batch_size=12", "rl.max_grad_norm=1e6", "rollout.max_new_tokens=40"]
    return load_config(str(QUICKSTART_CONFIG), [*size, *overrides])


class Case(NamedTuple):
    """Random ids stand for text: lengths from 1 token up, and verdicts as asked."""

    samples: Samples
    grades: list[Grade]


def random_case(seed: int, verdicts: str, *, prompts: int = 12, per_prompt: int = 1) -> Case:
    """`verdicts`: "mixed", "all correct", "all wrong" or "nothing extracted"."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    questions = [(ids(1, 31), ids(1, 37)) for _ in range(prompts)]
    rows = [question for question in questions for _ in range(per_prompt)]
    completions = [ids(1, 39) for _ in rows]
    completions[0], completions[-1] = completions[0][:1], completions[-1][:1]  # single-token completions, always
    grades = []
    for _ in rows:
        correct = {"mixed": bool(torch.rand(1, generator=generator) < 0.5), "all correct": True}.get(verdicts, False)
        grades.append(Grade(correct, None if verdicts == "nothing extracted" else 5.0))
    sampled = -torch.rand(sum(map(len, completions)), generator=generator) - 3.5
    prompt_ids = [prompt for prompt, _ in rows]
    return Case(Samples(Rows(prompt_ids, completions), Rows(prompt_ids, [cot for _, cot in rows]), sampled), grades)


def with_answers(case: Case, seed: int) -> tuple[Case, list[tuple[int | None, int | None]]]:
    """The same with answer phrases: somewhere, right at the start (nothing before), or nowhere."""
    generator = torch.Generator().manual_seed(seed)

    def somewhere(cot: Sequence[int]) -> int | None:
        index = int(torch.randint(-2, len(cot), (1,), generator=generator))
        return index if index >= 0 else None

    rollouts, annotated = case.samples.rollouts, case.samples.annotated
    answers = [(somewhere(x), somewhere(y)) for x, y in zip(rollouts.cots, annotated.cots, strict=True)]
    rollouts, annotated = mark_answers(rollouts, annotated, answers, CPU)
    return Case(replace(case.samples, rollouts=rollouts, annotated=annotated), case.grades), answers


class Parts(NamedTuple):
    policy: CarftModel
    learner: Learner
    step: Step
    samples: Samples
    plan: Plan
    """Of the update."""
    experience: Experience
    score_N: Tensor
    advantages: Advantages
    live: list[bool]


def spread_out(model: CarftModel) -> CarftModel:
    """Heads and weights away from their initial values, so that no gradient is near zero by symmetry."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def take_apart(config: Config, case: Case, *, device: torch.device = CPU) -> Parts:
    """Everything up to the update, by the trainer's own calls. The reference is the untouched initial model."""
    policy = spread_out(load_model(config, "synthetic", device, heads=True))
    return look_at(config, case, Learner(policy, torch.optim.SGD(policy.parameters())))


def look_at(config: Config, case: Case, learner: Learner) -> Parts:
    """The same with a model in training."""
    policy = learner.model
    step = Step(config, learner, Reference(config, "synthetic", policy))
    experience = step.make_experience(case.samples, SEED)
    score_N = score_rollouts(case.grades, experience.cosine_N, config)
    advantages = estimate_advantages(score_N, experience, config)
    plan, live = step.plan_update(experience, advantages)
    return Parts(policy, learner, step, case.samples, plan, experience, score_N, advantages, live)


def update(parts: Parts, case: Case, optimizer: torch.optim.Optimizer, lr: float = 1.0) -> dict[str, float]:
    parts.learner.optimizer = optimizer
    return parts.step.update(parts.experience, parts.advantages, [g.correct for g in case.grades], lr).metrics


class _Recorder(torch.optim.SGD):
    """Plain gradient descent that keeps the last update's gradients: a change of weights shows them only rounded."""

    def step(self, closure: Any = None) -> Any:
        self.gradients = [None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]]
        return super().step(closure)


def gradients(config: Config, case: Case, lr: float = 0.1) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Every parameter's gradient in the last update of the step, and the metrics of all."""
    parts = take_apart(config, case)
    names, parameters = zip(*parts.policy.named_parameters(), strict=True)
    recorder = _Recorder(parameters, lr=lr)
    metrics = update(parts, case, recorder, lr=lr)
    found = zip(names, parameters, recorder.gradients, strict=True)
    return {name: torch.zeros_like(p) if gradient is None else gradient for name, p, gradient in found}, metrics
