"""Stage 1: supervised fine-tuning on annotated chains of thought. Spec: docs/methods, paper section 3.1."""

import torch

from carft_fast.core import global_sum, own_turns, world_size
from carft_fast.models import CarftModel
from carft_fast.objective import Passes, Rows, build_passes
from carft_fast.training.extension import stage_total_steps
from carft_fast.training.loop import StageLoop, picked_rows
from carft_fast.training.optim import learning_rate
from carft_fast.training.run import Run


def train_sft(run: Run, model_path: str) -> StageLoop:
    """Run stage 1 to its end; returns its loop, which holds the model."""
    config = run.config.sft
    total_steps = stage_total_steps(run.config, "sft", len(run.train_rows))
    with StageLoop(run, "sft", config, model_path, total_steps) as loop:
        learner, model = loop.learner, loop.learner.model
        passes = build_passes(run.config, model, config.micro_batch_tokens)
        loop.evaluate_with(lambda: run.sampler(model), lambda: validation_figures(run, model, passes))
        for step in loop:
            with run.timer("train"):
                picked = picked_rows(run, "sft", config.batch_size, config.first_step + step)
                batch = Rows([row.prompt_ids for row in picked], [row.completion_ids for row in picked])
                tokens = sum(batch.lengths)
                loss_sum = torch.zeros((), device=run.device)
                own = own_turns(passes.micro_batches(batch, world_size()))
                for number, micro in enumerate(own):
                    # a process without rows goes along with one that counts for nothing
                    rows, share = batch.pick_or_shortest(micro), float(bool(micro))
                    loss = share * model(passes.cross_entropy, rows, tokens)
                    learner.backward(loss, last=number == len(own) - 1)
                    loss_sum += loss.detach()
                loss_sum = global_sum(loss_sum)
                lr = learning_rate(step, loop.total_steps, config)
                norm, skipped = learner.step(lr, config.max_grad_norm, loss_sum)
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


@torch.no_grad()
def validation_figures(run: Run, model: CarftModel, passes: Passes) -> dict[str, float]:
    """With `sft.eval_loss` the cross-entropy of the held-out annotations, over the number of their tokens (nats)."""
    if not run.held_out_rows:
        return {}
    with run.timer("evaluate"):
        batch = Rows([row.prompt_ids for row in run.held_out_rows], [row.completions[0] for row in run.held_out_rows])
        total = torch.zeros((), dtype=torch.float64, device=run.device)
        for micro in own_turns(passes.micro_batches(batch, world_size())):
            # undivided: the sum over tokens
            total += float(bool(micro)) * model(passes.cross_entropy, batch.pick_or_shortest(micro), 1).double()
        return {"eval_loss": float(global_sum(total)) / sum(batch.lengths)}
