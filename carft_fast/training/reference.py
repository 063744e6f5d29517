"""The frozen reference policy of a step: no copy with LoRA, none at all where no KL term asks for it."""

import contextlib
from collections.abc import Iterator

import torch

from carft_fast.config import Config
from carft_fast.models import CarftModel, load_model
from carft_fast.training.parallel import divide_frozen, strategy


class Reference:
    """Enter `model()` once a step and use the model inside: an offloaded copy is on the device for that long only."""

    def __init__(self, config: Config, path: str, policy: CarftModel) -> None:
        """`path`: what stage 2 started from. `policy` serves with its adapters off where it has some."""
        self._policy = policy
        self._device = policy.device
        self._copy: CarftModel | None = None
        self._host: dict[torch.nn.Parameter, torch.Tensor] = {}
        if policy.has_adapters:
            return
        divided = strategy(config) in ("fsdp2", "zero3")
        self._copy = load_model(config, path, self._device, heads=False, divided=divided)
        divide_frozen(config, self._copy, self._device, offload=config.rl.reference_offload)
        if config.rl.reference_offload and not divided:
            pin = self._device.type == "cuda"
            self._host = {p: p.data.cpu().pin_memory() if pin else p.data for p in self._copy.parameters()}
            self._to_host()

    @contextlib.contextmanager
    def model(self) -> Iterator[CarftModel]:
        if self._copy is None:
            with self._policy.without_adapters() as policy:
                yield policy
            return
        for parameter, weight in self._host.items():
            parameter.data = self._to_device(weight)
        try:
            yield self._copy
        finally:
            self._to_host()

    def _to_device(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self._device, non_blocking=True)

    def _to_host(self) -> None:
        """The weights never change, so nothing is copied back."""
        for parameter, weight in self._host.items():
            parameter.data = weight
