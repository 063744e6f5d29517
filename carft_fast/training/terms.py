"""What each term of the loss does to the language model: its gradient's norm, and its cosine with the policy term's."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from carft_fast.config import Config
from carft_fast.core import global_sum
from carft_fast.objective import Advantages, build_passes
from carft_fast.training.batch import Experience, MiniBatch, Needs
from carft_fast.training.gradient import Gradient
from carft_fast.training.parallel import Learner

COEFFICIENTS = {"value": ("rl", "value_coef"), "kl": ("rl", "kl_loss_coef"), "contrastive": ("contrastive", "coef")}
"""Of the terms beside the policy's, which has none: without it the advantages are 0."""


def only(config: Config, term: str) -> Config:
    """The config with the other terms' coefficients at 0."""
    zeros: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for name, (section, key) in COEFFICIENTS.items():
        if name != term:
            zeros[section][key] = 0.0
    return config.model_copy(update={name: getattr(config, name).model_copy(update=of) for name, of in zeros.items()})


class GradientTerms:
    """Of one step (`rl.gradient_terms`): the gradients of the terms, each weighted as in the loss, so that they add up
    to the loss's own. The KL in the reward (`rl.kl_coef`) is a part of the policy term.

    Of the step's first mini-batch alone, at the weights that sampled it: no ratio is clipped there. Every term takes a
    forward and a backward of its own, and one more gradient is kept in memory. Weights, moments and the update stay as
    they are.
    """

    def __init__(
        self,
        config: Config,
        learner: Learner,
        experience: Experience,
        advantages: Advantages,
        correct: Sequence[bool],
        live: Sequence[bool],
    ) -> None:
        """`live`: which rollouts have a gradient."""
        self._learner = learner
        self._parameters = [p for p in learner.model.lm.parameters() if p.requires_grad]
        needs, rl = Needs.of(config), config.rl
        terms = {
            "policy": True,
            "value": needs.value and rl.value_coef > 0,
            "kl": rl.kl_loss_coef > 0,
            "contrastive": needs.contrastive,
        }
        without = advantages._replace(advantage_C=torch.zeros_like(advantages.advantage_C))
        self._terms: dict[str, Gradient] = {}
        for name in (name for name, present in terms.items() if present):
            alone = only(config, name)
            passes = build_passes(alone, learner.model, rl.micro_batch_tokens, share_prompts=config.shares_prompts)
            of = advantages if name == "policy" else without
            self._terms[name] = Gradient(alone, learner, passes, experience, of, correct, live)

    def gradients(self, mini: MiniBatch) -> Iterator[tuple[str, list[Tensor | None]]]:
        """Each term and its gradient of every trained parameter of the language model; of divided ones this process's
        part. `mini` is the step's first."""
        for name, term in self._terms.items():
            term.accumulate(mini, first=True)
            yield name, [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in self._parameters]
            self._learner.optimizer.zero_grad(set_to_none=True)

    def metrics(self, mini: MiniBatch) -> dict[str, float]:
        """Each term's norm, and its cosine with the policy term's where neither is 0. Waits for the device."""
        policy: list[Tensor | None] = []
        values: dict[str, float] = {}
        for name, gradient in self.gradients(mini):
            policy = policy or gradient
            dots = torch.stack([_dot(gradient, gradient), _dot(gradient, policy)])
            square, product = (global_sum(dots) if self._learner.model.divided else dots).tolist()
            norm = values[f"grad_norm_{name}"] = math.sqrt(square)
            if name != "policy" and (norms := norm * values["grad_norm_policy"]) > 0:
                values[f"grad_cosine_{name}"] = product / norms
        return values


def _dot(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> Tensor:
    """float64, of gradients laid end to end; None is 0."""
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    return torch.stack([torch.dot(a.flatten(), b.flatten()).double() for a, b in pairs]).sum()
