"""What travels through a step: the sequences, what a method needs of them, what was found without gradient.

N rollouts of a step, C completion tokens, E embedding size, P parts of a completion that are embedded: the whole, and
for the negative signal what it has in common with the annotated CoT and what it has beyond, for "answer" the token
before the answer phrase.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from carft_fast.config import Config
from carft_fast.objective import Forward, Rows


@dataclass(frozen=True, slots=True)
class Samples:
    """The sequences of a step in rollout order, each one's annotated CoT, and the sampler's log-probs [C]."""

    rollouts: Rows
    annotated: Rows
    sampled_logprob_C: Tensor
    left_out: frozenset[int] = frozenset()
    """Rollouts that no term of the loss reads: `rl.mask_truncated`."""


class MiniBatch(NamedTuple):
    """One optimizer step: its rollouts, and how those that need a forward are cut into micro-batches."""

    rows: list[int]
    micro: list[list[int]]
    """Processes take them in turn and have as many each; then some may be empty."""


Plan = list[list[MiniBatch]]
"""Mini-batches of every PPO epoch."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a method reads. The rest is not computed."""

    value: bool
    embedding: bool
    """z_1 and z_2: for the contrastive term or the partial reward."""
    contrastive: bool
    negative: bool
    """The tokens that rollouts and annotated CoTs have in common, and their embeddings."""
    answer: bool
    """The tokens before the answer phrases, and their embeddings."""
    old: bool
    """Old log-probs by a forward of their own."""
    reference: bool

    @classmethod
    def of(cls, config: Config) -> "Needs":
        rl, rollout = config.rl, config.rollout
        contrastive = config.contrastive.mode != "none" and config.contrastive.coef > 0
        one_update = rl.ppo_epochs == 1 and rl.mini_batch_size == rl.batch_size
        corrected = rollout.correction != "none" or rollout.sequence_mask != "none"
        compared = rl.kl_coef > 0 or corrected or rollout.top_p < 1 or rollout.top_k > 0
        return cls(
            value=rl.estimator == "gae",
            embedding=contrastive or config.reward.partial == "embedding",
            contrastive=contrastive,
            negative=contrastive and config.contrastive.mode in ("negative", "both"),
            answer=contrastive and config.contrastive.mode == "answer",
            old=rl.old_logprobs == "recompute" and (compared or not one_update),
            reference=rl.kl_coef > 0 or rl.kl_loss_coef > 0,
        )


class Experience(NamedTuple):
    """A step's samples and what the forwards without gradient found, in rollout order. What the method does not read is
    None."""

    samples: Samples
    plan: Plan
    """The update's mini-batches, with every rollout in a micro-batch."""
    completion_cu: Tensor
    """int64 [N + 1], offsets of the completions."""
    old_logprob_C: Tensor | None
    support_logprob_C: Tensor | None
    """The trainer's own log-probs on the support the sampler drew from; without top-p and top-k its plain ones."""
    ref_logprob_C: Tensor | None
    old_value_C: Tensor | None
    z_1: Tensor | None
    """[N, E]: of the annotated CoTs."""
    common: Tensor | None
    """[N, E]: of the annotated tokens that a rollout has in common with its annotated CoT; with contrastive.mode
    "answer" of the annotated token before the answer phrase."""
    z_2: Tensor | None
    """[N, P, E]: of the rollouts."""
    first: tuple[MiniBatch, Forward] | None = None
    """The first mini-batch's forward with its graph, for one backward: its update needs no forward of its own."""

    @property
    def completion_tokens(self) -> int:
        return sum(self.samples.rollouts.lengths)

    @property
    def cosine_N(self) -> Tensor | None:
        if self.z_1 is None or self.z_2 is None:
            return None
        return torch.cosine_similarity(self.z_1, self.z_2[:, 0])


class Update(NamedTuple):
    metrics: dict[str, float]
    """Means over the optimizer steps; `skipped_updates` is their number that was left out."""
    skipped_rows: list[int]
    """Rollouts of the optimizer steps that were left out."""
