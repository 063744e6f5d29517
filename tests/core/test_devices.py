"""Host data on its way to the device, and the devices of processes."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from carft_fast.core import to_device
from carft_fast.core.processes import join

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


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_process_group_knows_the_device_of_its_process(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The GPU of the local rank; by the rank alone NCCL would guess wrong on a second machine."""
    asked: dict[str, Any] = {}

    def init(backend: str, **options: Any) -> None:
        asked.update(options, backend=backend)

    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)  # an engine in this process may have made a group
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(current=torch.device(device)))
    monkeypatch.setattr(os, "environ", os.environ | {"WORLD_SIZE": "16", "RANK": "11", "LOCAL_RANK": "3"})
    join(device, 60)
    if device == "cpu":
        assert (asked["backend"], asked["device_id"]) == ("gloo", None)
    else:
        assert asked["backend"] == "cpu:gloo,cuda:nccl"
        assert asked["device_id"] == asked["current"] == torch.device("cuda", 3)
