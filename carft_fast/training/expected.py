"""How long a run may take, said before its first step: a rough figure from arithmetic and a short look at the device.

Work is counted by models/flops.py. What the device does in a second is measured with one matrix product, one copy and
many small additions, in about a tenth of a second. The ETA beside a bar is measured on the run itself, and better.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from carft_fast.config import Config
from carft_fast.core import world_size
from carft_fast.data import EncodedExample
from carft_fast.models import ModelCost, StepShape, Work, fast_step, sft_step
from carft_fast.training.loop import stage_total_steps

MATMUL_SHARE, HALF_ON_CPU_SHARE = 0.5, 0.25
"""Of the speed of one large product that a step's smaller ones are taken to reach; in half precision on a CPU less."""
UNCERTAINTY = 3.0
"""Times that a run may take longer than the arithmetic says; two runs on the CPU took 1.4 and 2.1 times as long."""
CALLS_PER_LAYER = 150
"""Small additions that take the host as long as one layer's forward (modules, hooks and views included)."""
BACKWARD_CALLS = 3
"""A forward with its backward and the optimizer's part, in forwards."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What one device does: FLOP of matmuls and bytes of memory in a second, and seconds for one small operation."""

    flops: float
    bandwidth: float
    call: float

    def seconds(self, work: Work, calls: float) -> float:
        """The larger of what FLOPs, bytes and the host's calls take."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth, calls * self.call)


def measure_speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Takes about a tenth of a second."""
    size, elements = (4096, 1 << 28) if device.type == "cuda" else (512, 1 << 23)
    left_MM = torch.ones(size, size, device=device, dtype=dtype)
    source_E = torch.ones(elements, device=device)
    target_E = torch.empty_like(source_E)
    small = torch.ones(1, device=device)
    product = _seconds_of(lambda: left_MM @ left_MM, device)
    copy = _seconds_of(lambda: target_E.copy_(source_E), device)
    share = HALF_ON_CPU_SHARE if device.type == "cpu" and dtype != torch.float32 else MATMUL_SHARE
    flops = share * 2 * size**3 / product
    return Speed(flops, 2 * 4 * elements / copy, _seconds_of(lambda: small + small, device))


def _seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, after a first one, over at least 20 ms."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    call()
    calls, start = 0, now()
    while True:
        for _ in range(calls or 1):
            call()
        calls += calls or 1
        if (passed := now() - start) > 0.02:
            return passed / calls


def expected_seconds(
    config: Config, stage: str, cost: ModelCost, train: list[EncodedExample], eval_rows: int, speed: Speed
) -> tuple[float, float]:
    """Of a stage with its evaluations: with completions as long as the annotated ones, and at the length limit."""
    steps = stage_total_steps(config, stage, len(train))
    settings = config.sft if stage == "sft" else config.rl
    evaluations = 1 + (steps // settings.eval_every if settings.eval_every else 0) + (stage == "sft")
    prompt = round(sum(len(row.prompt_ids) for row in train) / len(train))
    annotated = max(1, round(sum(len(row.completion_ids) for row in train) / len(train)))
    layer_calls = CALLS_PER_LAYER * (cost.layers + 1)
    batch = config.rollout.batch_size

    def shape(rows: int, completion: int, updates: int = 1) -> StepShape:
        return StepShape(
            [prompt] * rows,
            [completion] * rows,
            [annotated] * rows,
            epochs=config.rl.ppo_epochs,
            updates_per_epoch=updates,
            decode_batch=batch,
            bytes_per_weight=2 if config.model.compute_dtype == "bfloat16" else 4,
        )

    def decoding(rows: int, completion: int) -> float:
        forwards = completion * -(-rows // batch)
        return speed.seconds(fast_step(cost, shape(rows, completion))["rollout"], forwards * layer_calls)

    def micro_batches(rows: int, completion: int) -> int:
        return -(-rows * (prompt + completion) // settings.micro_batch_tokens)

    def stage_seconds(completion: int, eval_completion: int) -> float:
        rows = -(-settings.batch_size // world_size())
        recompute = config.model.gradient_checkpointing
        if stage == "sft":
            calls = BACKWARD_CALLS * micro_batches(rows, annotated) * layer_calls
            step = speed.seconds(sft_step(cost, shape(rows, annotated), recompute=recompute), calls)
        else:
            updates = -(-config.rl.batch_size // config.rl.mini_batch_size)
            work = fast_step(cost, shape(rows, completion, updates), recompute=recompute, one_micro_batch=False)
            passes = layer_calls * max(updates, micro_batches(rows, completion))
            step = decoding(rows, completion) + speed.seconds(work["log-probs"], 3 * passes)
            step += speed.seconds(work["update"], BACKWARD_CALLS * config.rl.ppo_epochs * passes)
        evaluation = decoding(-(-eval_rows // world_size()), eval_completion)
        return steps * step + evaluations * evaluation

    limit = max(annotated, config.rollout.max_new_tokens)
    eval_limit = max(annotated, config.eval_max_new_tokens)
    return stage_seconds(annotated, annotated), stage_seconds(limit, eval_limit)
