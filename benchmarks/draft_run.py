"""A run of RL with drafts and one without: the same weights at the end, and what drafts did in each epoch.

SmolLM2 after SFT, CARFT on a few SVAMP questions, float32, vLLM in the process, one thread; and the quickstart with
drafts. Not a benchmark of speed: runs follow each other. Writes benchmarks/results/draft_run_cpu.{json,md}.
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
from carft_fast.cli import QUICKSTART_CONFIG

QUESTIONS, BATCH, EPOCHS = 8, 8, 3
STEPS = EPOCHS * QUESTIONS // BATCH
TEN = 10
BUDGET = 4096
"""Of the quickstart, which decodes 128 sequences at once: the default leaves no guess for so many."""


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
    return rl_records(folder), load_file(folder / "model" / "model.safetensors")


def rl_records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if (record["stage"], record["kind"]) == ("rl", "train")]


def quickstart(folder: Path) -> list[dict[str, Any]]:
    """Of RL's first and last ten steps: tokens a forward, and what became of the drafts."""
    settings = {"rollout.engine": "vllm", "rollout.draft_budget": BUDGET}
    Trainer(load_config(QUICKSTART_CONFIG, overrides=settings), output_dir=folder).train()
    records = rl_records(folder)
    found = {f"first {TEN} steps": records[:TEN], f"last {TEN} steps": records[-TEN:]}
    return [{"model": "quickstart", "epoch": part} | drafted(steps) for part, steps in found.items()]


def drafted(records: list[dict[str, Any]]) -> dict[str, float]:
    return {
        "tokens_per_forward": statistics.mean(r["tokens_per_forward"] for r in records),
        "accepted": statistics.mean(r.get("draft_accepted", 0.0) for r in records),
        "wasted_per_token": statistics.mean(r["draft_wasted"] for r in records),
    }


def report(rows: list[dict[str, Any]], machine: str) -> str:
    lines = [
        "# RL with drafts and without",
        "",
        f"SmolLM2-135M after SFT, CARFT on {QUESTIONS} SVAMP questions, {EPOCHS} epochs of {STEPS // EPOCHS} step(s),",
        f"{BATCH // 2} sequences at once, float32, vLLM in the process. The same weights at the end, to the bit: "
        + ("yes." if rows[0]["same_weights"] else "NO."),
        f"Seconds of sampling are of an epoch. The quickstart: seed 0, 128 sequences at once, draft_budget = {BUDGET}.",
        "Nothing here ran on a GPU.",
        "",
        "| model | epoch | tokens a forward | stood | wasted a token | with drafts, s | without, s | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        drafts = f"{row['tokens_per_forward']:.2f} | {row['accepted']:.0%} | {row['wasted_per_token']:.2f}"
        seconds = " |  | "
        if "seconds" in row:
            on, off = row["seconds"], row["seconds_without"]
            seconds = f"{on:.1f} | {off:.1f} | {off / on:.2f}"
        lines.append(f"| {row['model']} | {row['epoch']} | {drafts} | {seconds} |")
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
        of_quickstart = quickstart(Path(folder) / "quickstart")
    same = all(torch.equal(tensor, weights["auto"][name]) for name, tensor in weights["off"].items())
    rows, each = [], QUESTIONS // BATCH
    for epoch in range(EPOCHS):
        part = slice(epoch * each, (epoch + 1) * each)
        on, off = found["auto"][part], found["off"][part]
        rows.append(
            {
                "model": "SmolLM2-135M",
                "epoch": epoch + 1,
                **drafted(on),
                "seconds": sum(r["seconds"]["rollout"] for r in on),
                "seconds_without": sum(r["seconds"]["rollout"] for r in off),
                "same_weights": same,
            }
        )
    rows += of_quickstart
    machine = machine_line(1)
    write(RESULTS / "draft_run_cpu.json", "draft_run", as_machine(machine), rows)
    text = report(rows, machine)
    (RESULTS / "draft_run_cpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
