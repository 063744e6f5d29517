"""LoRA merged for the sampler against LoRA that the sampler applies itself: how far it is from the trainer.

Two vLLM engines in this process follow the same policy through AdamW updates of its adapters (learning rate 1e-5, SFT
loss), one with `rollout.lora_sync = "merge"`, one with "adapter". After 1, 10 and 100 updates both sample, and the
trainer's log-probs of what they sampled are held against theirs. Writes benchmarks/results/lora_sync_cpu.{json,md}.
Run by hand: python -m benchmarks.lora_sync --smollm2 models/smollm2 --data svamp_nl.json
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.rollout import case_config, machine_line
from benchmarks.rows import RESULTS, as_machine, write
from carft_fast.core import Console
from carft_fast.models import CarftModel, SamplerWeights, WeightUpdate, load_model
from carft_fast.objective import Rows, Want, build_passes
from carft_fast.rollout import RolloutEngine, SamplingParams, build_engine
from carft_fast.training import prepare
from carft_fast.training.agreement import Mismatch, sampled_logprobs

UPDATES = (1, 10, 100)
RATE, BATCH, TOKENS, SYNCS = 1e-5, 4, 64, 5


def weight_error(model: CarftModel, way: str) -> float:
    """|update that the sampler's weights hold - the trainer's update| / |the trainer's update|, over all matrices."""
    off = whole = 0.0
    frozen = dict(SamplerWeights(model.lm, torch.float32, merge=False))
    merged = dict(SamplerWeights(model.lm, torch.float32))
    adapters = WeightUpdate.of(model.lm, torch.bfloat16, unmerged=True).adapters or {}
    scaling = model.lm.peft_config["default"].lora_alpha / model.lm.peft_config["default"].r  # type: ignore[union-attr,index,operator]
    for name, before in frozen.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" not in adapters:
            continue
        update = merged[name] - before
        if way == "merge":
            held = merged[name].bfloat16().float() - before
        else:
            held = scaling * (adapters[f"{stem}.lora_B.weight"].float() @ adapters[f"{stem}.lora_A.weight"].float())
        off += float((held - update).double().square().sum())
        whole += float(update.double().square().sum())
    return (off / whole) ** 0.5


def sft_loss(model: CarftModel, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    losses = []
    with model.padded():
        for prompt, cot in rows:
            labels = torch.tensor([[-100] * len(prompt) + cot])
            losses.append(model.lm(torch.tensor([[*prompt, *cot]]), labels=labels).loss)
    return torch.stack(losses).mean()


def difference(model: CarftModel, engine: RolloutEngine, config: Any, prompts: list[list[int]]) -> Mismatch:
    rollouts = engine.generate(prompts, SamplingParams(TOKENS, seed=7))
    rows = Rows(prompts, [r.completion_ids for r in rollouts])
    found: Any = model(build_passes(config, model, config.rl.micro_batch_tokens).outputs, rows, Want(logprob=True))[0]
    return Mismatch.of(found.support_logprob_C, sampled_logprobs(rollouts, model.device))


def run(name: str, model_path: str, data: str) -> list[dict[str, Any]]:
    options = ["lora.rank=8", "rollout.batch_size=16"]
    configs = {
        way: case_config(model_path, data, "bfloat16", "vllm", *options, f"rollout.lora_sync={way}")
        for way in ("merge", "adapter")
    }
    prepared = prepare(configs["merge"], Path("runs/benchmark"), Console(), stages=("rl",), write=False)
    rows = prepared.train_rows
    prompts = [row.prompt_ids for row in rows[:16]]
    model = load_model(configs["merge"], prepared.config.model.path, torch.device("cpu"), heads=True)
    model.lm.float()  # the updates in float32: a processor without bfloat16 makes them twelve times sooner
    optimizer = torch.optim.AdamW([p for p in model.lm.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    engines = {way: build_engine(config, model, prepared.tokenizer) for way, config in configs.items()}
    found = []
    try:
        for update in range(1, UPDATES[-1] + 1):
            picked = [rows[(update * BATCH + index) % len(rows)] for index in range(BATCH)]
            optimizer.zero_grad()
            sft_loss(model, [(row.prompt_ids, row.completions[0]) for row in picked]).backward()
            optimizer.step()
            if update not in UPDATES:
                continue
            for way, engine in engines.items():
                engine.sync(model)
                with torch.no_grad():
                    mismatch = difference(model, engine, configs[way], prompts)
                found.append(
                    {
                        "model": name,
                        "way": way,
                        "updates": update,
                        "mean_nats": mismatch.mean,
                        "largest_nats": mismatch.max,
                        "weight_error": weight_error(model, way),
                    }
                )
                print(found[-1], flush=True)
        seconds: dict[str, list[float]] = {way: [] for way in engines}
        for _ in range(SYNCS):
            for way, engine in engines.items():
                start = time.perf_counter()
                engine.sync(model)
                seconds[way].append(time.perf_counter() - start)
    finally:
        for engine in engines.values():
            engine.close()
    sizes = {
        "merge": sum(tensor.nbytes for _, tensor in SamplerWeights(model.lm, torch.bfloat16)),
        "adapter": sum(
            t.nbytes for t in (WeightUpdate.of(model.lm, torch.bfloat16, unmerged=True).adapters or {}).values()
        ),
    }
    for row in found:
        row["sync_ms"] = 1e3 * statistics.median(seconds[row["way"]])
        row["sync_bytes"] = sizes[row["way"]]
    return found


def report(rows: list[dict[str, Any]], machine: str) -> str:
    lines = [
        "# LoRA merged, and applied by the sampler itself",
        "",
        f"Rank 8, updates by AdamW at {RATE:g} in float32, all else in bfloat16. Nats: |trainer's - sampler's "
        "log-prob| of what was sampled, 16 prompts,",
        f"up to {TOKENS} tokens; the two round differently, whatever they hold. Weight error: of the update that the",
        "sampler holds against the trainer's, in the Frobenius norm of all matrices; 1 is an update that does not",
        "arrive. Nothing here ran on a GPU.",
        "",
        "| model | way | updates | mean, nats | largest, nats | weight error | sync, ms | sync, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        nats = f"{row['mean_nats']:.4f} | {row['largest_nats']:.3f}"
        lines.append(
            f"| {row['model']} | {row['way']} | {row['updates']} | {nats} | "
            f"{row['weight_error']:.3f} | {row['sync_ms']:.0f} | {row['sync_bytes'] / 1e6:.1f} |"
        )
    return "\n".join([*lines, "", f"{machine}\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", required=True, help="model folder")
    parser.add_argument("--data", required=True, help="SVAMP file")
    arguments = parser.parse_args()
    rows, machine = run("SmolLM2-135M", arguments.smollm2, arguments.data), machine_line(1)
    results = RESULTS / "lora_sync_cpu.json"
    write(results, "lora_sync", as_machine(machine), rows)
    text = report(rows, machine)
    results.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
