"""A step's forwards and its update: what to compute, in which micro-batches, and nothing that the method does not read.

Nothing between the first forward and the last optimizer step reads a value back from the device, but two things:
`Step.live` reads the advantages once where rollouts may be dropped, and `linear_policy_loss` the number of live tokens.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from carft_fast.config import Config
from carft_fast.core import chunks, derive_seed, gather_by_row, global_sum, own_turns, permutation, world_size
from carft_fast.models import CarftModel
from carft_fast.objective import (
    Advantages,
    Annotated,
    ContrastTargets,
    Forward,
    Look,
    Loss,
    Normaliser,
    RolloutTargets,
    Rows,
    Want,
    build_passes,
    contrastive_loss,
    correction_weights,
    gathered,
)
from carft_fast.training.agreement import Mismatch
from carft_fast.training.parallel import Learner
from carft_fast.training.reference import Reference

# Means over the tokens that have a weight in the policy loss: correction may take it from some.
TOKEN_MEANS = ("clip_fraction", "approx_kl", "entropy")


@dataclass(frozen=True, slots=True)
class Samples:
    """The sequences of a step in rollout order, the annotated ones beside them, and the sampler's log-probs [C]."""

    rollouts: Rows
    annotated: Rows
    sampled_logprob_C: Tensor


class MiniBatch(NamedTuple):
    """One optimizer step: its rollouts, and how those that need a forward are cut into micro-batches."""

    rows: list[int]
    micro: list[list[int]]
    """Processes take them in turn and have as many each; then some may be empty."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a method reads. The rest is not computed."""

    value: bool
    embedding: bool
    """z_1 and z_2: for the contrastive term or the partial reward."""
    contrastive: bool
    negative: bool
    """The tokens that rollouts and annotated CoTs have in common, and their embeddings."""
    old: bool
    """Old log-probs by a forward of their own."""
    reference: bool

    @classmethod
    def of(cls, config: Config) -> "Needs":
        rl, rollout = config.rl, config.rollout
        contrastive = config.contrastive.mode != "none" and config.contrastive.coef > 0
        one_update = rl.ppo_epochs == 1 and rl.mini_batch_size == rl.batch_size
        compared = rl.kl_coef > 0 or rollout.correction != "none" or rollout.top_p < 1 or rollout.top_k > 0
        return cls(
            value=rl.estimator == "gae",
            embedding=contrastive or config.reward.partial == "embedding",
            contrastive=contrastive,
            negative=contrastive and config.contrastive.mode in ("negative", "both"),
            old=rl.old_logprobs == "recompute" and (compared or not one_update),
            reference=rl.kl_coef > 0 or rl.kl_loss_coef > 0,
        )


class Experience(NamedTuple):
    """What one no-gradient look at a step's rollouts found, in rollout order; absent is what the method does not read.

    N rollouts, C completion tokens, E embedding size, P parts: the whole completion, and for the negative signal what
    it has in common with the annotated CoT and what it has beyond.
    """

    completion_tokens: int
    completion_cu: Tensor
    old_logprob_C: Tensor | None
    support_logprob_C: Tensor | None
    """The trainer's own log-probs on the support the sampler drew from; without top-p and top-k its plain ones."""
    ref_logprob_C: Tensor | None
    old_value_C: Tensor | None
    z_1_NE: Tensor | None
    common_NE: Tensor | None
    """z of the annotated tokens that a rollout has in common with it."""
    z_2_NPE: Tensor | None
    first: tuple[MiniBatch, Forward] | None = None
    """The step's first mini-batch with its graph, which serves one backward: its update needs no forward of its own."""

    @property
    def cosine_N(self) -> Tensor | None:
        if self.z_1_NE is None or self.z_2_NPE is None:
            return None
        return torch.cosine_similarity(self.z_1_NE, self.z_2_NPE[:, 0])


class Update(NamedTuple):
    metrics: dict[str, float]
    """Means over the optimizer steps; `skipped_updates` is their number that was left out."""
    skipped_rows: list[int]
    """Rollouts of the optimizer steps that were left out."""


class Step:
    """Everything a step does with its rollouts but grading them."""

    def __init__(self, config: Config, learner: Learner, reference: Reference | None) -> None:
        """`reference` may be absent where `Needs.of(config).reference` is False."""
        self._config, self._learner, self._reference = config, learner, reference
        self._policy, self._device = learner.model, learner.model.device
        self.needs = Needs.of(config)
        assert reference is not None or not self.needs.reference
        self._padded = config.model.impl == "padded"
        self._passes = build_passes(
            config, self._policy, config.rl.micro_batch_tokens, share_prompts=config.rl.share_prompts
        )

    def plan(self, samples: Samples, seed: int, live: Sequence[bool] | None = None) -> list[list[MiniBatch]]:
        """Random mini-batches of every PPO epoch; how they are cut into micro-batches changes no sum.

        Rollouts that are not `live` count in their mini-batch, and the fast path puts them in no micro-batch.
        """
        rollouts, rl = samples.rollouts, self._config.rl

        def mini_batch(rows: list[int]) -> MiniBatch:
            kept = rows if live is None or self._padded else [i for i in rows if live[i]]
            micro = self._passes.micro_batches(rollouts.pick(kept), world_size())
            return MiniBatch(rows, [[kept[i] for i in batch] for batch in micro])

        return [
            [
                mini_batch(rows)
                for rows in chunks(permutation(len(rollouts.prompts), derive_seed(seed, epoch)), rl.mini_batch_size)
            ]
            for epoch in range(rl.ppo_epochs)
        ]

    @torch.no_grad()
    def look(self, samples: Samples, first_epoch: Sequence[MiniBatch]) -> Experience:
        """One pass of policy and reference over the rollouts, one of the policy over the annotated CoTs, as needed.

        An annotated CoT goes on from the states that its prompt has before a rollout, where the attention can.

        It goes by the first PPO epoch's micro-batches, so that epoch's first forward repeats it bit for bit and the
        ratio starts at exactly 1. Where the first mini-batch is one micro-batch it is that forward: its graph stays,
        in no more memory than a micro-batch is given.
        """
        needs, rollouts = self.needs, samples.rollouts
        micros = [micro for mini in first_epoch for micro in mini.micro]
        own = ref = Look(None, None, None, None)
        first = None
        if needs.reference:
            assert self._reference is not None
            with self._reference.model() as model:
                ref, _ = self._sweep(model, rollouts, micros, Want(logprob=True))
        annotated = self._annotated(samples.annotated, micros) if needs.embedding else None
        beside = annotated if self._passes.goes_on else None
        if needs.old or needs.value or needs.embedding:
            want = Want(needs.old, needs.value, needs.embedding)
            possible = self._learner.keeps_graphs and not (self._padded or self._may_drop)
            keep = possible and len(own_turns(first_epoch[0].micro)) == 1
            own, first = self._sweep(self._policy, rollouts, micros, want, keep_first=keep, beside=beside)
        z_1_NE, common_NE = annotated.embeddings() if annotated is not None else (None, None)
        sampled = self._config.rl.old_logprobs == "sampled"
        return Experience(
            sum(rollouts.lengths),
            torch.tensor([0, *itertools.accumulate(rollouts.lengths)], device=self._device),
            samples.sampled_logprob_C if sampled else own.logprob_C,
            own.support_logprob_C,
            ref.logprob_C,
            own.value_C,
            z_1_NE,
            common_NE,
            own.z_BPE,
            (first_epoch[0], first) if first else None,
        )

    def _sweep(
        self,
        model: CarftModel,
        rows: Rows,
        micros: Sequence[Sequence[int]],
        want: Want,
        *,
        keep_first: bool = False,
        beside: Annotated | None = None,
    ) -> tuple[Look, Forward | None]:
        """A look at all rows, the processes' micro-batches in turn; on each all results, in the order of the rows.

        `keep_first`: with this process's first forward, and its graph. `beside` is looked at after each micro-batch.
        """
        looks, first = self.own_looks(model, rows, micros, want, keep_first=keep_first, beside=beside)
        return gathered(looks, rows, micros), first

    def own_looks(
        self,
        model: CarftModel,
        rows: Rows,
        micros: Sequence[Sequence[int]],
        want: Want,
        *,
        keep_first: bool = False,
        beside: Annotated | None = None,
    ) -> tuple[list[Look], Forward | None]:
        """Of this process's micro-batches; an empty one gives empty results."""
        looks: list[Look] = []
        first = None
        for number, micro in enumerate(own_turns(micros)):
            keep = keep_first and number == 0
            picked = micro or [rows.shortest]
            states = beside is not None
            look, forward = self._look(model, rows, picked, want, keep=keep, keep_prompts=states)
            looks.append(look if micro else look.nothing)
            first = forward if keep else first
            if beside is not None:
                assert forward.prompts is not None
                for following in own_turns(beside.turns[number]):
                    picked = following or [beside.one_of(forward.prompts)]
                    look, _ = self._look(model, beside.unique, picked, Want(embedding=True), after=forward.prompts)
                    beside.looks.append(look if following else look.nothing)
                forward.prompts.close()
        return looks, first

    def _look(
        self,
        model: CarftModel,
        rows: Rows,
        picked: Sequence[int],
        want: Want,
        *,
        keep: bool = False,
        **prompts: Any,
    ) -> tuple[Look, Forward]:
        """`keep`: the forward with its graph."""

        def work(model: CarftModel) -> tuple[Look, Forward]:
            with torch.set_grad_enabled(keep):
                forward = self._passes.forward(model, rows.pick(picked), need_logits=want.logprob or keep, **prompts)
            return self._passes.look(model, forward, want), forward

        return model.run(work)

    def _annotated(self, rows: Rows, micros: Sequence[Sequence[int]]) -> Annotated:
        """To be looked at beside the rollouts in `micros` where their prompts serve; else looked at by themselves."""
        annotated = Annotated(rows)
        if self._passes.goes_on:
            annotated.follow(micros, self._passes)
        else:
            annotated.turns = [self._passes.micro_batches(annotated.unique, world_size())]
            annotated.looks, _ = self.own_looks(
                self._policy, annotated.unique, annotated.turns[0], Want(embedding=True)
            )
        return annotated

    @property
    def _may_drop(self) -> bool:
        """Whether a rollout without advantage trains nothing."""
        return not (self.needs.value or self.needs.contrastive or self._config.rl.kl_loss_coef)

    def live(self, samples: Samples, advantages: Advantages) -> list[bool] | None:
        """Which rollouts have a gradient; None where all may have one. Reads the advantages back, once.

        A rollout without advantage trains nothing where there is no value loss, contrastive term or KL term: in a
        group whose samples all scored the same nothing is learned from any.
        """
        if not self._may_drop:
            return None
        return [bool(a.any()) for a in advantages.advantage_C.cpu().split(samples.rollouts.lengths)]

    def update(
        self,
        samples: Samples,
        plan: Sequence[Sequence[MiniBatch]],
        experience: Experience,
        advantages: Advantages,
        correct: Sequence[bool],
        live: Sequence[bool] | None,
        lr: float,
    ) -> Update:
        """The PPO epochs. An optimizer step whose loss or gradient is not finite is left out."""
        gradient = _Gradient(self, samples, experience, advantages, correct, live)
        found: dict[str, list[Tensor]] = {}
        skipped: list[Tensor] = []
        minis = [mini for epoch in plan for mini in epoch]
        for mini in minis:
            metrics = gradient.accumulate(mini, unchanged=mini is minis[0])
            norm, left_out = self._learner.step(lr, self._config.rl.max_grad_norm, metrics["loss"])
            skipped.append(left_out)
            for name, value in (metrics | {"grad_norm": norm}).items():
                found.setdefault(name, []).append(value)
        means = [torch.stack(values).double().mean() for values in found.values()]
        numbers: list[float] = torch.stack([*means, *(x.double() for x in skipped)]).tolist()
        left_out_minis = [mini for mini, flag in zip(minis, numbers[len(found) :], strict=True) if flag]
        result = dict(zip(found, numbers, strict=False)) | {"skipped_updates": len(left_out_minis)}
        return Update(result | gradient.agreement(), sorted({i for mini in left_out_minis for i in mini.rows}))


class _Gradient:
    """Gradients of one step's mini-batches."""

    def __init__(
        self,
        step: Step,
        samples: Samples,
        experience: Experience,
        advantages: Advantages,
        correct: Sequence[bool],
        live: Sequence[bool] | None,
    ) -> None:
        self._step, self._samples, self._experience, self._correct = step, samples, experience, correct
        self._config, self._learner, self._passes = step._config, step._learner, step._passes
        self._lengths = samples.rollouts.lengths
        self._live = [True] * len(self._lengths) if live is None else live
        correction_C = None
        if experience.support_logprob_C is not None:
            correction_C = correction_weights(
                experience.support_logprob_C, samples.sampled_logprob_C, self._config.rollout
            )
        self._targets = [
            None if x is None else x.split(self._lengths)
            for x in RolloutTargets(
                advantages.advantage_C,
                experience.old_logprob_C,
                correction_C,
                experience.ref_logprob_C,
                experience.old_value_C,
                advantages.return_C,
            )
        ]
        self._first: dict[int, Tensor] = {}
        self._zero = torch.zeros((), device=step._device)

    def accumulate(self, mini: MiniBatch, *, unchanged: bool) -> dict[str, Tensor]:
        """Gradient of one mini-batch; returns its metrics, those of all processes.

        `unchanged`: the weights are still those of the look.
        """
        config, rollouts = self._config, self._samples.rollouts
        rows, coef = [i for micro in mini.micro for i in micro], config.contrastive.coef
        normaliser = Normaliser(len(mini.rows), sum(self._lengths[i] for i in mini.rows), config.rollout.max_new_tokens)
        own = own_turns(mini.micro)
        kept, forward = self._experience.first or (None, None)
        forward = forward if unchanged and kept == mini else None
        sums: dict[str, Tensor] = {"loss": self._zero, "policy_loss": self._zero}
        contrastive, cotangent, first = self._zero, None, []
        wanted = self._step.needs.contrastive and any(map(self._has_signal, rows))
        if wanted and len(own) > 1:
            contrastive, cotangent = self._contrastive_cotangent(mini.micro, unchanged=unchanged)
        for number, micro in enumerate(own):
            # a process without rows goes along with one that counts for nothing
            picked_rows, share = (micro, 1.0) if micro else ([rollouts.shortest], 0.0)
            picked = rollouts.pick(picked_rows)
            targets = RolloutTargets._make(
                None if x is None else torch.cat([x[i] for i in picked_rows]) for x in self._targets
            )
            live = [self._live[i] or not micro for i in picked_rows]
            loss, logprob_C, parts, z_2_BPE = self._learner.model.run(
                functools.partial(
                    self._loss,
                    rows=picked,
                    forward=forward,
                    targets=targets,
                    normaliser=normaliser,
                    live=live,
                    embedding=wanted,
                )
            )
            parts["loss"] = loss.detach()
            if "value_clip_fraction" in parts:
                parts["value_clip_fraction"] *= sum(picked.lengths) / normaliser.tokens
            parts |= {name: parts["policy_tokens"] * parts[name] for name in TOKEN_MEANS}
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + share * value
            if share == 0:
                loss = share * loss
            if z_2_BPE is not None:
                if cotangent is None:
                    contrastive, cotangent = self._contrast(z_2_BPE.detach()[: len(micro)], micro)
                gradient_BPE = torch.stack([cotangent[i] for i in micro]) if micro else torch.zeros_like(z_2_BPE)
                loss = loss + coef * (z_2_BPE * gradient_BPE).sum()
            self._learner.backward(loss, last=number == len(own) - 1)
            first.append(logprob_C if micro else logprob_C[:0])
        if not own:
            self._zero_gradient()
        if self._step.needs.contrastive:
            sums["contrastive_loss"] = contrastive
            sums["loss"] = sums["loss"] + coef * contrastive
        if unchanged and first:
            by_row = gather_by_row(torch.cat(first), mini.micro, self._lengths)
            self._first = {i: by_row[i] for i in by_row if self._live[i]}
        totals = global_sum(torch.stack([value.double() for value in sums.values()]))
        metrics = dict(zip(sums, totals, strict=True))
        tokens = metrics.pop("policy_tokens", self._zero).clamp(min=1)
        for name in TOKEN_MEANS:
            if any(self._live[i] for i in rows):
                metrics[name] = metrics[name] / tokens
            else:
                metrics.pop(name, None)
        return metrics

    def _loss(self, model: CarftModel, *, rows: Rows, forward: Forward | None, **terms: Any) -> Loss:
        """`forward`: of these rows, where there is one already."""
        return self._passes.loss(model, forward or self._passes.forward(model, rows), **terms)

    def _has_signal(self, row: int) -> bool:
        """Whether a contrastive signal is about this rollout."""
        mode = self._config.contrastive.mode
        return mode == "both" or self._correct[row] == (mode == "positive")

    def _contrast(self, z_2_BPE: Tensor, rows: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """This process's part of the contrastive loss, and the whole loss's gradient with respect to its rows' z_2.

        Taken at once and carried on by the rows' own loss: no process waits for another inside a backward pass.
        """
        z_2_BPE.requires_grad_(True)
        loss = self._contrastive_loss(z_2_BPE, rows)
        (gradient,) = torch.autograd.grad(loss, z_2_BPE)
        return loss.detach(), dict(zip(rows, gradient, strict=True))

    def _contrastive_loss(self, z_2_BPE: Tensor, rows: Sequence[int]) -> Tensor:
        z_1_NE, common_NE = self._experience.z_1_NE, self._experience.common_NE
        assert z_1_NE is not None

        def pick(x_NE: Tensor) -> Tensor:
            return torch.stack([x_NE[i] for i in rows]) if rows else x_NE[:0]

        correct_B = torch.tensor([self._correct[i] for i in rows], dtype=torch.bool)
        if z_1_NE.is_cuda:
            correct_B = correct_B.pin_memory()
        targets = ContrastTargets(pick(z_1_NE), correct_B.to(z_1_NE.device, non_blocking=True))
        if common_NE is not None:
            parts = self._samples.rollouts.parts
            assert parts is not None
            has_BP = torch.stack([parts[i].any(1) for i in rows]) if rows else parts[0].new_zeros(0, 3)
            has_BP = has_BP & ~targets.correct_B[:, None]
            targets = targets._replace(
                common_BE=pick(common_NE), has_common_B=has_BP[:, 1], has_excluded_B=has_BP[:, 2]
            )
        return contrastive_loss(z_2_BPE, targets, self._config.contrastive)

    def _contrastive_cotangent(
        self, micros: Sequence[Sequence[int]], *, unchanged: bool
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """InfoNCE over a mini-batch that does not fit one forward: the loss and its gradient with respect to z_2.

        Every z_2 is found without gradient (for the step's first mini-batch the look has done it), the loss is
        differentiated down to them, and the micro-batches carry that gradient on: the result of the undivided
        mini-batch. Source: GradCache.
        """
        rows = [i for micro in own_turns(micros) for i in micro]
        known = self._experience.z_2_NPE
        if unchanged and known is not None:
            z_2_BPE = torch.stack([known[i] for i in rows]) if rows else known[:0].clone()
        else:
            with torch.no_grad():
                want = Want(embedding=True)
                looks, _ = self._step.own_looks(self._learner.model, self._samples.rollouts, micros, want)
                z_2_BPE = torch.cat([look.z_BPE for look in looks if look.z_BPE is not None])
        return self._contrast(z_2_BPE, rows)

    def _zero_gradient(self) -> None:
        """A mini-batch without any live rollout: the optimizer still decays its moments, as with a gradient of 0."""
        for parameter in self._learner.model.lm.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def agreement(self) -> dict[str, float]:
        """How far the first forwards are from old or reference log-probs, and the trainer from the sampler."""
        values: dict[str, float] = {}
        rows = sorted(self._first)
        old = self._targets[1]
        if rows and old is not None:
            difference_C = torch.cat([self._first[i] for i in rows]) - torch.cat([old[i] for i in rows])
            values["first_ratio_error"] = float(difference_C.expm1().abs().max())
        if rows and old is None and (ref := self._targets[3]) is not None:
            difference_C = torch.cat([self._first[i] for i in rows]) - torch.cat([ref[i] for i in rows])
            values["kl"] = float(difference_C.mean())
        sampled_C, trainer_C = self._samples.sampled_logprob_C, self._experience.support_logprob_C
        if trainer_C is None and rows:
            trainer_C = torch.cat([self._first[i] for i in rows])
            sampled = sampled_C.split(self._lengths)
            sampled_C = torch.cat([sampled[i] for i in rows])
        if trainer_C is not None:
            found = Mismatch.of(trainer_C, sampled_C)
            values |= {
                "sampler_diff_mean": found.mean,
                "sampler_diff_max": found.max,
                "sampler_diff_material": found.material,
            }
        return values
