"""Host data on its way to the device."""

from typing import Any

import pytest
import torch

from carft_fast.core import to_device

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0, 3, 2**40], torch.int64),
        ([-1.5, 1e-8], torch.float32),
        ([True, False], torch.bool),
        ([(1, 2), (3, 4)], torch.int64),
        ([], torch.int64),
        (torch.tensor([1, 0]), torch.bool),
    ],
)
def test_values_arrive_in_the_dtype_asked_for(values: Any, dtype: torch.dtype) -> None:
    found = to_device(values, dtype, CPU)
    expected = torch.tensor(values if isinstance(values, list) else values.tolist(), dtype=dtype)
    assert found.dtype == dtype
    assert found.device == CPU
    assert torch.equal(found, expected)
