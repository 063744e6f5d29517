"""A step's forwards and its update: what to compute, in which micro-batches, and nothing that the method does not read.

Between the first forward and the last optimizer step the host reads two things back from the device: the advantages,
once, where rollouts without one are left out, and in `linear_policy_loss` the number of tokens with a gradient.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from carft_fast.config import Config
from carft_fast.core import chunks, derive_seed, own_turns, permutation, to_device, world_size
from carft_fast.models import CarftModel
from carft_fast.objective import (
    Advantages,
    Annotated,
    Forward,
    Outputs,
    Rows,
    Want,
    build_passes,
    gathered,
    mark_common,
)
from carft_fast.training.batch import Experience, MiniBatch, Needs, Plan, Samples, Update
from carft_fast.training.gradient import Gradient
from carft_fast.training.parallel import Learner
from carft_fast.training.reference import Reference
from carft_fast.training.terms import GradientTerms


class Step:
    """What a step does with its rollouts but grading them: `make_experience` without gradient, then `update`."""

    def __init__(self, config: Config, learner: Learner, reference: Reference | None) -> None:
        """`reference` may be absent where `Needs.of(config).reference` is False."""
        self._config, self._learner, self._reference = config, learner, reference
        self._policy, self._device = learner.model, learner.model.device
        self.needs = Needs.of(config)
        assert reference is not None or not self.needs.reference
        self._padded = config.model.impl == "padded"
        # a rollout without advantage trains nothing where there is no value loss, contrastive or KL term
        self._may_drop = not (self.needs.value or self.needs.contrastive or config.rl.kl_loss_coef)
        no_graph = self._padded or self._may_drop or config.rl.mask_truncated or config.rl.gradient_terms
        self._keeps_first = learner.keeps_graphs and not no_graph
        self._passes = build_passes(
            config, self._policy, config.rl.micro_batch_tokens, share_prompts=config.shares_prompts
        )

    @torch.no_grad()
    def make_experience(self, samples: Samples, seed: int) -> Experience:
        """One pass of policy and reference over the rollouts, one of the policy over the annotated CoTs, as needed.

        Micro-batches are those of the first PPO epoch, so its forward repeats this one bit for bit and the ratio starts
        at exactly 1. Where the first mini-batch is one micro-batch, this is its forward: the graph stays, in no more
        memory than a micro-batch is given.
        """
        needs = self.needs
        if needs.negative:
            rollouts, annotated = mark_common(samples.rollouts, samples.annotated, self._device)
            samples = replace(samples, rollouts=rollouts, annotated=annotated)
        rollouts = samples.rollouts
        plan = self._plan(rollouts, seed)
        micros = [micro for mini in plan[0] for micro in mini.micro]
        policy = reference = Outputs()
        z_1 = common = first = None
        if needs.reference:
            assert self._reference is not None
            with self._reference.model() as model:
                reference = gathered(self._outputs(model, rollouts, micros, Want(logprob=True)), rollouts, micros)
        if any(want := Want(needs.old, needs.value, needs.embedding)):
            keep = self._keeps_first and len(own_turns(plan[0][0].micro)) == 1
            policy, z_1, common, first = self._policy_outputs(samples, micros, want, keep_first=keep)
        sampled = self._config.rl.old_logprobs == "sampled"
        return Experience(
            samples,
            plan,
            to_device([0, *itertools.accumulate(rollouts.lengths)], torch.int64, self._device),
            samples.sampled_logprob_C if sampled else policy.logprob_C,
            policy.support_logprob_C,
            reference.logprob_C,
            policy.value_C,
            z_1,
            common,
            policy.z,
            (plan[0][0], first) if first else None,
        )

    def _plan(self, rollouts: Rows, seed: int) -> Plan:
        """Random mini-batches of every PPO epoch. How they are cut into micro-batches changes no sum."""
        rl = self._config.rl
        return [
            [
                MiniBatch(rows, self._micro_batches(rollouts, rows))
                for rows in chunks(permutation(len(rollouts.prompts), derive_seed(seed, epoch)), rl.mini_batch_size)
            ]
            for epoch in range(rl.ppo_epochs)
        ]

    def _micro_batches(self, rollouts: Rows, rows: Sequence[int]) -> list[list[int]]:
        micro = self._passes.micro_batches(rollouts.pick(rows), world_size())
        return [[rows[i] for i in batch] for batch in micro]

    def _outputs(self, model: CarftModel, rows: Rows, micros: Sequence[Sequence[int]], want: Want) -> list[Outputs]:
        """Of this process's micro-batches; an empty one gives empty outputs."""
        found = []
        for micro in own_turns(micros):
            outputs, _ = model(self._passes.outputs, rows.pick_or_shortest(micro), want)
            found.append(outputs if micro else outputs.of_no_rows())
        return found

    def _policy_outputs(
        self, samples: Samples, micros: Sequence[Sequence[int]], want: Want, *, keep_first: bool
    ) -> tuple[Outputs, Tensor | None, Tensor | None, Forward | None]:
        """Of all rollouts; z_1 and the common tokens' z where embeddings are wanted; with `keep_first` this process's
        first forward, with its graph.

        Annotated CoTs follow the micro-batches whose prompts they have, and start from those prompts' states; where the
        attention cannot, or prompts end with a part of the annotation, they go through the model by themselves.
        """
        passes, policy, rollouts = self._passes, self._policy, samples.rollouts
        annotated = Annotated(samples.annotated) if want.embedding else None
        reuse = annotated is not None and passes.reuses_prompts and rollouts.prefix_lengths is None
        turns = annotated.micro_batches_after(micros, passes) if annotated and reuse else []
        own: list[Outputs] = []
        own_annotated: list[Outputs] = []
        first = None
        for turn, micro in enumerate(own_turns(micros)):
            keep = keep_first and turn == 0
            picked = rollouts.pick_or_shortest(micro)
            outputs, forward = policy(passes.outputs, picked, want, keep_graph=keep, keep_prompts=reuse)
            own.append(outputs if micro else outputs.of_no_rows())
            first = forward if keep else first
            if annotated and reuse:
                for cots in own_turns(turns[turn]):
                    picked = annotated.rows.pick(cots or [annotated.one_of(forward.prompts)])
                    outputs, _ = policy(passes.outputs, picked, Want(embedding=True), after=forward.prompts)
                    own_annotated.append(outputs if cots else outputs.of_no_rows())
                forward.prompts.close()
        found = gathered(own, rollouts, micros)
        if annotated is None:
            return found, None, None, first
        if not reuse:
            turns = [passes.micro_batches(annotated.rows, world_size())]
            own_annotated = self._outputs(policy, annotated.rows, turns[0], Want(embedding=True))
        return found, *annotated.embeddings(own_annotated, [micro for turn in turns for micro in turn]), first

    def update(self, experience: Experience, advantages: Advantages, correct: Sequence[bool], lr: float) -> Update:
        """The PPO epochs. An optimizer step whose loss or gradient is not finite is left out."""
        plan, live = self.plan_update(experience, advantages)
        gradient = Gradient(self._config, self._learner, self._passes, experience, advantages, correct, live)
        found: dict[str, list[Tensor]] = {}
        skipped: list[Tensor] = []
        minis = [mini for epoch in plan for mini in epoch]
        of_terms: dict[str, float] = {}
        if self._config.rl.gradient_terms:
            terms = GradientTerms(self._config, self._learner, experience, advantages, correct, live)
            of_terms = terms.metrics(minis[0])
        for mini in minis:
            metrics = gradient.accumulate(mini, first=mini is minis[0])
            norm, left_out = self._learner.step(lr, self._config.rl.max_grad_norm, metrics["loss"])
            skipped.append(left_out)
            for name, value in (metrics | {"grad_norm": norm}).items():
                found.setdefault(name, []).append(value)
        means = [torch.stack(values).double().mean() for values in found.values()]
        numbers: list[float] = torch.stack([*means, *(x.double() for x in skipped)]).tolist()
        left_out_minis = [mini for mini, flag in zip(minis, numbers[len(found) :], strict=True) if flag]
        result = dict(zip(found, numbers, strict=False)) | {"skipped_updates": len(left_out_minis)}
        result |= gradient.agreement() | of_terms
        return Update(result, sorted({i for mini in left_out_minis for i in mini.rows}))

    def plan_update(self, experience: Experience, advantages: Advantages) -> tuple[Plan, list[bool]]:
        """The mini-batches, and which rollouts have a gradient. The others are in no micro-batch of the fast path, and
        count in their mini-batch. Those that are left out are in no micro-batch of any path, and do not count. Reads
        the advantages back, once, where some may have none.

        In a group whose samples all scored the same nothing is learned from any.
        """
        rollouts, left_out = experience.samples.rollouts, experience.samples.left_out
        live = [i not in left_out for i in range(len(rollouts.prompts))]
        computed = live
        if self._may_drop:
            by_row = advantages.advantage_C.cpu().split(rollouts.lengths)
            live = [bool(a.any()) and counted for a, counted in zip(by_row, live, strict=True)]
            computed = computed if self._padded else live
        if all(computed):
            return experience.plan, live

        def without(mini: MiniBatch) -> MiniBatch:
            return MiniBatch(mini.rows, self._micro_batches(rollouts, [i for i in mini.rows if computed[i]]))

        return [[without(mini) for mini in epoch] for epoch in experience.plan], live
