"""From terminal scores to per-token advantages and returns. Pure. C: completion tokens, B: rollouts."""

from typing import NamedTuple

from torch import Tensor

from carft_fast.config import RlConfig
from carft_kernels import gae, kl_shaped_reward, whiten


class Advantages(NamedTuple):
    advantage_C: Tensor
    return_C: Tensor
    raw_advantage_C: Tensor
    """Before whitening."""


def ppo_advantages(
    score_B: Tensor,
    old_logprob_C: Tensor,
    ref_logprob_C: Tensor,
    old_value_C: Tensor,
    completion_cu: Tensor,
    config: RlConfig,
) -> Advantages:
    """KL-shaped token reward, GAE (value after the last token 0), whitening over all completion tokens of the step.

    The score falls on each rollout's last completion token, truncated or not. return = advantage + old value, from
    the advantage before whitening. Source: paper section 3.2, ReFT.
    """
    reward_C = kl_shaped_reward(score_B, old_logprob_C, ref_logprob_C, completion_cu, kl_coef=config.kl_coef)
    raw_C, return_C = gae(reward_C, old_value_C, completion_cu, gamma=config.gamma, lam=config.lam)
    return Advantages(whiten(raw_C) if config.whiten_advantages else raw_C, return_C, raw_C)
