"""From terminal scores to per-token advantages and returns. Pure. C: completion tokens, B: rollouts."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from carft_fast.config import RlConfig
from carft_fast.core import to_device
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
    score_B: Tensor,
    completion_cu: Tensor,
    completion_tokens: int,
    *,
    samples_per_prompt: int | Sequence[int],
    std_eps: float | None,
    leave_one_out: bool = False,
) -> Advantages:
    """Score against the other samples of the question, the same for every token of a rollout.

    `std_eps` None: score - mean (Dr.GRPO, Liu et al. 2025). Else (score - mean) / (standard deviation + std_eps), the
    unbiased deviation (GRPO, Shao et al. 2024). `leave_one_out`: score - mean of the other samples (RLOO, Ahmadian et
    al. 2024). A group's samples stand side by side; `samples_per_prompt` may be each group's own, at least 1. A sample
    alone has no advantage.
    """
    sizes = samples_per_prompt
    if isinstance(sizes, int):
        group_GK, member_GK, count_G1 = score_B.view(-1, sizes), None, score_B.new_full((1, 1), sizes)
    else:
        group_GK = pad_sequence(score_B.split(list(sizes)), batch_first=True)
        count_G1 = to_device(sizes, torch.int64, score_B.device)[:, None]
        member_GK = torch.arange(group_GK.shape[1], device=score_B.device) < count_G1
    centred_GK = group_GK - group_GK.sum(1, keepdim=True) / count_G1
    same_GK = group_GK == group_GK[:, :1]
    if member_GK is not None:
        centred_GK, same_GK = centred_GK * member_GK, same_GK | ~member_GK
    others_G1 = (count_G1 - 1).clamp(min=1)
    advantage_GK = centred_GK * (count_G1 / others_G1) if leave_one_out else centred_GK
    if std_eps is not None:
        deviation_G1 = (centred_GK.square().sum(1, keepdim=True) / others_G1).sqrt()
        advantage_GK = advantage_GK / (deviation_G1 + std_eps)
    # samples of one score: their mean may be off by a rounding, and they have no advantage
    advantage_B = advantage_GK.masked_fill(same_GK.all(1, keepdim=True), 0.0).flatten()
    if not isinstance(sizes, int):
        places = [group * group_GK.shape[1] + k for group, size in enumerate(sizes) for k in range(size)]
        advantage_B = advantage_B[to_device(places, torch.int64, score_B.device)]
    advantage_C = advantage_B.repeat_interleave(completion_cu.diff(), output_size=completion_tokens)
    return Advantages(advantage_C, None, advantage_C)
