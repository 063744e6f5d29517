"""AdamW and its learning rate, a function of the step."""

import math

import torch

from carft_fast.config import StageConfig
from carft_fast.models import CarftModel


def build_optimizer(model: CarftModel, config: StageConfig) -> torch.optim.Optimizer:
    """Fused: it counts steps on the parameters' device, and can leave a step out without the host."""
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
