"""An own sampler: plain torch, one token after another, without a cache."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from carft_fast import Rollout, SamplingParams, Trainer, load_config
from carft_fast.data import build_tokenizer


class PlainEngine:
    """Knows temperature alone. The log-probs are of the distribution it samples from."""

    def __init__(self, eos_id: int) -> None:
        self.eos_id = eos_id
        self.version = 0

    def sync(self, model: Any) -> int:
        """The trainer has new weights. Here they are read in place; others copy them."""
        self.model = model
        self.version += 1
        return self.version

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Rollout]:
        rollouts = []
        for index, prompt in enumerate(prompts, sampling.first_prompt):
            for sample in range(sampling.samples_per_prompt):
                seed = hash((sampling.seed, index, sample)) % 2**63
                rollouts.append(self.complete(list(prompt), sampling, seed))
                if on_progress is not None:
                    on_progress(1)
        return rollouts

    def complete(self, prompt: list[int], sampling: SamplingParams, seed: int) -> Rollout:
        generator = torch.Generator().manual_seed(seed)
        ids: list[int] = []
        logprobs: list[float] = []
        while len(ids) < sampling.max_new_tokens and self.eos_id not in ids[-1:]:
            with self.model.padded() as lm, self.model.autocast():
                logits_V = lm(torch.tensor([prompt + ids], device=lm.device)).logits[0, -1]
            logprob_V = (logits_V.float().cpu() / (sampling.temperature or 1.0)).log_softmax(-1)
            if sampling.temperature == 0:  # greedy
                token = int(logprob_V.argmax())
            else:
                token = int(torch.multinomial(logprob_V.exp(), 1, generator=generator))
            ids.append(token)
            logprobs.append(float(logprob_V[token]))
        return Rollout(ids, logprobs, "stop" if ids[-1] == self.eos_id else "length", self.version)

    def close(self) -> None:
        """The trainer never calls it: whoever makes an engine closes it."""


config = load_config(
    method="grpo",
    overrides={
        "model.path": "synthetic",  # a tiny untrained model and a generated task
        "data.train": "synthetic",
        "data.eval": "synthetic",
        "data.eval_rows": 8,
        "data.max_length": 160,
        "rollout.max_new_tokens": 12,
        "rl.max_steps": 2,
        "rl.batch_size": 8,
        "rl.mini_batch_size": 8,
    },
)
engine = PlainEngine(build_tokenizer().eos_token_id)
trainer = Trainer(config, engine=engine, output_dir="runs/own_engine")
summary = trainer.train(stages=("rl",))
print(f"{summary['completion_tokens']} tokens sampled by weights 1 to {engine.version}")
