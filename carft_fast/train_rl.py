"""Stage 2: reinforced fine-tuning. One loop for every method; a method is a choice of config values.

A step, top to bottom: sample, grade, look at the samples without gradient (old log-probs, values, reference,
embeddings), turn scores into advantages, update for a few PPO epochs, hand the weights back to the sampler.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from carft_fast.advantage import Advantages, ppo_advantages
from carft_fast.batch import PackedBatch, chunks, derive_seed, epoch_rows, pack, permutation
from carft_fast.config import Config, RolloutConfig
from carft_fast.losses import (
    RolloutTargets,
    completion_logprobs,
    contrastive_loss,
    correction_weights,
    cot_embedding,
    explained_variance,
    ppo_loss,
    sampler_support_logprobs,
)
from carft_fast.model import CarftModel, load_model
from carft_fast.optim import learning_rate, optimizer_step
from carft_fast.prompts import EncodedExample
from carft_fast.reward import Grade, base_score, embedding_partial_score, grade
from carft_fast.rollout import Rollout, RolloutEngine, SamplingParams
from carft_fast.rollout.probe import Mismatch, check_agreement, sampled_logprobs
from carft_fast.rollout.stream import RolloutStream
from carft_fast.run import Run, StageLoop, stage_total_steps

MiniBatches = list[list[list[int]]]
"""Optimizer steps of one PPO epoch: mini-batches of micro-batches of rollout indices."""


class Experience(NamedTuple):
    """What one no-gradient look at a step's rollouts found, in rollout order. N rollouts, C completion tokens."""

    completion_cu: Tensor
    old_logprob_C: Tensor
    support_logprob_C: Tensor
    """`old_logprob_C` on the support the sampler drew from; the same where top-p and top-k are off."""
    ref_logprob_C: Tensor
    old_value_C: Tensor
    z_1_NE: Tensor
    z_2_NE: Tensor

    @property
    def cosine_N(self) -> Tensor:
        return torch.cosine_similarity(self.z_1_NE, self.z_2_NE)


def train_rl(run: Run, model_path: str) -> StageLoop:
    """Run stage 2 to its end, with the model at `model_path` as start and frozen reference; returns its loop."""
    config = run.config.rl
    sampling = run.config.rollout
    prompts_per_step = config.batch_size // sampling.samples_per_prompt
    total_steps = stage_total_steps(run.config, "rl", len(run.train_rows))
    with run.timer("load"):
        reference = load_model(run.config, model_path, run.device, heads=False)

    def request(step: int) -> tuple[list[list[int]], SamplingParams]:
        return [run.train_rows[row].prompt_ids for row in picked_rows(run, prompts_per_step, step)], SamplingParams(
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            samples_per_prompt=sampling.samples_per_prompt,
            seed=derive_seed(run.config.seed, "rl", step),
        )

    with StageLoop(run, "rl", config, model_path, total_steps) as loop, ExitStack() as stack:
        policy, timer = loop.model, run.timer
        with timer("load"):
            engine = run.sampler(policy)
            probe(run, engine, policy)
        loop.evaluate_with(lambda: engine)
        stream = stack.enter_context(RolloutStream(engine, request, total_steps, sampling, run.stop.check))
        for step in loop:
            seed = derive_seed(run.config.seed, "rl", step)
            picked = picked_rows(run, prompts_per_step, step)
            rows = [run.train_rows[row] for row in picked for _ in range(sampling.samples_per_prompt)]

            with timer("rollout"), run.console.track("rollout", len(rows), "completions") as tracker:
                rollouts, staleness = stream.take(step, run.on_progress(tracker))
            with timer("reward"):
                completions = [run.prompt_format.decode(rollout.completion_ids) for rollout in rollouts]
                grades = grade_all(completions, rows, run.config)
            with timer("forward"):
                plan = [
                    plan_epoch(rows, rollouts, run.config, derive_seed(seed, epoch))
                    for epoch in range(config.ppo_epochs)
                ]
                experience = collect_experience(policy, reference, rows, rollouts, plan[0], sampling)
                score_N = score_rollouts(grades, experience.cosine_N, run.config)
                advantages = ppo_advantages(
                    score_N,
                    experience.old_logprob_C,
                    experience.ref_logprob_C,
                    experience.old_value_C,
                    experience.completion_cu,
                    config,
                )
            with timer("update"):
                correct_N = torch.tensor([g.correct for g in grades], device=run.device)
                lr = learning_rate(step, loop.total_steps, config)
                update = Update(
                    policy, loop.optimizer, lr, rows, rollouts, experience, advantages, correct_N, run.config
                )
                update_metrics = update.run(plan)
            with timer("sync"):
                stream.sync(policy)
                if sampling.probe_every and (step + 1) % sampling.probe_every == 0:
                    probe(run, engine, policy)

            values = rollout_metrics(rollouts, grades, score_N, experience, advantages) | update_metrics
            values |= {"lr": lr, "staleness": staleness}
            run.metrics.log("rl", "train", step + 1, values, timer.flush())
            run.write_samples(
                f"rl-{step + 1:06d}",
                describe_samples(run.config, rows, rollouts, completions, grades, score_N),
            )
    return loop


def picked_rows(run: Run, prompts_per_step: int, step: int) -> list[int]:
    """Training rows of a step: every row once an epoch, in an order of the seed's."""
    return epoch_rows(len(run.train_rows), prompts_per_step, step, derive_seed(run.config.seed, "rl"))


def probe(run: Run, engine: RolloutEngine, policy: CarftModel) -> None:
    """Refuse to train on samples of other weights than the trainer's."""
    found = check_agreement(engine, policy, [row.prompt_ids for row in run.train_rows], run.config)
    run.console.log(
        f"trainer and sampler agree: |log-prob difference| mean {found.mean:.1e}, max {found.max:.1e} nats over "
        f"{found.tokens} tokens"
    )


def grade_all(completions: Sequence[str], rows: Sequence[EncodedExample], config: Config) -> list[Grade]:
    rule = config.reward
    return [
        grade(text, row.example.answer, answer_type=rule.answer_type, tolerance=rule.tolerance)
        for text, row in zip(completions, rows, strict=True)
    ]


def score_rollouts(grades: Sequence[Grade], cosine_N: Tensor, config: Config) -> Tensor:
    """Terminal scores float32 [N]: 1 correct, 0 nothing to extract, between them 0.1 or 0.2 + 0.1 cos(z_1, z_2)."""
    score_N = torch.tensor([base_score(g) for g in grades], dtype=torch.float32, device=cosine_N.device)
    if config.reward.partial == "constant":
        return score_N
    partial_N = torch.tensor([g.extractable and not g.correct for g in grades], device=cosine_N.device)
    return torch.where(partial_N, embedding_partial_score(cosine_N), score_N)


def plan_epoch(rows: Sequence[EncodedExample], rollouts: Sequence[Rollout], config: Config, seed: int) -> MiniBatches:
    """Random mini-batches; within one, micro-batches of like length. Which micro-batch a row is in changes no sum."""

    def length(i: int) -> int:
        return len(rows[i].prompt_ids) + len(rollouts[i].completion_ids)

    minis = chunks(permutation(len(rollouts), seed), config.rl.mini_batch_size)
    return [chunks(sorted(mini, key=length), config.rl.micro_batch_size) for mini in minis]


def pack_rollouts(
    rows: Sequence[EncodedExample], rollouts: Sequence[Rollout], picked: Sequence[int], device: torch.device
) -> PackedBatch:
    return pack([rows[i].prompt_ids for i in picked], [rollouts[i].completion_ids for i in picked], device)


@torch.no_grad()
def collect_experience(
    policy: CarftModel,
    reference: CarftModel,
    rows: Sequence[EncodedExample],
    rollouts: Sequence[Rollout],
    plan: MiniBatches,
    sampling: RolloutConfig,
) -> Experience:
    """One pass of policy and reference over the rollouts, one of the policy over the annotated CoTs.

    It goes by the first PPO epoch's micro-batches, so that epoch's first forward repeats it bit for bit and the
    ratio starts at exactly 1.
    """
    device, temperature = policy.device, sampling.temperature
    found: dict[int, tuple[Tensor, ...]] = {}
    for micro in (micro for mini in plan for micro in mini):
        batch = pack_rollouts(rows, rollouts, micro, device)
        output = policy(batch)
        value_T = policy.value(output.hidden_TD)
        old_logprob_C = completion_logprobs(policy, output, batch, temperature=temperature)
        support_logprob_C = sampler_support_logprobs(
            policy,
            output,
            batch,
            old_logprob_C,
            temperature=temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
        )
        z_2 = cot_embedding(policy, output.hidden_TD, value_T, batch)
        ref_logprob_C = completion_logprobs(reference, reference(batch), batch, temperature=temperature)
        annotated = pack([rows[i].prompt_ids for i in micro], [rows[i].completion_ids for i in micro], device)
        hidden_TD = policy(annotated, need_logits=False).hidden_TD
        z_1 = cot_embedding(policy, hidden_TD, policy.value(hidden_TD), annotated)
        per_token = (old_logprob_C, support_logprob_C, ref_logprob_C, value_T[batch.predict_index_C])
        lengths = batch.completion_cu.diff().tolist()
        found.update(zip(micro, zip(*(x.split(lengths) for x in per_token), z_1, z_2, strict=True), strict=True))
    columns = list(zip(*(found[i] for i in range(len(rollouts))), strict=True))
    lengths_N = torch.tensor([0, *(len(x) for x in columns[0])], device=device)
    return Experience(
        lengths_N.cumsum(0),
        *(torch.cat(column) for column in columns[:4]),
        *(torch.stack(column) for column in columns[4:]),
    )


class Update:
    """The PPO epochs of one step over its rollouts."""

    def __init__(
        self,
        policy: CarftModel,
        optimizer: torch.optim.Optimizer,
        lr: float,
        rows: Sequence[EncodedExample],
        rollouts: Sequence[Rollout],
        experience: Experience,
        advantages: Advantages,
        correct_N: Tensor,
        config: Config,
    ) -> None:
        self._policy, self._optimizer, self._lr = policy, optimizer, lr
        self._rows, self._rollouts, self._config = rows, rollouts, config
        self._experience, self._correct_N = experience, correct_N
        sampled_C = sampled_logprobs(rollouts, policy.device)
        correction_C = correction_weights(experience.support_logprob_C, sampled_C, config.rollout)
        per_token = (
            experience.old_logprob_C,
            experience.old_value_C,
            advantages.advantage_C,
            advantages.return_C,
            torch.ones_like(sampled_C) if correction_C is None else correction_C,
        )
        lengths = experience.completion_cu.diff().tolist()
        self._targets = list(zip(*(x.split(lengths) for x in per_token), strict=True))
        self._contrastive = config.contrastive.mode == "positive" and config.contrastive.coef > 0

    def run(self, plan: Sequence[MiniBatches]) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        first_ratio_error: Tensor | None = None
        minis = [mini for epoch in plan for mini in epoch]
        for mini in minis:
            for name, value in self._accumulate(mini).items():
                if name == "ratio_error":
                    first_ratio_error = value if first_ratio_error is None else first_ratio_error
                else:
                    sums[name] = sums.get(name, 0) + value
            norm = optimizer_step(self._policy, self._optimizer, self._lr, self._config.rl.max_grad_norm)
            sums["grad_norm"] = sums.get("grad_norm", 0) + norm
        assert first_ratio_error is not None
        return {name: float(value) / len(minis) for name, value in sums.items()} | {
            "first_ratio_error": float(first_ratio_error)
        }

    def _accumulate(self, mini: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Gradient of one mini-batch; returns its metrics, token shares weighted by completion tokens."""
        sequences = sum(map(len, mini))
        mini_tokens = sum(len(self._targets[i][0]) for micro in mini for i in micro)
        metrics: dict[str, Tensor] = {}
        cotangent: dict[int, Tensor] | None = None
        contrastive = self._experience.z_1_NE.new_zeros(())
        if self._contrastive and len(mini) > 1:
            contrastive, cotangent = self._contrastive_cotangent(mini)
        for position, micro in enumerate(mini):
            batch = pack_rollouts(self._rows, self._rollouts, micro, self._policy.device)
            targets = RolloutTargets(*(torch.cat(x) for x in zip(*(self._targets[i] for i in micro), strict=True)))
            output = self._policy(batch)
            value_T = self._policy.value(output.hidden_TD)
            loss, logprob_C, parts = ppo_loss(
                self._policy,
                output,
                value_T,
                batch,
                targets,
                self._config.rl,
                sequences=sequences,
                temperature=self._config.rollout.temperature,
            )
            coef = self._config.contrastive.coef
            if self._contrastive:
                z_2 = cot_embedding(self._policy, output.hidden_TD, value_T, batch)
                if cotangent is None:
                    index = torch.tensor(micro, device=z_2.device)
                    contrastive = contrastive_loss(
                        self._experience.z_1_NE[index], z_2, self._correct_N[index], self._config.contrastive
                    )
                    (loss + coef * contrastive).backward()
                else:
                    (loss + coef * (z_2 * torch.stack([cotangent[i] for i in micro])).sum()).backward()
            else:
                loss.backward()
            share = len(logprob_C) / mini_tokens
            for name, value in parts.items():
                scale = 1.0 if name in ("policy_loss", "value_loss") else share  # losses add up, token means average
                metrics[name] = metrics.get(name, 0) + value * scale
            metrics["loss"] = metrics.get("loss", 0) + loss.detach()
            if position == 0:
                metrics["ratio_error"] = (logprob_C - targets.old_logprob_C).expm1().abs().max()
        metrics["contrastive_loss"] = contrastive.detach()
        metrics["loss"] = metrics["loss"] + self._config.contrastive.coef * contrastive.detach()
        return metrics

    def _contrastive_cotangent(self, mini: Sequence[Sequence[int]]) -> tuple[Tensor, dict[int, Tensor]]:
        """InfoNCE over a mini-batch that does not fit one forward: the loss and its gradient with respect to z_2.

        A forward without gradient finds every z_2, the loss is differentiated down to them, and the micro-batches
        carry that gradient on. One forward more, and the result of the undivided mini-batch. Source: GradCache.
        """
        order = [i for micro in mini for i in micro]
        index = torch.tensor(order, device=self._policy.device)
        if not bool(self._correct_N[index].any()):
            zeros = torch.zeros_like(self._experience.z_2_NE[0])
            return self._experience.z_1_NE.new_zeros(()), dict.fromkeys(order, zeros)
        with torch.no_grad():
            z_2 = torch.cat([self._embed(micro) for micro in mini])
        z_2.requires_grad_(True)
        loss = contrastive_loss(self._experience.z_1_NE[index], z_2, self._correct_N[index], self._config.contrastive)
        (gradient,) = torch.autograd.grad(loss, z_2)
        return loss.detach(), dict(zip(order, gradient, strict=True))

    def _embed(self, micro: Sequence[int]) -> Tensor:
        batch = pack_rollouts(self._rows, self._rollouts, micro, self._policy.device)
        hidden_TD = self._policy(batch, need_logits=False).hidden_TD
        return cot_embedding(self._policy, hidden_TD, self._policy.value(hidden_TD), batch)


def rollout_metrics(
    rollouts: Sequence[Rollout],
    grades: Sequence[Grade],
    score_N: Tensor,
    experience: Experience,
    advantages: Advantages,
) -> dict[str, float]:
    n = len(rollouts)
    mismatch = Mismatch.of(experience.support_logprob_C, sampled_logprobs(rollouts, score_N.device))
    cosine_N = experience.cosine_N
    correct_N = torch.tensor([g.correct for g in grades], device=score_N.device)
    values = {
        "reward": float(score_N.mean()),
        "train_accuracy": float(correct_N.float().mean()),
        "extractable": sum(g.extractable for g in grades) / n,
        "kl": float((experience.old_logprob_C - experience.ref_logprob_C).mean()),
        "cosine": float(cosine_N.mean()),
        "explained_variance": float(explained_variance(experience.old_value_C, advantages.return_C)),
        "advantage_mean": float(advantages.raw_advantage_C.mean()),
        "advantage_std": float(advantages.raw_advantage_C.std(unbiased=False)),
        "sampler_diff_mean": mismatch.mean,
        "sampler_diff_max": mismatch.max,
        "sampler_diff_material": mismatch.material,
        "completion_length": mismatch.tokens / n,
        "completion_tokens": mismatch.tokens,
        "truncated": sum(r.finish_reason == "length" for r in rollouts) / n,
    }
    if bool(correct_N.any()):
        values["cosine_correct"] = float(cosine_N[correct_N].mean())
    return values


def describe_samples(
    config: Config,
    rows: Sequence[EncodedExample],
    rollouts: Sequence[Rollout],
    completions: Sequence[str],
    grades: Sequence[Grade],
    score_N: Tensor,
) -> list[dict[str, object]]:
    return [
        {
            "item_id": row.example.item_id,
            "question": row.example.question,
            "completion": text,
            "target": row.example.answer,
            "extracted": result.extracted,
            "reward": round(score, 4),
            "finish_reason": rollout.finish_reason,
            "weight_version": rollout.weight_version,
        }
        for row, rollout, text, result, score in zip(rows, rollouts, completions, grades, score_N.tolist(), strict=True)
    ][: config.output.samples_per_step]
