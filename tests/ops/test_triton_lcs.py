"""Triton kernel of the LCS mask, equal to its reference, and refusing offsets that are wrong."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import carft_kernels as ck
from carft_kernels._runtime import INTERPRETED
from carft_kernels.lcs import lcs_mask_reference

from .checks import DEVICE, FEW, offsets, randint, seeds

if INTERPRETED:
    from .interpreter import guarded


@FEW
@given(
    seed=seeds,
    letters=st.sampled_from([1, 2, 5, 300]),
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 100)), min_size=1, max_size=4),
)
def test_lcs_mask(seed: int, letters: int, lengths: list[tuple[int, int]]) -> None:
    a_lengths, b_lengths = ([pair[side] for pair in lengths] for side in (0, 1))
    a, b = randint(seed, letters, sum(a_lengths)), randint(seed + 1, letters, sum(b_lengths))
    arguments = (a, offsets(a_lengths), b, offsets(b_lengths))
    for ours, expected in zip(ck.lcs_mask(*arguments, impl="triton"), lcs_mask_reference(*arguments), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("columns", [31, 32, 33, 64, 1025, 1100])
def test_lcs_mask_across_words(columns: int) -> None:
    """Carries that run through whole words and stop at their edges: one letter, two, blocks, equal, nothing equal."""
    same, period = torch.zeros(columns, dtype=torch.int64), torch.arange(columns) % 2
    blocks = torch.arange(columns) // 32 % 2
    rows = [
        same[:5],
        period[:9],
        blocks[:70],
        torch.tensor([1] * 4 + [0] * 4),
        torch.arange(columns)[-40:],
        same[:3] + 7,
    ]
    others = [same, same, blocks, 1 - blocks, torch.arange(columns), period]
    far = torch.arange(columns) % 33 == 32  # matches one above each word's edge
    rows, others = [*rows, same[:6] + 1], [*others, far.long()]
    arguments = (torch.cat(rows), offsets([*map(len, rows)]), torch.cat(others), offsets([*map(len, others)]))
    a, a_cu, b, b_cu = (x.to(DEVICE) for x in arguments)
    with guarded() if INTERPRETED else nullcontext():
        found = ck.lcs_mask(a, a_cu, b, b_cu, impl="triton")
    for ours, expected in zip(found, lcs_mask_reference(a, a_cu, b, b_cu), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.usefixtures("unchecked")
def test_lcs_mask_checks_its_offsets_in_any_case(impl: Any) -> None:
    """The host needs them anyhow, and takes its own as well as the device's."""
    tokens, right = randint(0, 3, 9), torch.tensor([0, 4, 4, 9])
    for wrong in ([0, 5, 3, 9], [0, 4, 12, 9]):
        for device in ("cpu", DEVICE):
            with pytest.raises(ValueError, match=r"b_cu.* comes after"):
                ck.lcs_mask(tokens, right, tokens, torch.tensor(wrong, device=device), impl=impl)
    arguments = tokens, right, tokens.flip(0), right
    expected = lcs_mask_reference(*arguments)
    for cu in (right, right.int(), right.to(DEVICE)):
        with guarded() if INTERPRETED else nullcontext():
            found = ck.lcs_mask(arguments[0], cu, arguments[2], cu, impl=impl)
        assert all(map(torch.equal, found, expected))


def test_lcs_mask_in_several_groups_of_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scratch holds some pairs' tables at a time; a pair that is larger than it is alone."""
    monkeypatch.setattr("carft_kernels.lcs._TABLE_BYTES", 120)
    a_lengths, b_lengths = [10, 3, 0, 20, 5, 7, 2], [10, 9, 4, 20, 6, 0, 2]
    arguments = (randint(0, 4, sum(a_lengths)), offsets(a_lengths), randint(1, 4, sum(b_lengths)), offsets(b_lengths))
    with guarded() if INTERPRETED else nullcontext():
        found = ck.lcs_mask(*arguments, impl="triton")
    assert all(map(torch.equal, found, lcs_mask_reference(*arguments)))
