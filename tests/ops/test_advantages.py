"""Shaped rewards, GAE and whitening against their references in float64; whitening over several processes."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import carft_kernels as ck
from carft_kernels.gae import gae_reference, kl_shaped_reward_reference, whiten_reference
from tests.processes import spawn

from .checks import FAST, offsets_of, randn, seeds


@FAST
@given(
    seed=seeds,
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=7),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_rewards_and_advantages(seed: int, lengths: list[int], gamma: float, lam: float) -> None:
    tokens, cu = sum(lengths), offsets_of(lengths)
    score, old, ref = randn(seed, len(lengths)), randn(seed + 1, tokens), randn(seed + 2, tokens)
    reward = ck.kl_shaped_reward(score, old, ref, cu, kl_coef=0.3)
    torch.testing.assert_close(reward, kl_shaped_reward_reference(score, old, ref, cu, kl_coef=0.3))
    advantage, return_ = ck.gae(reward, old, cu, gamma=gamma, lam=lam)
    expected = gae_reference(reward, old, cu, gamma=gamma, lam=lam)
    torch.testing.assert_close((advantage, return_), expected)


def test_whiten() -> None:
    x, mask = randn(0, 50, scale=4.0) + 3, torch.arange(50) % 3 > 0
    whitened = ck.whiten(x, mask)
    torch.testing.assert_close(whitened, whiten_reference(x, mask))
    assert abs(float(whitened[mask].mean())) < 1e-12
    assert float(whitened[mask].var()) == pytest.approx(1, abs=1e-6)
    for few in (torch.zeros(0), torch.tensor([3.0]), torch.full((4,), 2.0)):
        assert not ck.whiten(few).any()  # zeros, not NaN
    assert not ck.whiten(x, torch.zeros(50, dtype=torch.bool)).any()


@pytest.mark.parametrize("eps", [1e-8, 0.5, 40.0])
def test_whiten_adds_eps_to_the_variance(eps: float) -> None:
    """Eps far below, about and above the variance; both dtypes of the torch path."""
    x, mask = randn(0, 50, scale=2.0) + 3, torch.arange(50) % 3 > 0
    expected = (x - x[mask].mean()) / (x[mask].var() + eps).sqrt() * mask
    torch.testing.assert_close(ck.whiten(x, mask, eps=eps), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whiten_reference(x, mask, eps=eps), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ck.whiten(x.float(), mask, eps=eps).double(), expected, rtol=1e-5, atol=1e-5)


def _whiten_on_rank(rank: int, x: Tensor, sizes: list[int], eps: float, port: int, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=len(sizes))
    results[rank] = ck.whiten(x.split(sizes)[rank], group=dist.group.WORLD, eps=eps).tolist()
    dist.destroy_process_group()


def test_whiten_over_ranks_of_unequal_size() -> None:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    x, sizes, eps = randn(0, 11), [7, 4, 0], 0.5
    with mp.Manager() as manager:
        results = manager.dict()
        spawn(_whiten_on_rank, (x, sizes, eps, port, results), len(sizes))
        together = [value for rank in range(len(sizes)) for value in results[rank]]
    torch.testing.assert_close(torch.tensor(together, dtype=torch.float64), whiten_reference(x, eps=eps))
