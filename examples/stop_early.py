"""A callback that watches a run, and ends RL when it has sampled enough tokens."""

from pathlib import Path
from typing import Any

from carft_fast import Trainer, load_config


class TokenBudget:
    def __init__(self, tokens: int) -> None:
        self.left = tokens

    def on_step(self, record: dict[str, Any]) -> None:
        if record["stage"] != "rl":
            return
        self.left -= record["completion_tokens"]
        print(f"step {record['step']}: reward {record['reward']:.2f}, {self.left} tokens left")
        if self.left <= 0:
            trainer.stop("the token budget is spent")

    def on_evaluate(self, record: dict[str, Any]) -> None:
        print(f"{record['stage']} step {record['step']}: accuracy {record['accuracy']:.1%}")

    def on_checkpoint(self, path: Path) -> None:
        print(f"whole on disk: {path}")

    def on_end(self, summary: dict[str, Any]) -> None:
        print(f"final accuracy {summary['final_accuracy']:.1%}")


config = load_config(
    method="reft",
    overrides={
        "model.path": "synthetic",  # a tiny untrained model and a generated task
        "data.train": "synthetic",
        "data.eval": "synthetic",
        "data.eval_rows": 8,
        "data.max_length": 160,
        "rollout.max_new_tokens": 12,
        "sft.max_steps": 4,
        "sft.batch_size": 16,
        "rl.max_steps": 100,
        "rl.batch_size": 8,
        "rl.mini_batch_size": 8,
    },
)
trainer = Trainer(config, callbacks=[TokenBudget(200)], output_dir="runs/stop_early")
summary = trainer.train()
