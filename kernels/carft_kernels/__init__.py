"""Operators for reinforced and contrastive fine-tuning of language models; depends on torch and triton alone."""

from carft_kernels._runtime import set_index_checks
from carft_kernels.cpu_linear import cpu_linear
from carft_kernels.gae import gae, kl_shaped_reward, whiten
from carft_kernels.lcs import lcs_mask
from carft_kernels.linear_logprob import linear_logprob
from carft_kernels.linear_policy_loss import linear_policy_loss
from carft_kernels.masked_infonce import masked_infonce
from carft_kernels.policy_loss import policy_loss, value_loss
from carft_kernels.token_logprob import token_logprob
from carft_kernels.value_pool import value_pool

__all__ = [
    "cpu_linear",
    "gae",
    "kl_shaped_reward",
    "lcs_mask",
    "linear_logprob",
    "linear_policy_loss",
    "masked_infonce",
    "policy_loss",
    "set_index_checks",
    "token_logprob",
    "value_loss",
    "value_pool",
    "whiten",
]
