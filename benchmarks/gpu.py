"""Everything that only a GPU can answer: `python -m benchmarks.gpu`, in the repository's folder, nothing installed.

It needs torch 2.11, triton 3.6 and transformers, or later ones. The parts, in this order:

    right    every operator against plain torch in float64, in bfloat16 and float32
    ops      every operator timed at CodeLlama-7B's and Qwen2.5-7B's shapes, after it was compared with plain torch
    step     the training step of a randomly initialised model of Qwen2.5-1.5B's shape (nothing is downloaded)
    lora     the same at Qwen2.5-7B's shape with LoRA
    rollout  the sampling engines, and the trainer against vLLM token by token
    tests    tests/ops with pytest
    ncu      Nsight Compute's counters of each operator's kernels

Each part is a process of its own, and gets half of the time that is left; the last one gets all of it. One that fails
or runs out of time says so in its row and leaves the others alone. One whose packages are missing says so, too: it is
"not run". Rows are written as they are found, to <results>/{gpu,ops,step,rollout}_<GPU>.json; parts that are not asked
for keep theirs. Exit codes: 0 done, 1 a part failed or an operator is wrong, 2 there is no GPU. A part that was not run
changes neither.
"""

import argparse
import csv
import gc
import importlib.util
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
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import KERNELS
from benchmarks.ops.cases import CASES, PLAIN, check_cases
from benchmarks.ops.measure import (
    FAILED,
    against_float64,
    bad_rows,
    ceiling_rows,
    ceilings,
    gpu_answers,
    measure_case,
    reason,
    report,
    seconds,
)
from benchmarks.rows import RESULTS, Row, this_machine, write, write_json

MINUTES = 20.0
NOT_RUN, GONE = "not run", 3
"""GONE, exit code of a part's process: its rows are written, the GPU answers it no more, another may go on."""
STEP_NEEDS = ("lazy_loader", "pydantic", "rich", "safetensors", "tokenizers", "typer")
NEEDS = {
    "step": STEP_NEEDS,
    "lora": (*STEP_NEEDS, "peft"),
    "rollout": STEP_NEEDS,
    "tests": ("pytest", "hypothesis"),
}
"""Modules beside torch, triton and transformers, by part."""
PARTS = ("right", "ops", "step", "lora", "rollout", "tests", "ncu")
RESUMED = ("right", "ops")
"""Parts with a row a case, which go on with the next case after one that took their process down."""
FIXED = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
CHANGING = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "memory moved",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "of the peak memory rate",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "of the peak of the busiest SM pipe",
    "launch__registers_per_thread": "registers",
}
SMALL_MODEL = {  # Qwen2.5-1.5B
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
LARGE_MODEL = {  # Qwen2.5-7B
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18_944,
    "vocab_size": 152_064,
    "tie_word_embeddings": False,
}
ROWS, PROMPT, COMPLETION, REPEATS = 64, 64, 128, 3
RECOMPUTING = ["model.gradient_checkpointing=true"]


class StepCase(NamedTuple):
    name: str
    sizes: dict[str, Any]
    paths: dict[str, list[str]]


STEPS = {
    "step": StepCase(
        "Qwen2.5-1.5B's shape, random weights",
        SMALL_MODEL,
        {
            "fast": [],
            "padded, recomputing": [
                *("model.impl=padded", *RECOMPUTING),
                f"rl.micro_batch_tokens={8 * (PROMPT + COMPLETION)}",  # eight rows at once, the paper's per GPU
            ],
        },
    ),
    "lora": StepCase(
        "Qwen2.5-7B's shape, random weights, LoRA of rank 16",
        LARGE_MODEL,
        {"fast, recomputing": ["lora.rank=16", *RECOMPUTING], "fast": ["lora.rank=16"]},  # which needs less comes first
    ),
}


# --- the machine ------------------------------------------------------------------------------------------------------


def nvidia_smi(names: Sequence[str]) -> list[str]:
    """What it says about torch's device 0, whatever CUDA_VISIBLE_DEVICES leaves. Raises OSError with one line."""
    if shutil.which("nvidia-smi") is None:
        raise OSError("nvidia-smi is not on the PATH")
    device = str(getattr(torch.cuda.get_device_properties(0), "uuid", "")).removeprefix("GPU-")
    query = [f"--query-gpu={','.join(names)}", "--format=csv,noheader", f"--id={f'GPU-{device}' if device else 0}"]
    try:
        found = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        raise OSError("nvidia-smi gave no answer in 20 s") from None
    values = found.stdout.strip().split(", ")
    if found.returncode or len(values) != len(names):
        raise OSError(f"nvidia-smi answered {(found.stdout + found.stderr).strip()[:200]!r}")
    return values


def gpu_machine() -> dict[str, str]:
    properties = torch.cuda.get_device_properties(0)
    machine = this_machine("cuda") | {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "L2": f"{properties.L2_cache_size / 2**20:g} MiB",
        "cuda": str(torch.version.cuda),
    }
    try:
        driver, sm, memory, power = nvidia_smi(FIXED)
        machine |= {"driver": driver, "clocks": f"{sm} SM / {memory} memory", "power limit": power}
    except OSError as error:
        machine |= {"driver": f"unknown: {error}", "clocks": "unknown"}
    for name in ("triton", "transformers", "peft", "vllm"):
        if importlib.util.find_spec(name):
            machine[name] = version(name)
    return machine


def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # vLLM for the CPU is named otherwise
        return "of an unknown version"


def state() -> str:
    """Clocks, temperature and power of this moment."""
    try:
        sm, memory, temperature, power = nvidia_smi(CHANGING)
        return f"{sm} SM, {memory} memory, {temperature} C, {power}"
    except OSError as absent:
        try:
            return f"{torch.cuda.clock_rate(0)} MHz SM, {torch.cuda.temperature(0)} C"
        except Exception:  # which library it asks, and what that raises, differs between versions of torch
            return f"unknown: {absent}"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def no_gpu() -> str:
    """Why this machine cannot run it; empty where it can."""
    if torch.cuda.is_available():
        return ""
    cause = "nvidia-smi is not on the PATH" if shutil.which("nvidia-smi") is None else "there is a driver"
    return f"no GPU: torch {torch.__version__} (CUDA {torch.version.cuda}) sees no CUDA device, and {cause}"


# --- the parts --------------------------------------------------------------------------------------------------------


class Found:
    """The rows of one part in gpu_<GPU>.json. Every row is on disk at once: a part may be killed."""

    def __init__(self, part: str, file: Path) -> None:
        self.part, self._file = part, file

    @property
    def rows(self) -> list[Row]:
        return [row for row in read_rows(self._file) if row["part"] == self.part]

    def add(self, what: str, result: str, *, part: str = "", **more: Any) -> None:
        data = json.loads(self._file.read_text(encoding="utf-8"))
        data["rows"].append({"part": part or self.part, "what": what, "result": result, "gpu state": state(), **more})
        write_json(self._file, data)
        print(f"{what}: {result}", flush=True)

    def add_failure(self, what: str, error: Exception) -> None:
        """Ends the process where the GPU no longer answers it."""
        traceback.print_exception(error)
        self.add(what, reason(error))
        if not gpu_answers():
            sys.exit(GONE)

    def beside(self, benchmark: str) -> Path:
        """The file of another benchmark's rows."""
        return self._file.with_name(self._file.name.replace("gpu_", f"{benchmark}_", 1))


def read_rows(file: Path) -> list[Row]:
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return rows


def operators_right(found: Found) -> None:
    for case, dtype in check_cases()[len(found.rows) :]:
        name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
        try:
            by_variant = against_float64(case, "cuda", dtype)
            text = "; ".join(f"{variant}: {result}" for variant, result in by_variant.items())
            bad = any(bad_rows([{"why": result}]) for result in by_variant.values())
            found.add(name, f"{FAILED}: {text}" if bad else text)
        except Exception as error:
            found.add_failure(name, error)
        empty_cache()


def operators_timed(found: Found) -> None:
    machine, file, done = gpu_machine(), found.beside("ops"), len(found.rows)
    cases = [case for case in CASES if "cuda" in case.devices]
    ceiling = ceilings("cuda", "wall")
    # goes on where there is something: what the process before measured is in the file
    rows = read_rows(file) if done and file.is_file() else list(ceiling_rows(ceiling))
    for case in cases[done:]:
        try:
            new = measure_case(case, "cuda", ceiling, budget=1.0)
            now = state()
            rows += [row | {"gpu state": now} for row in new]
            found.add(case.name, operator_result(case.operator, new))
        except Exception as error:
            rows.append({"case": case.name, "variant": case.operator, "why": reason(error)})
            found.add_failure(case.name, error)
        finally:
            write(file, "ops", machine, rows)
            file.with_suffix(".md").write_text(report(rows, machine), encoding="utf-8")
        empty_cache()


def operator_result(operator: str, rows: list[Row]) -> str:
    """What matters of a case: ours and plain torch's time; and who is wrong, which fails the part if it is ours."""
    two = [row for row in rows if row["variant"] in (operator, PLAIN) and "p50_ms" in row]
    times = [f"{row['variant']} {row['p50_ms']:g} ms" for row in two]
    bad = bad_rows(rows)
    text = "; ".join([*times, *(f"{row['variant']}: {row['why']}" for row in bad)])
    return f"{FAILED}: {text}" if any(row["variant"] == operator for row in bad) else text


def empty_cache() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def random_model(sizes: dict[str, Any]) -> Iterator[Path]:
    """A folder with an untrained model and the quickstart's tokenizer. Made on the GPU: a CPU takes minutes for it."""
    import transformers

    from carft_fast.data import build_tokenizer

    with tempfile.TemporaryDirectory(prefix="carft-benchmark-") as folder:
        config = transformers.Qwen2Config(**sizes)
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        del model
        empty_cache()
        build_tokenizer().save_pretrained(folder)
        yield Path(folder)


def model_config(path: Path, *options: str) -> Any:
    from carft_fast.cli import QUICKSTART_CONFIG
    from carft_fast.config import load_config

    fixed = [
        *(f"model.path={path}", "model.device=cuda", "model.compute_dtype=bfloat16", "data.max_length=512"),
        *(f"rollout.max_new_tokens={COMPLETION}", f"rollout.batch_size={ROWS}", "data.eval_rows=1"),
        *(f"rl.batch_size={ROWS}", f"rl.mini_batch_size={ROWS}", "rl.ppo_epochs=2", "rl.micro_batch_tokens=8192"),
    ]
    return load_config(str(QUICKSTART_CONFIG), [*fixed, *options])


def step_inputs() -> Any:
    from benchmarks.step import random_inputs
    from carft_fast.data import build_tokenizer

    # the annotated chain, too, is as long as a prompt: what a step costs hangs on tokens, not on what they say
    return random_inputs(ROWS, PROMPT, len(build_tokenizer()), torch.Generator().manual_seed(0))


def training_step(found: Found) -> None:
    """A row of the step benchmark for each path of the part's case."""
    from benchmarks.step import matmul_ceiling

    case, machine, file = STEPS[found.part], gpu_machine(), found.beside("step")
    known = json.loads(file.read_text(encoding="utf-8"))["cases"] if file.is_file() else []
    others = [other for other in known if other["case"] != case.name]
    rows: list[Row] = []
    ceiling = matmul_ceiling(torch.bfloat16, "cuda")
    with random_model(case.sizes) as path:
        for name, options in case.paths.items():
            try:
                row = step_row(model_config(path, *options), str(path), ceiling) | {"path": name, "gpu state": state()}
            except Exception as error:
                found.add_failure(name, error)
            else:
                rows.append(row)
                cases = [*others, {"case": case.name, "machine": machine, "rows": rows}]
                write_json(file, {"benchmark": "step", "schema": 1, "cases": cases})
                peak = row["update_peak_extra_mb"] / 1024
                found.add(
                    name, f"{row['step_seconds']:.3g} s a step of {ROWS} rollouts, {peak:.1f} GiB beyond the model"
                )
            empty_cache()


def step_row(config: Any, path: str, ceiling: float) -> Row:
    from benchmarks.step import RIGHT, Prepared, timings
    from carft_fast.models import ModelCost, StepShape, fast_step

    prepared = Prepared(config, path, step_inputs(), [RIGHT] * ROWS, "cuda")
    prepared.update()  # warms up
    phases = timings([prepared.turn() for _ in range(REPEATS)])
    peak = peak_of(prepared.both)
    lengths = [PROMPT] * ROWS
    work = fast_step(ModelCost.of(prepared.policy.lm), StepShape(lengths, lengths, lengths, config.rl.ppo_epochs))
    total = sum(phases["seconds"].values())
    return {
        "sampler": "none",
        **phases,
        "step_seconds": total,
        "samples_per_second": ROWS / total,
        "utilisation": (work["log-probs"].flops + work["update"].flops) / total / ceiling,
        "update_peak_extra_mb": peak,
        "beyond_gradients_mb": peak - prepared.gradients_mb,
    }


def peak_of(call: Callable[[], Any]) -> float:
    """MiB beyond what was there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def rollouts(found: Found) -> None:
    """The rows of the engines; and of trainer against vLLM."""
    from benchmarks.rollout import sample
    from carft_fast.models import load_model, load_tokenizer
    from carft_fast.rollout import SamplingParams, build_engine
    from carft_fast.training import check_agreement

    case, machine = STEPS["step"], gpu_machine()
    prompts = [row.prompt_ids for row in step_inputs().rows]
    rows: list[Row] = []
    with random_model(case.sizes) as path:
        config = model_config(path)
        model = load_model(config, str(path), torch.device("cuda"), heads=False)
        tokenizer = load_tokenizer(config.model)
        for name in ("hf", "vllm"):
            if name == "vllm" and (why := missing(["vllm"])):
                found.add("vllm", f"{NOT_RUN}: {why}", part="parity with vLLM")
                continue
            try:
                engine_config = model_config(path, f"rollout.engine={name}")
                engine = build_engine(engine_config, model, tokenizer)
                try:
                    engine.sync(model)
                    if name == "vllm":
                        agreed = check_agreement(engine, model, prompts, engine_config)
                        figures = f"mean {agreed.mean:.2g}, largest {agreed.max:.2g} nats over {agreed.tokens} tokens"
                        found.add(name, figures, part="parity with vLLM", agreement=agreed.max)
                    engine.generate(prompts[:8], SamplingParams(8))
                    rates = [sample(engine, prompts, seed)["tokens_per_second"] for seed in range(REPEATS)]
                    sync = statistics.median(seconds(partial(engine.sync, model), "cuda") for _ in range(3))
                finally:
                    engine.close()
                del engine
            except Exception as error:
                found.add_failure(name, error)
                continue
            rate, ends = statistics.median(rates), [min(rates), max(rates)]
            row = {"model": case.name, "dtype": "bfloat16", "engine": name, "machine": machine, "gpu state": state()}
            rows.append({**row, "tokens_per_second": rate, "range": ends, "sync_seconds": sync})
            write(found.beside("rollout"), "rollout", machine, rows)
            found.add(name, f"{rate:.0f} tokens a second")
            gc.collect()


def kernel_tests(found: Found) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "tests/ops", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": with_path(KERNELS)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    print(done.stdout[-3000:], done.stderr[-3000:])
    last = (done.stdout + done.stderr).strip().splitlines()[-1]
    found.add("tests/ops", f"{FAILED}: {last}" if done.returncode else last)


def ncu_target() -> None:
    """What is looked at: each operator of Qwen2.5-7B's shapes once, ours only."""
    for case in CASES:
        if "cuda" in case.devices and case.shape.get("V", 152_064) == 152_064:
            step = case.variants("cuda")[case.operator]
            assert callable(step)
            step()


def ncu(found: Found) -> None:
    command = [
        *("ncu", "--csv", "--clock-control", "none", "--metrics", ",".join(METRICS)),
        *("--kernel-name", "regex:.*_kernel", sys.executable, "-m", "benchmarks.gpu", "--part", "ncu target"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ncu: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
    for name, figures in ncu_rows(done.stdout):
        found.add(name, figures)


def ncu_rows(output: str) -> list[tuple[str, str]]:
    """Each kernel that ran and its figures, from `ncu --csv`, which prints lines of its own before the table."""
    start = output.find('"ID"')
    if start < 0:
        raise RuntimeError(f"ncu printed no table: {output.strip()[-200:]!r}")
    kernels: dict[str, tuple[str, list[str]]] = {}
    for line in csv.DictReader(io.StringIO(output[start:])):
        _, figures = kernels.setdefault(line["ID"], (line["Kernel Name"], []))
        figures.append(f"{METRICS[line['Metric Name']]} {line['Metric Value']} {line['Metric Unit']}".strip())
    return [(name, ", ".join(figures)) for name, figures in kernels.values()]


RUN: dict[str, Callable[[Found], None]] = {
    "right": operators_right,
    "ops": operators_timed,
    "step": training_step,
    "lora": training_step,
    "rollout": rollouts,
    "tests": kernel_tests,
    "ncu": ncu,
}


# --- running them -----------------------------------------------------------------------------------------------------


def missing(modules: Sequence[str]) -> str:
    """Which of them are not here, as a clause; empty where all are."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if len(absent) > 1:
        return f"{', '.join(absent[:-1])} and {absent[-1]} are not installed"
    return f"{absent[0]} is not installed" if absent else ""


def run_part(part: str, found: Found) -> None:
    try:
        RUN[part](found)
    except Exception as error:
        package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if package in ("", "benchmarks", "carft_fast", "carft_kernels"):
            found.add_failure("", error)
        else:
            found.add("", f"{NOT_RUN}: {error.name} is not installed")


def start_file(folder: Path, parts: Sequence[str]) -> Path:
    """gpu_<GPU>.json without rows of `parts`. Other parts' rows stay, with the machine they were measured on."""
    machine = gpu_machine()
    file = result_file(folder)
    old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"rows": []}
    cleared = {*parts, *(["parity with vLLM"] if "rollout" in parts else [])}
    write(file, "gpu", machine, [{"machine": old["machine"], **r} for r in old["rows"] if r["part"] not in cleared])
    return file


def result_file(folder: Path) -> Path:
    return folder / f"gpu_{slug(torch.cuda.get_device_name(0))}.json"


def process_of(part: str, folder: Path, limit: float) -> int | None:
    """The exit code of a part's process; None where it took longer than `limit` seconds and was killed."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--results", str(folder)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(max(limit, 0.1))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # a profiler and what it profiles, too
            process.wait()


def run_all(parts: Sequence[str], folder: Path, minutes: float) -> list[Row]:
    """Each part in a process of its own, as long as there is time; the rows of all of them."""
    file = start_file(folder, parts)
    deadline = time.monotonic() + 60 * minutes
    for part in parts:
        found, start = Found(part, file), time.monotonic()
        why = missing(NEEDS.get(part, ()))
        if part == "ncu" and shutil.which("ncu") is None:
            why = "ncu is not on the PATH"
        if why:
            found.add("", f"{NOT_RUN}: {why}")
            continue
        limit = (deadline - start) / (1 if part == parts[-1] else 2)
        print(f"--- {part}: at most {max(limit, 0):.0f} s", flush=True)
        barren = 0
        while barren < 2:  # processes in a row that ended before their first row
            before = len(found.rows)
            code = process_of(part, folder, start + limit - time.monotonic())
            if code is None:
                found.add("out of time", f"{FAILED}: after {max(limit, 0):.0f} s, {minutes:g} minutes in all")
            elif code not in (0, GONE):
                barren = barren + 1 if len(found.rows) == before else 0
                found.add(f"process {len(found.rows) + 1}", f"{FAILED}: exit code {code}")
            if not code or part not in RESUMED:
                break
    return [row for row in read_rows(file) if "machine" not in row]


def summary(parts: Sequence[str], rows: list[Row]) -> list[str]:
    """What became of each part, a line for each kind."""
    lines = []
    for kind, word in ((FAILED, "failed"), (NOT_RUN, "not run")):
        found = [row for row in rows if row["result"].startswith(kind)]
        texts = [
            f"{row['part']}{' ' * bool(row['what'])}{row['what']} ({row['result'][len(kind) + 2 :]})" for row in found
        ]
        lines += [f"{word}: {text}" for text in texts]
    bad = {row["part"] for row in rows if row["result"].startswith((FAILED, NOT_RUN))}
    return [f"done: {', '.join(part for part in parts if part not in bad) or 'nothing'}", *lines]


def use_wheels(folder: Path) -> None:
    """For the processes of the parts. Raises ValueError for a folder that cannot serve."""
    compiled = sorted(folder.glob("pydantic_core/_pydantic_core*.so"))
    if not compiled:
        raise ValueError(f"{folder} holds no pydantic_core: make gpu-wheels fills build/gpu_wheels")
    if compiled[0].name.removeprefix("_pydantic_core") not in EXTENSION_SUFFIXES:
        raise ValueError(f"{compiled[0]} is for another Python than this, {sys.version.split()[0]}")
    os.environ["PYTHONPATH"] = with_path(folder)
    sys.path.insert(0, str(folder.resolve()))


def with_path(folder: Path) -> str:
    """PYTHONPATH with another folder in front."""
    return os.pathsep.join(filter(None, [str(folder.resolve()), os.environ.get("PYTHONPATH")]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all parts together ({MINUTES:g})")
    parser.add_argument("--parts", default=",".join(PARTS), help="these only, in this order")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows (benchmarks/results)")
    parser.add_argument(
        "--wheels", type=Path, help="folder of packages that are missing here; make gpu-wheels makes one"
    )
    parser.add_argument("--part", choices=[*PARTS, "ncu target"], help=argparse.SUPPRESS)  # in this process
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts {arguments.parts}: {unknown[0]!r} is no part; allowed are {', '.join(PARTS)}")
    if not 0 < arguments.minutes <= 60:
        parser.error(f"--minutes {arguments.minutes:g}: has to be above 0 and at most 60")
    if arguments.wheels:
        try:
            use_wheels(arguments.wheels)
        except ValueError as error:
            parser.error(f"--wheels: {error}")
    if why := no_gpu():
        print(f"error: {why}", file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the part's process ends with this one
    if arguments.part == "ncu target":
        ncu_target()
    elif arguments.part:
        run_part(arguments.part, Found(arguments.part, result_file(arguments.results)))
    else:
        rows = run_all(parts, arguments.results, arguments.minutes)
        print("\n".join([*summary(parts, rows), f"rows are in {arguments.results}"]))
        sys.exit(1 if any(row["result"].startswith(FAILED) for row in rows) else 0)


if __name__ == "__main__":
    main()
