"""AdamW and its learning rate, a function of the step."""

import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from carft_fast.config import StageConfig
from carft_fast.models import CarftModel


def build_optimizer(model: CarftModel, config: StageConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(step: int, total_steps: int, config: StageConfig) -> float:
    """Rate of step `step` (from 0): linear warm-up, then the schedule down to lr * lr_final_ratio at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(total_steps - 1 - config.warmup_steps, 1)
    share = 1 - progress if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.lr_final_ratio + (1 - config.lr_final_ratio) * share)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_step(
    model: CarftModel, optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float, loss: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip, step, clear; returns the gradient norm before clipping, and 1 where it or `loss` is not finite, else 0.

    In that case the fused optimizer leaves weights, moments and its count of steps as they are. Both are tensors: the
    host does not wait for the device. Weights may be FSDP2's shards.
    """
    set_learning_rate(optimizer, lr)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    skipped = (~(norm.isfinite() & loss.isfinite())).float()
    if optimizer.defaults.get("fused"):
        fused: Any = optimizer
        fused.found_inf = skipped
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped
