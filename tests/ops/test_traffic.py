"""Memory traffic and FLOP of the kernels, counted access by access in Triton's interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import carft_kernels as ck
from carft_kernels._runtime import INTERPRETED
from carft_kernels.value_pool import backward_splits

from .checks import offsets, randint, randn

if not INTERPRETED:
    pytest.skip("counts what the interpreter does; on a GPU a profiler counts", allow_module_level=True)

from .interpreter import Traffic, count_traffic

VOCABULARY = 20_011  # odd: rows start at every alignment


def check(traffic: Traffic, loaded: int, stored: int) -> None:
    """Distinct bytes at most 1.02 of the floor, requested at most 1.05."""
    floor = loaded + stored
    distinct = traffic.distinct("load") + traffic.distinct("store")
    requested = traffic.loaded + traffic.stored
    assert floor <= distinct <= 1.02 * floor, distinct / floor
    assert floor <= requested <= 1.05 * floor, requested / floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_each_logit_is_read_once_forward_and_read_and_written_once_backward(dtype: torch.dtype, inplace: bool) -> None:
    logits = randn(0, 4, VOCABULARY).to(dtype).requires_grad_()
    size = logits.numel() * dtype.itemsize
    copy = logits * 1
    with count_traffic() as forward:
        logprob, entropy = ck.token_logprob(
            copy, randint(1, VOCABULARY, 4), with_entropy=True, inplace_backward=inplace, impl="triton"
        )
    check(forward, size, 0)
    assert entropy is not None
    with count_traffic() as backward:
        (logprob.sum() + entropy.sum()).backward()
    check(backward, size, size)


@pytest.mark.parametrize(("dtype", "row_kernels"), [(torch.float32, 8), (torch.bfloat16, 6)])
@pytest.mark.parametrize("operator", ["linear_logprob", "linear_policy_loss"])
def test_each_logit_of_the_head_is_written_once_read_once_and_overwritten(
    operator: str, dtype: torch.dtype, row_kernels: int
) -> None:
    """Bytes a logit: 4 that the product writes; the gradient's kernel reads 4 and writes those of the dtype."""
    tokens, vocabulary, width = 16, 2501, 16
    hidden, weight = (randn(i, n, width).to(dtype).requires_grad_() for i, n in enumerate((tokens, vocabulary)))
    target, ones, logits = randint(1, vocabulary, tokens), torch.ones(tokens), tokens * vocabulary
    operands = (tokens + vocabulary) * width * dtype.itemsize
    if operator == "linear_logprob":
        loss = ck.linear_logprob(hidden, weight, target, impl="triton")[0].sum()
        with count_traffic() as traffic:
            loss.backward()
    else:
        vectors: Any = {"advantage_T": ones, "old_logprob_T": None, "weight_T": ones}
        with count_traffic() as traffic:
            ck.linear_policy_loss(hidden, weight, target, **vectors, impl="triton")
    loaded, stored = traffic.distinct("load") - operands, traffic.distinct("store")
    # where sizes are the same, addresses that were written twice count once
    written = (4 if dtype == torch.float32 else row_kernels) * logits
    statistics = 3 * 4 * tokens * (vocabulary // 32 + 2)
    assert 4 * logits <= loaded <= 4.02 * logits + statistics
    assert written <= stored <= 1.02 * written + statistics
    requested = traffic.stored - 4 * logits
    assert (row_kernels - 4) * logits <= requested <= (row_kernels - 4) * 1.02 * logits + statistics


def test_pooling_reads_each_hidden_state_once() -> None:
    lengths = [120, 0, 160, 80]
    hidden = randn(0, sum(lengths), 1024).bfloat16().requires_grad_()
    value = randn(1, sum(lengths)).requires_grad_()
    size = hidden.numel() * 2
    with count_traffic() as forward:
        pooled, _ = ck.value_pool(hidden, value.float(), offsets(lengths), impl="triton")
    check(forward, size, 4 * pooled.numel())
    with count_traffic() as backward:
        pooled.sum().backward()
    floor = 2 * size + 2 * 4 * pooled.numel()
    assert floor <= backward.distinct("load") + backward.distinct("store") <= 1.02 * floor
    # the pooled vectors and their gradients are asked for by each share of a sequence, by all but one from the cache
    splits = backward_splits(len(hidden), len(lengths))
    assert backward.loaded + backward.stored <= 1.02 * (2 * size + splits * 2 * 4 * pooled.numel())


def test_backward_of_pooling_fills_a_gpu() -> None:
    """Programs of 8 warps, of which an H100 holds four on each of 132 SMs; none has fewer than 16 tokens on average."""
    for tokens, sequences in ((8192, 64), (8192, 1), (32_768, 64), (1 << 20, 3), (8192, 500), (65_536, 4000)):
        programs = sequences * backward_splits(tokens, sequences)
        assert programs >= min(4 * 132, tokens // 16 - sequences)
        assert programs <= max(4 * 132 + sequences, sequences)
        assert tokens // programs >= 16
    assert backward_splits(7, 3) == 1


def test_tokens_outside_the_mask_are_not_read() -> None:
    hidden = randn(0, 256, 1024).bfloat16()
    mask = torch.arange(256) % 4 == 0
    with count_traffic() as traffic:
        ck.value_pool(hidden, torch.zeros(256), offsets([256]), mask_T=mask, impl="triton")
    assert traffic.distinct("load") < 1.05 * 64 * 1024 * 2


def matmul_calls() -> dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]]:
    """Operator and the F of one training step."""
    target, ones = randint(0, 512, 96), torch.ones(96)
    policy: dict[str, Any] = {"advantage_T": ones, "old_logprob_T": -7 * ones, "weight_T": ones, "clip_high": 1e9}
    return {
        "linear_logprob": (lambda h, w: ck.linear_logprob(h, w, target, impl="triton")[0].sum(), 4.02),
        "linear_policy_loss": (lambda h, w: ck.linear_policy_loss(h, w, target, **policy, impl="triton")[0], 3.02),
        "masked_infonce": (lambda h, w: ck.masked_infonce(h, w, impl="triton")[0], 4.02),
    }


@pytest.mark.parametrize("name", matmul_calls())
def test_flop_of_the_matrix_products(name: str, largest_tensor: Any) -> None:
    """F = 2 T V D. Dot products inside kernels and matmuls between them, together."""
    operator, allowed = matmul_calls()[name]
    hidden, weight = randn(0, 96, 32).float().requires_grad_(), randn(1, 512, 32).float().requires_grad_()
    unit = 2 * 96 * 512 * 32
    with count_traffic() as traffic, largest_tensor, torch.no_grad():
        operator(hidden, weight)
    assert traffic.dot_flop + largest_tensor.matmul_flops == unit
    largest_tensor.matmul_flops = 0
    with count_traffic() as traffic, largest_tensor:
        operator(hidden, weight).backward()
    assert traffic.dot_flop + largest_tensor.matmul_flops <= allowed * unit


@pytest.mark.parametrize("tokens", [3000, 70_000])
def test_every_token_is_read_once_by_the_token_losses(tokens: int) -> None:
    """Of one program, and of several."""
    a, b, c, w = (randn(i, tokens).float() for i in range(4))
    for operator in (ck.policy_loss, ck.value_loss):
        with count_traffic() as traffic:
            operator(a, b, c, weight_T=w.abs(), impl="triton")
        check(traffic, 4 * 4 * tokens, 4 * tokens)


def test_every_token_is_read_once_by_the_one_launch_kernels() -> None:
    tokens, cu = 3000, offsets([1000, 2000])
    a, b, c = (randn(i, tokens).float() for i in range(3))
    with count_traffic() as traffic:
        ck.kl_shaped_reward(a[:2], b, c, cu, kl_coef=0.1, impl="triton")
    check(traffic, 2 * 4 * tokens, 4 * tokens)
    with count_traffic() as traffic:
        ck.gae(a, b, cu, gamma=1.0, lam=0.95, impl="triton")
    assert traffic.distinct("load") + traffic.distinct("store") <= 1.02 * 4 * 4 * tokens  # v_t and v_{t+1} overlap
