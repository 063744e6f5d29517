"""Everything that only a GPU can answer, in ten minutes at most: `make bench-gpu`.

Parts: the kernels' tests, operators at the paper's and at Qwen2.5-7B's shapes, sampling engines, the training step on a
randomly initialised model of 1.5 billion weights (so nothing is downloaded), trainer against vLLM token by token, and
Nsight Compute where `ncu` is. Each part is a process of its own; one that fails or runs out of time says so in its row
and leaves the others alone. Writes benchmarks/results/{gpu,ops,rollout,step}_<GPU>.json. Exit codes: 0 done, 1 a part
failed, 2 there is no GPU.
"""

import argparse
import csv
import gc
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.op_cases import CASES
from benchmarks.ops import WRONG, measure, report, seconds
from benchmarks.rows import RESULTS, Row, this_machine, write

MINUTES, TESTS_SECONDS = 10.0, 180.0
QUERY = ("name", "driver_version", "clocks.max.sm", "clocks.max.mem", "clocks.sm", "power.limit")
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "memory moved",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "of the peak memory rate",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "of the peak of the busiest SM pipe",
    "launch__registers_per_thread": "registers",
}
MODEL = {  # Qwen2.5-1.5B
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
SHAPE = "Qwen2.5-1.5B's shape, random weights"
ROWS, PROMPT, COMPLETION = 64, 64, 128
PATHS = {
    "fast": [],
    "padded, recomputing": [
        "model.impl=padded",
        "model.gradient_checkpointing=true",
        f"rl.micro_batch_tokens={8 * (PROMPT + COMPLETION)}",  # eight rows at once, the paper's per GPU
    ],
}


def stamp(answer: str) -> dict[str, str]:
    """Of nvidia-smi's line of QUERY."""
    first = answer.strip().splitlines()[0].split(", ")
    if len(first) != len(QUERY):
        raise RuntimeError(f"nvidia-smi answered {answer.strip()!r}, {len(QUERY)} values were asked for")
    name, driver, sm, memory, now, power = first
    return {
        "gpu": name,
        "driver": driver,
        "clocks": f"{sm} SM / {memory} memory",
        "clock now": now,
        "power limit": power,
    }


def gpu_machine() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    from carft_fast.training import versions

    named = {key: value for key, value in versions().items() if key in ("triton", "transformers", "vllm")}
    return this_machine("cuda") | stamp(answer) | {"cuda": str(torch.version.cuda)} | named


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def no_gpu() -> str:
    """Why this machine cannot run it; empty where it can."""
    if torch.cuda.is_available():
        return ""
    cause = "nvidia-smi is not on the PATH" if shutil.which("nvidia-smi") is None else "there is a driver"
    return f"no GPU: torch {torch.__version__} (CUDA {torch.version.cuda}) sees no CUDA device, and {cause}"


@contextmanager
def random_model(sizes: dict[str, Any]) -> Iterator[Path]:
    """A folder with an untrained model and the quickstart's tokenizer."""
    import transformers

    from carft_fast.data import build_tokenizer

    with tempfile.TemporaryDirectory(prefix="carft-benchmark-") as folder:
        config = transformers.Qwen2Config(**sizes)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        yield Path(folder)


def model_config(path: Path, device: str, *options: str) -> Any:
    from carft_fast.cli import QUICKSTART_CONFIG
    from carft_fast.config import load_config

    fixed = [
        *(f"model.path={path}", f"model.device={device}", "model.compute_dtype=bfloat16", "data.max_length=512"),
        *(f"rollout.max_new_tokens={COMPLETION}", f"rollout.batch_size={ROWS}", "data.eval_rows=1"),
        *(f"rl.batch_size={ROWS}", f"rl.mini_batch_size={ROWS}", "rl.ppo_epochs=2", "rl.micro_batch_tokens=8192"),
    ]
    return load_config(str(QUICKSTART_CONFIG), [*fixed, *options])


def inputs_of(path: Path) -> Any:
    from benchmarks.step import random_inputs
    from carft_fast.data import build_tokenizer

    # the annotated chain, too, is as long as a prompt: what a step costs hangs on tokens, not on what they say
    return random_inputs(ROWS, PROMPT, len(build_tokenizer()), torch.Generator().manual_seed(0))


def operators(device: str) -> list[Row]:
    return measure([case for case in CASES if device in case.devices], device, budget=1.0)


def rollouts(path: Path, device: str, engines: Sequence[str], repeats: int = 3) -> tuple[list[Row], list[Row]]:
    """Rows of the engines; and the rows of trainer against vLLM."""
    from benchmarks.rollout import sample
    from carft_fast.models import load_model, load_tokenizer
    from carft_fast.rollout import SamplingParams, build_engine
    from carft_fast.training import check_agreement

    prompts = [row.prompt_ids for row in inputs_of(path).rows]
    config = model_config(path, device)
    model = load_model(config, str(path), torch.device(device), heads=False)
    tokenizer = load_tokenizer(config.model)
    rows: list[Row] = []
    parity: list[Row] = []
    for name in engines:
        engine_config = model_config(path, device, f"rollout.engine={name}")
        engine = build_engine(engine_config, model, tokenizer)
        try:
            engine.sync(model)
            found = check_agreement(engine, model, prompts, engine_config)
            if name != "hf":
                figures = f"mean {found.mean:.2g}, largest {found.max:.2g} nats over {found.tokens} tokens"
                parity.append({"part": "parity with vLLM", "what": name, "result": figures, "agreement": found.max})
            engine.generate(prompts[:8], SamplingParams(8))
            samples = [sample(engine, prompts, seed) for seed in range(repeats)]
            rates = [one["tokens_per_second"] for one in samples]
            rows.append(
                {
                    "model": SHAPE,
                    "dtype": "bfloat16",
                    "engine": name,
                    "tokens_per_second": statistics.median(rates),
                    "range": [min(rates), max(rates)],
                    "sync_seconds": statistics.median(seconds(partial(engine.sync, model), device) for _ in range(3)),
                }
            )
        finally:
            engine.close()
        del engine
        gc.collect()
    return rows, parity


def training_step(path: Path, device: str, repeats: int = 3) -> list[Row]:
    """The rows of one case of the step benchmark."""
    from benchmarks.step import RIGHT, Prepared, matmul_ceiling, timings
    from carft_fast.models import ModelCost, StepShape, fast_step

    inputs = inputs_of(path)
    rows: list[Row] = []
    ceiling = matmul_ceiling(torch.bfloat16, device)
    for name, options in PATHS.items():
        config = model_config(path, device, *options)
        prepared = Prepared(config, str(path), inputs, [RIGHT] * ROWS, device)
        prepared.update()  # warms up
        phases = timings([prepared.turn() for _ in range(repeats)])
        peak = peak_of(prepared.both, device)
        lengths = [PROMPT] * ROWS
        shape = StepShape(lengths, lengths, lengths, config.rl.ppo_epochs)
        work = fast_step(ModelCost.of(prepared.policy.lm), shape)
        total = sum(phases["seconds"].values())
        rows.append(
            {
                "path": name,
                "sampler": "none",
                **phases,
                "step_seconds": total,
                "samples_per_second": ROWS / total,
                "utilisation": (work["log-probs"].flops + work["update"].flops) / total / ceiling,
                "update_peak_extra_mb": peak,
                "beyond_gradients_mb": peak - prepared.gradients_mb,
            }
        )
        del prepared
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def peak_of(call: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def kernel_tests() -> list[Row]:
    command = [sys.executable, "-m", "pytest", "-q", "tests/ops", "-p", "no:cacheprovider"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=TESTS_SECONDS, check=False)
    print(found.stdout[-3000:])
    if found.returncode:
        raise RuntimeError(f"tests/ops: {found.stdout.strip().splitlines()[-1]}")
    return [{"part": "tests", "what": "tests/ops", "result": found.stdout.strip().splitlines()[-1]}]


def ncu_target() -> None:
    """What is looked at: each operator of Qwen2.5-7B's shapes once, ours only."""
    for case in CASES:
        if "cuda" in case.devices and case.shape.get("V", 152_064) == 152_064:
            step = case.variants("cuda")[case.operator]
            assert callable(step)
            step()


def ncu() -> list[Row]:
    if shutil.which("ncu") is None:
        return [{"part": "ncu", "what": "Nsight Compute", "result": "ncu is not on the PATH"}]
    command = [
        *("ncu", "--csv", "--metrics", ",".join(METRICS), "--kernel-name", "regex:.*_kernel"),
        *(sys.executable, "-m", "benchmarks.gpu", "--part", "ncu target"),
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"ncu: {(found.stdout + found.stderr).strip().splitlines()[-1]}")
    return ncu_rows(found.stdout)


def ncu_rows(output: str) -> list[Row]:
    """A row for each kernel that ran, from `ncu --csv`, which prints lines of its own before the table."""
    start = output.find('"ID"')
    if start < 0:
        raise RuntimeError(f"ncu printed no table: {output.strip()[-200:]!r}")
    kernels: dict[str, tuple[str, list[str]]] = {}
    for line in csv.DictReader(io.StringIO(output[start:])):
        _, figures = kernels.setdefault(line["ID"], (line["Kernel Name"], []))
        figures.append(f"{METRICS[line['Metric Name']]} {line['Metric Value']} {line['Metric Unit']}".strip())
    return [{"part": "ncu", "what": name, "result": ", ".join(figures)} for name, figures in kernels.values()]


PARTS = ("tests", "ops", "rollout", "step", "ncu")


def run_part(part: str, folder: Path) -> list[Row]:
    """Writes the part's own file, and returns its rows for gpu_<GPU>.json."""
    machine = gpu_machine()
    name = slug(machine["gpu"])
    if part == "tests":
        return kernel_tests()
    if part == "ncu":
        return ncu()
    if part == "ops":
        rows = operators("cuda")
        write(folder / f"ops_{name}.json", "ops", machine, rows)
        (folder / f"ops_{name}.md").write_text(report(rows, machine), encoding="utf-8")
        wrong = [row for row in rows if row.get("why", "").startswith(WRONG)]
        results = [f"{row['case']}, {row['variant']}: {row['why']}" for row in wrong]
        return [{"part": "ops", "what": "results that disagree", "result": "; ".join(results) or "none"}]
    with random_model(MODEL) as path:
        if part == "rollout":
            rows, parity = rollouts(path, "cuda", ("hf", "vllm"))
            write(folder / f"rollout_{name}.json", "rollout", machine, rows)
            return parity
        case = {"case": SHAPE, "machine": machine, "rows": training_step(path, "cuda")}
        data = {"benchmark": "step", "schema": 1, "cases": [case]}
        (folder / f"step_{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        return []


def run_all(folder: Path, minutes: float) -> list[Row]:
    """Each part in a process of its own, as long as there is time."""
    deadline = time.monotonic() + 60 * minutes
    rows: list[Row] = []
    for part in PARTS:
        left = deadline - time.monotonic()
        print(f"--- {part}, {left:.0f} s left", flush=True)
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--results", str(folder)]
            process = subprocess.Popen([*command, "--rows", file.name], start_new_session=True)
            try:
                code = process.wait(max(left, 0.1))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # a profiler and what it profiles, too
                process.wait()
                rows.append({"part": part, "what": "", "result": f"failed: out of time ({minutes:g} minutes in all)"})
                continue
            if code:
                rows.append({"part": part, "what": "", "result": f"failed: exit code {code}"})
            else:
                rows += json.loads(Path(file.name).read_text(encoding="utf-8"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all parts together ({MINUTES:g})")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--part", choices=[*PARTS, "ncu target"], help="this part only, in this process")
    parser.add_argument("--rows", type=Path, help="with --part: file for its rows")
    arguments = parser.parse_args()
    if not 0 < arguments.minutes <= 60:
        parser.error(f"--minutes {arguments.minutes:g}: has to be above 0 and at most 60")
    if why := no_gpu():
        print(f"error: {why}", file=sys.stderr)
        sys.exit(2)
    if arguments.part == "ncu target":
        ncu_target()
    elif arguments.part:
        rows = run_part(arguments.part, arguments.results)
        print(json.dumps(rows, indent=1))
        if arguments.rows:
            arguments.rows.write_text(json.dumps(rows), encoding="utf-8")
    else:
        machine = gpu_machine()
        rows = run_all(arguments.results, arguments.minutes)
        file = arguments.results / f"gpu_{slug(machine['gpu'])}.json"
        write(file, "gpu", machine, rows)
        print(f"wrote {file}; python -m benchmarks.report puts it on the page")
        sys.exit(1 if any(row["result"].startswith("failed") for row in rows) else 0)


if __name__ == "__main__":
    main()
