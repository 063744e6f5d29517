"""From terminal scores to per-token advantages and returns. Pure. C: completion tokens, B: rollouts."""

from typing import NamedTuple

from torch import Tensor

from carft_fast.config import RlConfig
from carft_kernels import gae, kl_shaped_reward, whiten


class Advantages(NamedTuple):
    advantage_C: Tensor
    return_C: Tensor | None
    """Targets of the value head; None where there is none."""
    raw_advantage_C: Tensor
    """Before whitening."""


def ppo_advantages(
    score_B: Tensor,
    old_logprob_C: Tensor | None,
    ref_logprob_C: Tensor | None,
    old_value_C: Tensor,
    completion_cu: Tensor,
    config: RlConfig,
) -> Advantages:
    """KL-shaped token reward, GAE (value after the last token 0), whitening over all completion tokens of the step.

    The score falls on each rollout's last completion token, truncated or not. return = advantage + old value, from
    the advantage before whitening. The log-probs are needed where kl_coef is above 0. Source: paper section 3.2, ReFT.
    """
    if config.kl_coef == 0:
        old_logprob_C = ref_logprob_C = old_value_C
    assert old_logprob_C is not None
    assert ref_logprob_C is not None
    reward_C = kl_shaped_reward(score_B, old_logprob_C, ref_logprob_C, completion_cu, kl_coef=config.kl_coef)
    raw_C, return_C = gae(reward_C, old_value_C, completion_cu, gamma=config.gamma, lam=config.lam)
    advantage_C = whiten(raw_C, eps=config.whiten_eps) if config.whiten_advantages else raw_C
    return Advantages(advantage_C, return_C, raw_C)


def group_advantages(
    score_B: Tensor, completion_cu: Tensor, completion_tokens: int, *, samples_per_prompt: int, std_eps: float | None
) -> Advantages:
    """Score against the other samples of the question, the same for every token of a rollout.

    `std_eps` None: score - mean (Dr.GRPO, Liu et al. 2025). Else (score - mean) / (standard deviation + std_eps), the
    unbiased deviation (GRPO, Shao et al. 2024). A group's samples stand side by side.
    """
    group_GK = score_B.view(-1, samples_per_prompt)
    advantage_GK = group_GK - group_GK.mean(1, keepdim=True)
    if std_eps is not None:
        advantage_GK = advantage_GK / (group_GK.std(1, keepdim=True) + std_eps)
    # samples of one score: their mean may be off by a rounding, and they have no advantage
    advantage_GK = advantage_GK.masked_fill((group_GK == group_GK[:, :1]).all(1, keepdim=True), 0.0)
    advantage_C = advantage_GK.flatten().repeat_interleave(completion_cu.diff(), output_size=completion_tokens)
    return Advantages(advantage_C, None, advantage_C)
