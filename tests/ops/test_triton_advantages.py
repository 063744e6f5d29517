"""Triton kernels of shaped rewards, GAE and whitening against their references in float64."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import carft_kernels as ck
from carft_kernels.gae import gae_reference, kl_shaped_reward_reference, whiten_reference

from .checks import DEVICE, DTYPES, FEW, offsets, randn, seeds


@FEW
@given(
    seed=seeds,
    lengths=st.lists(st.integers(0, 12) | st.sampled_from([512, 1100]), min_size=1, max_size=5),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_rewards_and_advantages(seed: int, lengths: list[int], gamma: float, lam: float, dtype: torch.dtype) -> None:
    tokens, cu = sum(lengths), offsets(lengths)
    score, old, ref = (randn(seed + i, n).to(dtype).to(DEVICE) for i, n in enumerate((len(lengths), tokens, tokens)))
    reward = ck.kl_shaped_reward(score, old, ref, cu, kl_coef=0.3, impl="triton")
    expected = kl_shaped_reward_reference(score.double(), old.double(), ref.double(), cu, kl_coef=0.3)
    torch.testing.assert_close(reward.double(), expected, rtol=1e-5, atol=1e-6)
    results = ck.gae(reward, old, cu, gamma=gamma, lam=lam, impl="triton")
    for ours, theirs in zip(
        results, gae_reference(reward.double(), old.double(), cu, gamma=gamma, lam=lam), strict=True
    ):
        assert ours.dtype == torch.float32
        assert tokens == 0 or (ours.double() - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)


@FEW
@given(
    seed=seeds,
    tokens=st.integers(2, 60) | st.sampled_from([2048, 4500]),
    masked=st.booleans(),
    eps=st.sampled_from([1e-8, 0.5, 40.0]),
)
def test_whiten(seed: int, tokens: int, masked: bool, eps: float) -> None:
    x = randn(seed, tokens, scale=4).float().to(DEVICE) + 3
    mask = torch.arange(tokens, device=DEVICE) % 3 < 2 if masked else None
    ours = ck.whiten(x, mask, eps=eps, impl="triton")
    torch.testing.assert_close(ours.double(), whiten_reference(x.double(), mask, eps=eps), rtol=1e-5, atol=1e-5)
    few = torch.full((4,), 2.0, device=DEVICE)
    assert not ck.whiten(few, impl="triton").any()
    assert not ck.whiten(x[:0], impl="triton").any()
