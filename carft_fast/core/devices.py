"""Numbers of the host on their way to the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Sequence[Any] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.tensor(values, dtype=dtype, device=device)`, but the host does not wait for the copy.

    Torch's own copy is from pageable memory: it waits until the device has done all that it was asked before.
    """
    host = torch.as_tensor(values, dtype=dtype)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
