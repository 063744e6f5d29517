"""A run of RL with drafts and one without: the same weights at the end, and what drafts did in each epoch.

SmolLM2 after SFT, CARFT on a few SVAMP questions, float32, vLLM in the process, one thread. Not a benchmark of speed:
the two runs follow each other. Writes benchmarks/results/draft_run_cpu.{json,md}.
Run by hand: python -m benchmarks.draft_run --smollm2 FOLDER_AFTER_SFT --data svamp_nl.json
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.rollout import machine_line
from benchmarks.rows import RESULTS, as_machine, write
from carft_fast import Trainer, load_config

QUESTIONS, BATCH, EPOCHS = 8, 8, 3
STEPS = EPOCHS * QUESTIONS // BATCH


def run(model: str, data: str, drafts: str, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The records of its steps, and the policy's weights at the end."""
    settings = {
        "model.path": model,
        "model.compute_dtype": "float32",
        "data.train": data,
        "data.eval": data,
        "data.eval_rows": 1,
        "data.max_length": 384,
        "rl.max_steps": STEPS,
        "rl.batch_size": BATCH,
        "rl.mini_batch_size": BATCH // 2,
        "rl.save_every": STEPS,
        "rl.lr": 2e-6,
        "rollout.engine": "vllm",
        "rollout.max_new_tokens": 112,
        "rollout.batch_size": BATCH // 2,
        "rollout.drafts": drafts,
    }
    config = load_config("configs/svamp_smollm2_cpu.toml", method="carft", overrides=settings)
    Trainer(config, output_dir=folder).train(stages=("rl",))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if (record["stage"], record["kind"]) == ("rl", "train")]
    return records, load_file(folder / "model" / "model.safetensors")


def report(rows: list[dict[str, Any]], machine: str) -> str:
    lines = [
        "# RL with drafts and without",
        "",
        f"SmolLM2-135M after SFT, CARFT on {QUESTIONS} SVAMP questions, {EPOCHS} epochs of {STEPS // EPOCHS} step(s),",
        f"{BATCH // 2} sequences at once, float32, vLLM in the process. The same weights at the end, to the bit: "
        + ("yes." if rows[0]["same_weights"] else "NO."),
        "Seconds of sampling are of an epoch. Nothing here ran on a GPU.",
        "",
        "| epoch | tokens a forward | drafts that stood | wasted a token | with drafts, s | without, s | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        drafts = f"{row['tokens_per_forward']:.2f} | {row['accepted']:.0%} | {row['wasted_per_token']:.2f}"
        lines.append(
            f"| {row['epoch']} | {drafts} | {row['seconds']:.1f} | {row['seconds_without']:.1f} | "
            f"{row['seconds_without'] / row['seconds']:.2f} |"
        )
    return "\n".join([*lines, "", f"{machine}\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", required=True, help="model folder, after SFT")
    parser.add_argument("--data", required=True, help="SVAMP file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    questions = json.loads(Path(arguments.data).read_text())[:QUESTIONS]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "questions.json"
        data.write_text(json.dumps(questions))
        found, weights = {}, {}
        for drafts in ("off", "auto"):
            found[drafts], weights[drafts] = run(arguments.smollm2, str(data), drafts, Path(folder) / drafts)
    same = all(torch.equal(tensor, weights["auto"][name]) for name, tensor in weights["off"].items())
    rows, each = [], QUESTIONS // BATCH
    for epoch in range(EPOCHS):
        part = slice(epoch * each, (epoch + 1) * each)
        on, off = found["auto"][part], found["off"][part]
        rows.append(
            {
                "epoch": epoch + 1,
                "tokens_per_forward": statistics.mean(r["tokens_per_forward"] for r in on),
                "accepted": statistics.mean(r.get("draft_accepted", 0.0) for r in on),
                "wasted_per_token": statistics.mean(r["draft_wasted"] for r in on),
                "seconds": sum(r["seconds"]["rollout"] for r in on),
                "seconds_without": sum(r["seconds"]["rollout"] for r in off),
                "same_weights": same,
            }
        )
    machine = machine_line(1)
    write(RESULTS / "draft_run_cpu.json", "draft_run", as_machine(machine), rows)
    text = report(rows, machine)
    (RESULTS / "draft_run_cpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
