"""carft_fast's side: `Step` driven as training/rl.py drives it, with the case's rewards."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.turns import Turns, serve
from benchmarks.peers.work import Done, Work
from carft_fast.config import Config, load_method_config
from carft_fast.core import Example, derive_seed
from carft_fast.data import EncodedExample, PromptFormat
from carft_fast.models import CarftModel, load_model, load_tokenizer, pack
from carft_fast.objective import Rows, padded
from carft_fast.rewards import Grader
from carft_fast.rollout import Rollout, RolloutEngine, SamplingParams, build_engine
from carft_fast.rollout.hf import HFEngine
from carft_fast.rollout.vllm import adapter as vllm_adapter
from carft_fast.training import (
    Learner,
    Needs,
    Reference,
    Step,
    as_samples,
    build_optimizer,
    estimate_advantages,
    grade_rollouts,
)

CPU = torch.device("cpu")


def side_config(work: Work, options: list[str]) -> Config:
    """The case's method. The gradient is clipped where it never is: its scale is compared too."""
    size = [
        f"model.path={work.model}",
        "model.compute_dtype=float32",
        f"rl.batch_size={work.samples}",
        f"rl.mini_batch_size={work.samples}",
        f"rl.ppo_epochs={work.updates_per_step}",
        f"rl.lr={work.lr}",
        "rl.lr_schedule=constant",
        "rl.max_grad_norm=1e6",
        f"rollout.samples_per_prompt={work.samples_per_prompt}",
        f"rollout.max_new_tokens={work.max_new_tokens}",
        f"rollout.batch_size={work.samples}",
    ]
    return load_method_config(work.config, [*work.options, *size, *options], work.method)[0]


def fixed_length_engine(config: Config, model: CarftModel, tokenizer: Any) -> RolloutEngine:
    """The config's engine, whose completions all have max_new_tokens tokens."""
    if config.rollout.engine == "hf":
        return HFEngine(model, tokenizer, batch_size=config.rollout.batch_size, ends=[-1])
    fields = vllm_adapter.sampling_fields

    def without_eos(sampling: SamplingParams, prompt: int, ends: Sequence[int]) -> dict[str, Any]:
        return fields(sampling, prompt, ends) | {"min_tokens": sampling.max_new_tokens}

    vllm_adapter.sampling_fields = without_eos
    return build_engine(config, model, tokenizer)


class CarftSide:
    def __init__(self, work: Work, options: list[str]) -> None:
        self.work = work
        config = self._config = side_config(work, options)
        tokenizer = load_tokenizer(config.model)
        self._format = PromptFormat(tokenizer)
        self._grader = Grader(config.reward)
        self.policy = load_model(config, work.model, CPU, heads=True)
        self._optimizer = build_optimizer(self.policy, config.rl)
        self._optimizer.register_step_pre_hook(lambda *_: self._keep_gradient())
        reference = Reference(config, work.model, self.policy) if Needs.of(config).reference else None
        self._step = Step(config, Learner(self.policy, self._optimizer), reference)
        self._engine = None if work.completions else fixed_length_engine(config, self.policy, tokenizer)
        annotated = work.annotated or [prompt[:1] for prompt in work.prompts]  # nothing reads the latter
        self._rows = [
            EncodedExample(Example(str(i), "", (), answer), prompt, (cot,))
            for i, (prompt, answer, cot) in enumerate(zip(work.prompts, work.answers, annotated, strict=True))
            for _ in range(work.samples_per_prompt)
        ]
        self._steps_done = 0
        self.gradient: dict[str, Tensor] | None = None

    def _keep_gradient(self) -> None:
        if self.gradient is None:
            named = self.policy.lm.named_parameters()
            self.gradient = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def _rollouts(self) -> list[Rollout]:
        if self.work.completions is not None:
            return [Rollout(ids, [0.0] * len(ids), "stop", 0) for ids in self.work.completions]
        assert self._engine is not None
        sampling = SamplingParams(
            self.work.max_new_tokens, samples_per_prompt=self.work.samples_per_prompt, seed=self._steps_done
        )
        return self._engine.generate(self.work.prompts, sampling)

    def step(self, done: Done) -> None:
        """A step of train_rl.py: sample, decode, grade, advantages, update, sync. The case's rewards then count."""
        rollouts = self._rollouts()
        grade_rollouts(rollouts, self._rows, self._format, self._grader)
        samples = as_samples(self._rows, rollouts, CPU)
        experience = self._step.make_experience(samples, derive_seed(0, "peers", self._steps_done))
        advantages = estimate_advantages(torch.tensor(self.work.rewards), experience, self._config)
        plan, live = self._step.plan_update(experience, advantages)
        assert all(live), "a sample without advantage would be left out here and not elsewhere"
        correct = [reward == 1 for reward in self.work.rewards]
        updated = self._step.update(experience, advantages, correct, self._config.rl.lr)
        if self._engine is not None:
            self._engine.sync(self.policy)
        self._steps_done += 1
        micros = [micro for mini in plan[0] for micro in mini.micro]
        rows = [i for micro in micros for i in micro]
        done.samples = len(rows)
        done.prompt_tokens = sum(len(samples.rollouts.prompts[i]) for i in rows)
        done.completion_tokens = sum(samples.rollouts.lengths[i] for i in rows)
        done.positions = sum(self._positions(samples.rollouts.pick(micro)) for micro in micros)
        done.annotated_tokens = sum(samples.annotated.lengths) if self.work.annotated else 0
        done.optimizer_steps = sum(map(len, plan))
        done.loss = updated.metrics["loss"]

    def _positions(self, rows: Rows) -> int:
        if self._config.model.impl == "padded":
            return padded.pad(rows.prompts, rows.completions, CPU).ids_BL.numel()
        return len(pack(rows.prompts, rows.completions, CPU, share_prompts=self._config.shares_prompts).ids_T)

    def weights(self) -> dict[str, Tensor]:
        return dict(self.policy.lm.named_parameters())

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--work", "--folder"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--setting", type=json.loads, required=True, help='{"options": [config options]}')
    arguments = parser.parse_args()
    turns, work = Turns(), Work.load(arguments.work)
    side = CarftSide(work, arguments.setting["options"])
    serve(side, work, arguments.folder, turns)
    side.close()


if __name__ == "__main__":
    main()
