"""Stage 1: supervised fine-tuning on annotated chains of thought. Spec: docs/methods, paper section 3.1."""

import torch

from carft_fast.batch import chunks, derive_seed, epoch_rows, pack
from carft_fast.losses import sft_loss
from carft_fast.optim import learning_rate, optimizer_step
from carft_fast.run import Run, StageLoop, stage_total_steps


def train_sft(run: Run, model_path: str) -> StageLoop:
    """Run stage 1 to its end; returns its loop, which holds the model."""
    config = run.config.sft
    rows = run.train_rows
    with StageLoop(run, "sft", config, model_path, stage_total_steps(run.config, "sft", len(rows))) as loop:
        model = loop.model
        loop.evaluate_with(lambda: run.sampler(model))
        for step in loop:
            with run.timer("train"):
                picked = epoch_rows(len(rows), config.batch_size, step, derive_seed(run.config.seed, "sft"))
                picked.sort(key=lambda row: rows[row].total_length)  # micro-batches of like length: little padding
                tokens = sum(len(rows[row].completion_ids) for row in picked)
                loss_sum = torch.zeros((), device=run.device)
                for micro in chunks(picked, config.micro_batch_size):
                    batch = pack(
                        [rows[row].prompt_ids for row in micro],
                        [rows[row].completion_ids for row in micro],
                        run.device,
                    )
                    loss = sft_loss(model, model(batch), batch, tokens)
                    loss.backward()
                    loss_sum += loss.detach()
                lr = learning_rate(step, loop.total_steps, config)
                norm = optimizer_step(model, loop.optimizer, lr, config.max_grad_norm)
                values = {
                    "loss": float(loss_sum),
                    "lr": lr,
                    "grad_norm": float(norm),
                    "completion_tokens": tokens,
                }
            run.metrics.log("sft", "train", step + 1, values, run.timer.flush())
    return loop
