"""AdamW, in 32 or 8 bits, and its learning rate, a function of the step.

torchao's 8-bit AdamW: the two moments of a parameter with at least 4096 values, and a multiple of 256, are 8-bit codes
with a float32 scale for every 256 values. Others are float32. The arithmetic is float32 (block-wise quantisation,
Dettmers et al. 2022).
"""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from carft_fast.config import Config, StageConfig
from carft_fast.core import InputError
from carft_fast.models import CarftModel

MOMENTS = ("exp_avg", "exp_avg_sq")
_CODES, _SCALE = "_codes", "_scale"


def check_optimizer(config: Config, stage: str, strategy: str) -> None:
    """Raises InputError where the stage's optimizer cannot run."""
    settings: StageConfig = config.sft if stage == "sft" else config.rl
    if settings.optimizer != "adamw_8bit":
        return
    if strategy != "ddp":
        raise InputError(
            f'{stage}.optimizer = "adamw_8bit" is not possible with distributed.strategy "{strategy}": its moments '
            'cannot be divided here; allowed are "adamw", or the strategy "ddp"'
        )
    if find_spec("torchao") is None:
        raise InputError(f'{stage}.optimizer = "adamw_8bit" needs torchao: pip install ".[torchao]", in the checkout')


def build_optimizer(model: CarftModel, config: StageConfig) -> torch.optim.Optimizer:
    """Fused where it is torch's: it counts steps on the parameters' device, and can leave a step out without the
    host."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw_8bit":
        from torchao.optim import AdamW8bit

        return AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)


def optimizer_step(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """Step, unless `skipped` is 1: then weights, moments and counts stay. torchao's waits for the device to know."""
    if optimizer.defaults.get("fused"):
        fused: Any = optimizer
        fused.found_inf = skipped
        optimizer.step()
    elif not skipped:
        on_cpu = skipped.device.type == "cpu"  # compiling for each shape takes minutes there
        with torch.compiler.set_stance("force_eager" if on_cpu else "default"):
            optimizer.step()


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def state_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A parameter's state as plain tensors: a moment in 8 bits is its codes and its scales."""
    found: dict[str, Tensor] = {}
    for key, x in state.items():
        if hasattr(x, "codes"):
            found |= {key + _CODES: x.codes, key + _SCALE: x.scale}
        else:
            found[key] = x.detach()
    return found


def state_from_tensors(tensors: Mapping[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """The state that `state_tensors` took apart, in copies on the parameter's device."""
    # a copy in memory of torch's own allocator has the alignment of an uninterrupted run: kernels take the same path
    # and the bits agree
    copies = {key: x.to(parameter.device, copy=True) for key, x in tensors.items()}
    state = {key: copies[key] for key in ("step", *MOMENTS) if key in copies}
    for key in MOMENTS:
        if key + _CODES in copies:
            state[key] = _eight_bit(copies[key + _CODES], copies[key + _SCALE], parameter, signed=key == MOMENTS[0])
    return state


def _eight_bit(codes: Tensor, scale: Tensor, parameter: Tensor, *, signed: bool) -> Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    block = codes.numel() // scale.numel()
    moment: Any = OptimState8bit.zeros(codes.shape, signed, block, parameter.device, dtype=parameter.dtype)
    moment.codes, moment.scale = codes, scale
    return moment


def learning_rate(step: int, total_steps: int, config: StageConfig) -> float:
    """Rate of step `step` (from 0): linear warm-up, then the schedule down to lr * lr_final_ratio at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(total_steps - 1 - config.warmup_steps, 1)
    share = 1 - progress if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.lr_final_ratio + (1 - config.lr_final_ratio) * share)
