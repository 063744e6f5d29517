"""examples/trl_grpo.py against TRL's own fused head: forward and backward of one micro-batch, in turns.

SmolLM2 in float32 on one thread, completions of SVAMP's lengths with every advantage other than 0. TRL's head scores
the completion positions, as it does on a GPU, and all positions, as it does on a CPU. Processor time. Writes
benchmarks/results/trl_grpo_cpu.{json,md}.
Run by hand: PYTHONPATH=build/peers python -m benchmarks.peers.trl_grpo --smollm2 models/smollm2
"""

import argparse
import runpy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from benchmarks.rollout import machine_line
from benchmarks.rows import RESULTS, as_machine, write

EXAMPLE = Path(__file__).parents[2] / "examples" / "trl_grpo.py"
ROWS, PROMPT, COMPLETION = 8, 64, 128


def make_inputs(model: Any, rows: int, prompt: int, completion: int, *, old: bool, ref: bool) -> dict[str, Tensor]:
    """What GRPOTrainer hands to its loss: prompts padded on the left, completions of several lengths on the right."""
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "device": "cpu"}
    lengths = torch.randint(completion // 2, completion + 1, (rows, 1), **draw)  # type: ignore[call-overload]
    starts = torch.randint(0, prompt // 2, (rows, 1), **draw)  # type: ignore[call-overload]
    vocabulary = model.config.vocab_size
    inputs = {
        "prompt_ids": torch.randint(3, vocabulary, (rows, prompt), generator=generator),
        "prompt_mask": (torch.arange(prompt) >= starts).long(),
        "completion_ids": torch.randint(3, vocabulary, (rows, completion), generator=generator),
        "completion_mask": (torch.arange(completion) < lengths).long(),
        "advantages": torch.randn(rows, generator=generator),
        "num_items_in_batch": lengths.sum(),
    }
    near = -torch.rand(rows, completion, generator=generator) - torch.log(torch.tensor(float(vocabulary)))
    return (
        inputs | ({"old_per_token_logps": near} if old else {}) | ({"ref_per_token_logps": near - 0.1} if ref else {})
    )


def report(rows: list[dict[str, Any]], tokens: int, machine: str) -> str:
    lines = [
        "# TRL's GRPOTrainer with its own head and with `linear_policy_loss`",
        "",
        f"SmolLM2-135M, float32, one thread: forward and backward of {ROWS} rows with {tokens:,} completion tokens,",
        "vocabulary 49,152. Sides took turns; medians of processor time. Nothing here ran on a GPU.",
        "",
        "| side | CPU s | over `linear_policy_loss` |",
        "| --- | --- | --- |",
    ]
    for row in rows:
        low, high = row["over_ours_range"]
        lines.append(f"| {row['side']} | {row['seconds']:.2f} | {row['over_ours']:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join([*lines, "", machine, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", required=True, help="model folder")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    fused = runpy.run_path(str(EXAMPLE))["FusedGRPOTrainer"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = fused(
            model=AutoModelForCausalLM.from_pretrained(arguments.smollm2, dtype=torch.float32),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(folder, loss_type="dr_grpo", beta=0.0, use_cpu=True, bf16=False, report_to=[]),
            train_dataset=Dataset.from_list([{"prompt": "a"}] * 8),
            processing_class=AutoTokenizer.from_pretrained(arguments.smollm2),
        )
        model = trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        inputs = make_inputs(model, ROWS, PROMPT, COMPLETION, old=False, ref=False)
        sides = {
            "linear_policy_loss": (fused, False),
            "TRL, completion positions": (GRPOTrainer, True),
            "TRL": (GRPOTrainer, False),
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(arguments.repeats + 1):
            for side, (kind, compact) in sides.items():
                trl.trainer.utils._use_triton = lambda device, compact=compact: compact
                model.zero_grad()
                start = time.process_time()
                kind._compute_loss(trainer, model, inputs).backward()
                seconds[side].append(time.process_time() - start)
    own = seconds["linear_policy_loss"][1:]  # the first turn warms up
    rows = []
    for side, measured in seconds.items():
        ratios = [theirs / mine for theirs, mine in zip(measured[1:], own, strict=True)]
        row = {"side": side, "seconds": statistics.median(measured[1:]), "over_ours": statistics.median(ratios)}
        rows.append(row | {"over_ours_range": [min(ratios), max(ratios)]})
    machine, tokens = machine_line(arguments.repeats), int(inputs["completion_mask"].sum())
    text = report(rows, tokens, machine)
    write(RESULTS / "trl_grpo_cpu.json", "trl_grpo", as_machine(machine), rows)
    (RESULTS / "trl_grpo_cpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
