"""The gradient of a mini-batch, accumulated over its micro-batches and over all processes.

B rollouts of a micro-batch, C their completion tokens, E embedding size, P parts of a completion that are embedded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from carft_fast.config import Config
from carft_fast.core import gather_by_row, global_sum, own_turns, to_device, world_size
from carft_fast.objective import (
    Advantages,
    ContrastTargets,
    Loss,
    Normaliser,
    Passes,
    RolloutTargets,
    Want,
    contrastive_loss,
    correction_weights,
    sequence_mask,
    tokens_of,
)
from carft_fast.training.agreement import Mismatch, effective_sample_share
from carft_fast.training.batch import Experience, MiniBatch, Needs
from carft_fast.training.parallel import Learner

# Means over the completion tokens, those that correction leaves out too.
TOKEN_MEANS = ("clip_fraction", "approx_kl", "entropy")


class Gradient:
    """Of one step's mini-batches."""

    def __init__(
        self,
        config: Config,
        learner: Learner,
        passes: Passes,
        experience: Experience,
        advantages: Advantages,
        correct: Sequence[bool],
        live: Sequence[bool],
    ) -> None:
        """`live`: which rollouts have a gradient."""
        self._config, self._learner, self._passes, self._experience = config, learner, passes, experience
        self._correct, self._live = correct, live
        self._rollouts = experience.samples.rollouts
        self._lengths = self._rollouts.lengths
        self._has_contrast = Needs.of(config).contrastive
        correction_C = None
        if experience.support_logprob_C is not None:
            sampled_logprob_C = experience.samples.sampled_logprob_C
            correction_C = correction_weights(
                experience.support_logprob_C, sampled_logprob_C, experience.completion_cu, config.rollout
            )
        self._targets = RolloutTargets(
            advantages.advantage_C,
            experience.old_logprob_C,
            correction_C,
            experience.ref_logprob_C,
            experience.old_value_C,
            advantages.return_C,
        )
        self._first_logprobs: dict[int, Tensor] = {}
        """Of the first mini-batch's rollouts with a gradient, by its own forward."""
        self._zero = torch.zeros((), device=learner.model.device)

    def accumulate(self, mini: MiniBatch, *, first: bool) -> dict[str, Tensor]:
        """Gradient of one mini-batch; returns its metrics, those of all processes.

        `first`: of the step, so that the weights are those the experience was found with.
        """
        config, lengths, coef = self._config, self._lengths, self._config.contrastive.coef
        rows = [i for micro in mini.micro for i in micro]
        counted = [i for i in mini.rows if i not in self._experience.samples.left_out]
        # at least 1: a process without rows computes one that counts for nothing
        tokens = max(1, sum(lengths[i] for i in counted))
        normaliser = Normaliser(max(1, len(counted)), tokens, config.rollout.max_new_tokens)
        own = own_turns(mini.micro)
        kept, forward = self._experience.first or (None, None)
        forward = forward if first and kept == mini else None
        sums: dict[str, Tensor] = {"loss": self._zero, "policy_loss": self._zero}
        contrastive, z_2_gradient = self._zero, None
        contrast = self._has_contrast and any(map(self._has_signal, rows))
        if contrast and len(own) > 1:
            contrastive, z_2_gradient = self._contrast_of_all(mini.micro, first=first)
        logprobs = []
        for number, micro in enumerate(own):
            # a process without rows takes part with one that counts for nothing
            picked = micro or [self._rollouts.shortest]
            found: Loss = self._learner.model(
                self._passes.loss,
                self._rollouts.pick(picked),
                self._targets.of_rows(picked, lengths),
                normaliser,
                [self._live[i] or not micro for i in picked],
                embedding=contrast,
                forward=forward,
            )
            share, loss = (1.0, found.loss) if micro else (0.0, 0.0 * found.loss)
            metrics = found.metrics | {"loss": found.loss.detach()}
            if "value_clip_fraction" in metrics:
                metrics["value_clip_fraction"] *= sum(lengths[i] for i in picked) / normaliser.tokens
            metrics |= {name: metrics["policy_tokens"] * metrics[name] for name in TOKEN_MEANS}
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0) + share * value
            if found.z is not None:
                z_2 = found.z
                if z_2_gradient is None:
                    contrastive, z_2_gradient = self._contrast(z_2.detach()[: len(micro)], mini.micro)
                of_rows = torch.stack([z_2_gradient[i] for i in micro]) if micro else torch.zeros_like(z_2)
                loss = loss + coef * (z_2 * of_rows).sum()
            self._learner.backward(loss, last=number == len(own) - 1)
            logprobs.append(found.logprob_C if micro else found.logprob_C[:0])
        if not own:
            self._zero_gradient()
        if self._has_contrast:
            sums["contrastive_loss"] = contrastive
            sums["loss"] = sums["loss"] + coef * contrastive
        if first and logprobs:
            by_row = gather_by_row(torch.cat(logprobs), mini.micro, lengths)
            self._first_logprobs = {i: by_row[i] for i in by_row if self._live[i]}
        return self._over_all_processes(sums, any_live=any(self._live[i] for i in rows))

    def _over_all_processes(self, sums: dict[str, Tensor], *, any_live: bool) -> dict[str, Tensor]:
        totals = global_sum(torch.stack([value.double() for value in sums.values()]))
        metrics = dict(zip(sums, totals, strict=True))
        tokens = metrics.pop("policy_tokens", self._zero).clamp(min=1)
        for name in TOKEN_MEANS:
            if any_live:
                metrics[name] = metrics[name] / tokens
            else:
                metrics.pop(name, None)
        return metrics

    def _has_signal(self, row: int) -> bool:
        """Whether a contrastive signal is about this rollout."""
        mode = self._config.contrastive.mode
        return mode == "both" or self._correct[row] == (mode != "negative")

    def _contrast_of_all(self, micros: Sequence[Sequence[int]], *, first: bool) -> tuple[Tensor, dict[int, Tensor]]:
        """`_contrast` over a mini-batch that does not fit one forward.

        Every z_2 is found without gradient (for the step's first mini-batch the experience has it), the loss is
        differentiated down to them, and the micro-batches carry that gradient on: the result of the undivided
        mini-batch. Source: GradCache, Gao et al. 2021.
        """
        rows = [i for micro in own_turns(micros) for i in micro]
        known = self._experience.z_2
        if first and known is not None:
            z_2 = torch.stack([known[i] for i in rows]) if rows else known[:0].clone()
            return self._contrast(z_2, micros)
        found = []
        with torch.no_grad():
            for micro in own_turns(micros):
                picked = self._rollouts.pick_or_shortest(micro)
                outputs, _ = self._learner.model(self._passes.outputs, picked, Want(embedding=True))
                found.append(outputs.z[: len(micro)])
        return self._contrast(torch.cat(found), micros)

    def _contrast(self, z_2: Tensor, micros: Sequence[Sequence[int]]) -> tuple[Tensor, dict[int, Tensor]]:
        """This process's part of the contrastive loss, and the whole loss's gradient with respect to its rows' z_2.

        `micros` are those of all processes; `z_2` has the rows of this one's, in their order. The gradient is taken at
        once and carried on by the rows' own loss: no process waits for another inside a backward pass.
        """
        z_2.requires_grad_(True)
        rows = [i for micro in own_turns(micros) for i in micro]
        counts = [sum(map(len, micros[r :: world_size()])) for r in range(world_size())]
        targets = self._contrast_targets(rows)._replace(counts=counts)
        loss = contrastive_loss(z_2, targets, self._config.contrastive)
        (gradient,) = torch.autograd.grad(loss, z_2)
        return loss.detach(), dict(zip(rows, gradient, strict=True))

    def _contrast_targets(self, rows: Sequence[int]) -> ContrastTargets:
        z_1, common = self._experience.z_1, self._experience.common
        assert z_1 is not None

        def pick(x: Tensor) -> Tensor:
            return torch.stack([x[i] for i in rows]) if rows else x[:0]

        correct_B = to_device([self._correct[i] for i in rows], torch.bool, z_1.device)
        if common is None:
            return ContrastTargets(pick(z_1), correct_B)
        parts = self._rollouts.parts
        assert parts is not None
        has_BP = torch.stack([parts[i].any(1) for i in rows]) if rows else parts[0].new_zeros(0, len(parts[0]))
        if self._config.contrastive.mode == "answer":
            return ContrastTargets(pick(common), correct_B & has_BP[:, 1], candidate_B=has_BP[:, 1])
        has_BP = has_BP & ~correct_B[:, None]
        return ContrastTargets(pick(z_1), correct_B, pick(common), has_BP[:, 1], has_BP[:, 2])

    def _zero_gradient(self) -> None:
        """A mini-batch without a rollout that has a gradient: the optimizer still decays its moments, as with 0."""
        for parameter in self._learner.model.lm.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def agreement(self) -> dict[str, float]:
        """How far the first forwards are from old or reference log-probs, and the trainer from the sampler."""
        values: dict[str, float] = {}
        rows, lengths = sorted(self._first_logprobs), self._lengths
        first_C = torch.cat([self._first_logprobs[i] for i in rows]) if rows else None
        old_C, ref_C = self._experience.old_logprob_C, self._experience.ref_logprob_C
        if first_C is not None and old_C is not None:
            values["first_ratio_error"] = float((first_C - tokens_of(old_C, rows, lengths)).expm1().abs().max())
        elif first_C is not None and ref_C is not None:
            values["kl"] = float((first_C - tokens_of(ref_C, rows, lengths)).mean())
        trainer_C, sampled_C = self._experience.support_logprob_C, self._experience.samples.sampled_logprob_C
        if trainer_C is None and first_C is not None:
            trainer_C, sampled_C = first_C, tokens_of(sampled_C, rows, lengths)
        if trainer_C is not None:
            found = Mismatch.of(trainer_C, sampled_C)
            values |= {
                "sampler_diff_mean": found.mean,
                "sampler_diff_max": found.max,
                "sampler_diff_material": found.material,
                "sampler_ess": effective_sample_share(trainer_C, sampled_C),
            }
        if self._config.rollout.sequence_mask != "none" and trainer_C is not None:
            kept_N = sequence_mask(trainer_C - sampled_C, self._experience.completion_cu, self._config.rollout)
            values["sequence_masked"] = float((kept_N == 0).float().mean())
        return values
