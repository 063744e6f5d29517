"""The frozen reference policy of a step: no copy with LoRA, none at all where no KL term asks for it.

H_kv key-value heads, P tokens of a prompt, d head size.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence

import psutil
import torch

from carft_fast.config import Config
from carft_fast.core import InputError
from carft_fast.models import CarftModel, PromptStates, load_model
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
        self._copy = load_model(config, path, torch.device("cpu") if divided else self._device, heads=False)
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


class StoredPrompts:
    """Keys and values of prompts in a frozen model, in host memory: [layers, 2, H_kv, P, d] of each prompt."""

    def __init__(self) -> None:
        self._states: dict[tuple[int, ...], torch.Tensor] = {}
        self._modules: list[torch.nn.Module] = []
        self.bytes = 0

    def add(self, kept: PromptStates) -> None:
        self._modules = list(kept.layers)
        if len({key.shape for key, _ in kept.layers.values()}) > 1:
            raise InputError(
                'rl.reference_prompts = "stored": the layers of this model have key-value heads of different number or '
                'size, allowed here is "forward"'
            )
        states = torch.stack([torch.cat(pair) for pair in kept.layers.values()]).cpu()
        for prompt, at in kept.at.items():
            self._states[prompt] = states[..., at : at + len(prompt), :].clone()
            self.bytes += self._states[prompt].nbytes

    def of(self, prompts: Sequence[Sequence[int]], device: torch.device) -> PromptStates:
        """On the device, by one copy that nobody waits for."""
        at: dict[tuple[int, ...], int] = {}
        tokens = 0
        for prompt in map(tuple, prompts):
            if prompt not in at:
                at[prompt] = tokens
                tokens += len(prompt)
        states = torch.cat([self._states[prompt] for prompt in at], 3)
        if device.type == "cuda":
            states = states.pin_memory()
        layers = states.to(device, non_blocking=True).split(1, 1)
        return PromptStates(at, tokens, dict(zip(self._modules, zip(*layers, strict=True), strict=True)), closed=True)

    def check_room(self, tokens: int) -> None:
        """Raises InputError where `tokens` of prompts would not fit host memory, judged by those that are there."""
        per_token = self.bytes / sum(map(len, self._states))
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        needed = per_token * tokens * processes
        available = psutil.virtual_memory().available + self.bytes * processes
        if needed > available:
            raise InputError(
                f'rl.reference_prompts = "stored" needs {needed / 2**30:.1f} GB of host memory ({tokens:,} tokens of '
                f"prompts, {per_token:,.0f} bytes each, in {processes} processes), {available / 2**30:.1f} GB are "
                'free: allowed here is "forward"'
            )
