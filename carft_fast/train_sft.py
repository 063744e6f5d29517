"""Stage 1: supervised fine-tuning on annotated chains of thought. Spec: docs/methods, paper section 3.1."""

import torch

from carft_fast.optim import learning_rate, optimizer_step
from carft_fast.passes import Rows, build_passes
from carft_fast.run import Run, StageLoop, picked_rows, stage_total_steps


def train_sft(run: Run, model_path: str) -> StageLoop:
    """Run stage 1 to its end; returns its loop, which holds the model."""
    config = run.config.sft
    total_steps = stage_total_steps(run.config, "sft", len(run.train_rows))
    with StageLoop(run, "sft", config, model_path, total_steps) as loop:
        model = loop.model
        passes = build_passes(run.config, model, config.micro_batch_tokens)
        loop.evaluate_with(lambda: run.sampler(model))
        for step in loop:
            with run.timer("train"):
                picked = picked_rows(run, "sft", config.batch_size, config.first_step + step)
                batch = Rows([row.prompt_ids for row in picked], [row.completion_ids for row in picked])
                tokens = sum(batch.lengths)
                loss_sum = torch.zeros((), device=run.device)
                for micro in passes.micro_batches(batch):
                    loss = passes.cross_entropy(model, batch.pick(micro), tokens)
                    loss.backward()
                    loss_sum += loss.detach()
                lr = learning_rate(step, loop.total_steps, config)
                norm, skipped = optimizer_step(model, loop.optimizer, lr, config.max_grad_norm, loss_sum)
                values = {
                    "loss": float(loss_sum),
                    "lr": lr,
                    "grad_norm": float(norm),
                    "completion_tokens": tokens,
                    "skipped_updates": int(skipped),
                }
            run.metrics.log("sft", "train", step + 1, values, run.timer.flush())
            if values["skipped_updates"]:
                examples = (row.example for row in picked)
                loop.report_skipped([{"item_id": e.item_id, "question": e.question, "cots": e.cots} for e in examples])
    return loop
