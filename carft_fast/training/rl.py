"""Stage 2: reinforced fine-tuning. One loop for every method; a method is a choice of config values.

A step, top to bottom: sample, grade, forwards without gradient (old log-probs, values, reference, embeddings), scores
to advantages, an update of a few PPO epochs, the weights back to the sampler, one record.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from carft_fast.config import Config, RolloutConfig
from carft_fast.core import derive_seed, to_device
from carft_fast.data import EncodedExample, PromptFormat
from carft_fast.models import CarftModel
from carft_fast.objective import (
    Advantages,
    Rows,
    explained_variance,
    group_advantages,
    mark_answers,
    ppo_advantages,
)
from carft_fast.rewards import Grade, base_score, embedding_partial_score
from carft_fast.rollout import Rollout, RolloutEngine, RolloutStream, SamplingParams
from carft_fast.training.agreement import check_agreement, sampled_logprobs
from carft_fast.training.batch import Experience, Needs, Samples
from carft_fast.training.evaluation import grade_rollouts
from carft_fast.training.extension import stage_total_steps
from carft_fast.training.loop import StageLoop, picked_rows
from carft_fast.training.optim import learning_rate
from carft_fast.training.reference import Reference
from carft_fast.training.run import Run
from carft_fast.training.step import Step

HOST = torch.device("cpu")


def train_rl(run: Run, model_path: str) -> StageLoop:
    """Run stage 2 to its end, with the model at `model_path` as start and frozen reference; returns its loop."""
    config, sampling = run.config.rl, run.config.rollout
    prompts_per_step = config.batch_size // sampling.samples_per_prompt
    total_steps = stage_total_steps(run.config, "rl", len(run.train_rows))

    @lru_cache(maxsize=2)  # the next step's prompts may be asked for before this step's rows
    def prompts_of(step: int) -> list[EncodedExample]:
        rows = picked_rows(run, "rl", prompts_per_step, step)
        if not (share := prefix_share(sampling, step, total_steps)):
            return rows
        room = run.config.data.max_length - sampling.max_new_tokens
        return [row.with_prefix(share, room - len(row.prompt_ids)) for row in rows]

    def request(step: int) -> tuple[list[list[int]], SamplingParams]:
        seed = derive_seed(run.config.seed, "rl", step)
        rows, asked = prompts_of(step), SamplingParams.of(sampling, seed)
        if sampling.drafts == "auto":  # the annotated CoTs
            drafts = [[row.completion_ids[row.prefix_tokens :], *row.completions[1:]] for row in rows]
            asked = replace(asked, drafts=drafts)
        return [row.sampling_ids for row in rows], asked

    with StageLoop(run, "rl", config, model_path, total_steps) as loop:
        policy, timer = loop.learner.model, run.timer
        with timer("load"):
            reference = Reference(run.config, model_path, policy) if Needs.of(run.config).reference else None
            work = Step(run.config, loop.learner, reference)
            engine = run.sampler(policy)
            probe(run, engine, policy)
        loop.evaluate_with(lambda: engine)
        with RolloutStream(engine, request, total_steps, sampling, run.stop.check_aside) as stream:
            for step in loop:
                rows = [row for row in prompts_of(step) for _ in range(sampling.samples_per_prompt)]
                with timer("rollout"), run.console.track("rollout", len(rows), "completions") as tracker:
                    rollouts, staleness = stream.take(step, run.on_progress(tracker))
                with timer("reward"):
                    completions, grades = grade_rollouts(rollouts, rows, run.prompt_format, run.grader)
                with timer("forward"):
                    samples = as_samples(
                        rows,
                        rollouts,
                        run.device,
                        mask_truncated=config.mask_truncated,
                        answers=run.prompt_format if work.needs.answer else None,
                    )
                    experience = work.make_experience(samples, derive_seed(run.config.seed, "rl", step))
                    score_N = score_rollouts(grades, experience.cosine_N, run.config, run.device)
                    advantages = estimate_advantages(score_N, experience, run.config)
                loop.begin_update()
                with timer("update"):
                    lr = learning_rate(step, loop.total_steps, config) * loop.lr_scale
                    updated = work.update(experience, advantages, [g.correct for g in grades], lr)
                with timer("sync"):
                    stream.sync(policy)
                    due = sampling.probe_every and (step + 1) % sampling.probe_every == 0
                    if due or (run.given_engine is not None and step == 0):  # does it take weights over at all?
                        probe(run, engine, policy)

                values = rollout_metrics(rollouts, grades, score_N, experience, advantages) | updated.metrics
                values |= {"lr": lr, "staleness": staleness}
                if sampling.drafting:
                    values |= draft_metrics(rollouts)
                if sampling.prefix:
                    values["prefix_length"] = sum(row.prefix_tokens for row in rows) / len(rows)
                run.metrics.log("rl", "train", step + 1, values, timer.flush())
                described = describe_samples(rows, rollouts, completions, grades, score_N, run.prompt_format)
                run.write_samples(f"rl-{step + 1:06d}", described[: run.config.output.samples_per_step])
                if updated.skipped_rows:
                    loop.report_skipped([described[i] for i in updated.skipped_rows])
                if loop.guard_against_collapse():
                    with timer("sync"):
                        stream.sync(policy)
    return loop


def probe(run: Run, engine: RolloutEngine, policy: CarftModel) -> None:
    """Refuse to train on samples of other weights than the trainer's."""
    found = check_agreement(engine, policy, [row.prompt_ids for row in run.train_rows], run.config)
    run.console.log(
        f"trainer and sampler agree: |log-prob difference| mean {found.mean:.1e}, max {found.max:.1e} nats over "
        f"{found.tokens} tokens"
    )


def prefix_share(config: RolloutConfig, step: int, total_steps: int) -> float:
    """Of its annotation, given with a prompt in step `step` (from 0): see `rollout.prefix`."""
    return config.prefix * max(0.0, 1 - step / (config.prefix_steps or total_steps))


def as_samples(
    rows: Sequence[EncodedExample],
    rollouts: Sequence[Rollout],
    device: torch.device,
    *,
    mask_truncated: bool = False,
    answers: PromptFormat | None = None,
) -> Samples:
    """`answers`: whose answer phrases are looked up, for contrastive.mode "answer"."""
    left_out = (i for i, rollout in enumerate(rollouts) if mask_truncated and rollout.finish_reason == "length")
    prefixes = [row.prefix_tokens for row in rows]
    sampled = Rows(
        [row.sampling_ids for row in rows],
        [rollout.completion_ids for rollout in rollouts],
        prefix_lengths=prefixes if any(prefixes) else None,
    )
    annotated = Rows([row.prompt_ids for row in rows], [row.completion_ids for row in rows])
    if answers is not None:
        pairs = zip(sampled.cots, annotated.cots, strict=True)
        found = [(answers.answer_index(cot), answers.answer_index(text)) for cot, text in pairs]
        sampled, annotated = mark_answers(sampled, annotated, found, device)
    return Samples(sampled, annotated, sampled_logprobs(rollouts, device), frozenset(left_out))


def score_rollouts(
    grades: Sequence[Grade], cosine_N: Tensor | None, config: Config, device: torch.device = HOST
) -> Tensor:
    """Terminal scores float32 [N]: `reward.correct_score`, 0 nothing to extract, between as `reward.partial` says."""
    rule = config.reward
    scores = [base_score(g, rule.partial_constant, rule.correct_score) for g in grades]
    score_N = to_device(scores, torch.float32, device)
    if rule.partial == "constant":
        return score_N
    assert cosine_N is not None
    partial_N = to_device([g.extractable and not g.correct for g in grades], torch.bool, device)
    return torch.where(partial_N, embedding_partial_score(cosine_N, rule.partial_base, rule.partial_scale), score_N)


def estimate_advantages(score_N: Tensor, experience: Experience, config: Config) -> Advantages:
    """By `rl.estimator`."""
    if config.rl.estimator == "gae":
        assert experience.old_value_C is not None
        return ppo_advantages(
            score_N,
            experience.old_logprob_C,
            experience.ref_logprob_C,
            experience.old_value_C,
            experience.completion_cu,
            config.rl,
        )
    return group_advantages(
        score_N,
        experience.completion_cu,
        experience.completion_tokens,
        samples_per_prompt=config.rollout.samples_per_prompt,
        std_eps=config.rl.group_std_eps if config.rl.estimator == "grpo" else None,
        leave_one_out=config.rl.estimator == "rloo",
    )


def rollout_metrics(
    rollouts: Sequence[Rollout],
    grades: Sequence[Grade],
    score_N: Tensor,
    experience: Experience,
    advantages: Advantages,
) -> dict[str, float]:
    n = len(rollouts)
    values = {
        "reward": float(score_N.mean()),
        "train_accuracy": sum(g.correct for g in grades) / n,
        "extractable": sum(g.extractable for g in grades) / n,
        "advantage_mean": float(advantages.raw_advantage_C.mean()),
        "advantage_std": float(advantages.raw_advantage_C.std(unbiased=False)),
        "completion_length": experience.completion_tokens / n,
        "completion_tokens": experience.completion_tokens,
        "truncated": sum(r.finish_reason == "length" for r in rollouts) / n,
    }
    if (parts := [g.parts for g in grades if g.parts]) and len(parts) == n:
        values |= {f"reward/{label}": sum(part[label] for part in parts) / n for label in parts[0]}
    if experience.ref_logprob_C is not None and experience.old_logprob_C is not None:
        values["kl"] = float((experience.old_logprob_C - experience.ref_logprob_C).mean())
    if experience.old_value_C is not None and advantages.return_C is not None:
        values["explained_variance"] = float(explained_variance(experience.old_value_C, advantages.return_C))
    if experience.cosine_N is not None:
        cosine = experience.cosine_N.tolist()
        values["cosine"] = sum(cosine) / n
        if of_correct := [x for x, g in zip(cosine, grades, strict=True) if g.correct]:
            values["cosine_correct"] = sum(of_correct) / len(of_correct)
    return values


def draft_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What guessing did for the sampler; a completion's first token is that of its prompt's forward."""
    tokens = sum(len(r.completion_ids) for r in rollouts)
    drafted, accepted = sum(r.drafted for r in rollouts), sum(r.accepted for r in rollouts)
    values = {"tokens_per_forward": tokens / (tokens - accepted), "draft_wasted": (drafted - accepted) / tokens}
    return values | ({"draft_accepted": accepted / drafted} if drafted else {})


def describe_samples(
    rows: Sequence[EncodedExample],
    rollouts: Sequence[Rollout],
    completions: Sequence[str],
    grades: Sequence[Grade],
    score_N: Tensor,
    prompt_format: PromptFormat,
) -> list[dict[str, object]]:
    return [
        {
            "item_id": row.example.item_id,
            "question": row.example.question,
            "prompt": row.prompt,
            **({"prefix": prompt_format.decode(row.prefix_ids)} if row.prefix_tokens else {}),
            "completion": text,
            "target": row.example.answer,
            "extracted": result.extracted,
            "reward": round(score, 4),
            **({} if result.parts is None else {"rewards": dict(result.parts)}),
            "finish_reason": rollout.finish_reason,
            "weight_version": rollout.weight_version,
        }
        for row, rollout, text, result, score in zip(rows, rollouts, completions, grades, score_N.tolist(), strict=True)
    ]
