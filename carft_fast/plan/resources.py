"""Does a run fit on a GPU, and how long does a step take: the answer from a step on fake tensors and the cost model.

Memory is linear in the layers, phase by phase: a step is run at two depths and extrapolated.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from carft_fast.config import Config, replaced, to_toml
from carft_fast.core import InputError, TrainingError
from carft_fast.models import ModelCost, StepShape, Work, fast_step, load_lm_config, sft_step
from carft_fast.plan.gpus import USABLE, Gpu, find_gpu
from carft_fast.rollout import LONGEST as LONGEST_GUESS

LAYERS = (4, 8)
PATHS = ("packed", "flash_attention_2", "eager")
SLEEPING = 1 << 30
"""Bytes that an engine which sleeps is taken to keep."""
SAMPLING = ("rollout", "evaluation")
"""Phases in which the sampler works."""

Parts = Mapping[str, float]


LONGEST, SHORT = 1.0, 0.25
"""Lengths of completions, over `rollout.max_new_tokens`."""
TOKENS_PER_FORWARD = (2, 4)
WASTED_PER_TOKEN = 0.5
"""Guessed tokens that do not stand, for each token of a completion. An assumption: 0.1 on the quickstart's last steps,
0.54 of SmolLM2 after two epochs of SFT."""


@dataclass(frozen=True)
class PhaseEstimate:
    trainer: float
    """Peak, bytes on each GPU."""
    parts: Parts
    """Of the peak, largest first."""
    sampler: float
    """Bytes on each GPU, beside the trainer's."""
    launches: int = 0
    syncs: int = 0

    @property
    def total(self) -> float:
        return self.trainer + self.sampler


@dataclass(frozen=True)
class DraftsEstimate:
    """What `rollout.draft_budget` leaves to guess, and what it would save."""

    budget: int
    sequences: int
    """That a GPU decodes at once."""
    seconds: Mapping[int, tuple[float, float]]
    """The rollout phase's, as `StageEstimate.seconds`, by tokens that a forward yields; those the budget allows."""

    @property
    def guesses(self) -> int:
        """Most tokens that are guessed of a sequence in a forward."""
        return min(LONGEST_GUESS, self.budget // self.sequences - 1)


@dataclass(frozen=True)
class StageEstimate:
    phases: Mapping[str, PhaseEstimate]
    micro_batch_tokens: int
    largest_micro_batch_tokens: int | None
    """The largest that fits, in steps of data.max_length; None where not even one sequence does."""
    whole_mini_batch: bool
    """Whether the largest holds all of a GPU's sequences, so that more changes nothing."""
    seconds: tuple[Mapping[str, float], Mapping[str, float]]
    """A step's, by phase: with sequences as long as they may be, and with completions of a quarter of that."""
    drafts: DraftsEstimate | None
    """None without drafts."""

    @property
    def peak(self) -> float:
        return max(phase.total for phase in self.phases.values())


@dataclass(frozen=True)
class Estimate:
    gpu: Gpu
    gpus: int
    strategy: str
    sampler: str
    """What samples, and its memory while it does."""
    sampler_problem: str
    """Why it cannot; empty where it can."""
    stages: Mapping[str, StageEstimate]

    @property
    def usable(self) -> float:
        """Bytes of each GPU."""
        return self.gpu.memory * USABLE

    def fits(self, stage: str | None = None) -> bool:
        stages = [self.stages[stage]] if stage else self.stages.values()
        return not self.sampler_problem and all(found.peak <= self.usable for found in stages)


def estimate(config: Config, *, gpu: str, gpus: int = 1, stages: Sequence[str] = ("sft", "rl")) -> Estimate:
    """What `stages` take on `gpus` GPUs of that name. Reads the model's config, and no weights.

    Raises InputError for an unknown GPU, and for a config whose CUDA path this does not follow.
    """
    card = find_gpu(gpu)
    if gpus < 1:
        raise InputError(f"gpus = {gpus}: expected at least 1")
    config = _checked(config, gpus)
    lm_config = load_lm_config(config.model)
    cost = ModelCost.of_config(lm_config, trust_remote_code=config.model.trust_remote_code)
    sampler = Sampler(config, cost, lm_config, card)
    # each stage has a process of its own: two cores, two stages
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda stage: _stage(config, stage, card, gpus, cost, sampler), stages))
    return Estimate(
        card,
        gpus,
        config.distributed.strategy if gpus > 1 else "one process",
        sampler.description,
        sampler.problem,
        dict(zip(stages, found, strict=True)),
    )


def _checked(config: Config, gpus: int) -> Config:
    model, how = config.model, config.distributed.strategy
    if model.device == "cpu":
        raise InputError('model.device = "cpu": a plan is for a GPU; allowed are "auto" and "cuda"')
    if model.impl != "fast":
        raise InputError(f'model.impl = "{model.impl}": a plan follows the packed path alone; allowed is "fast"')
    if model.attention not in PATHS:
        raise InputError(
            f'model.attention = "{model.attention}": what its kernels take is not known without a GPU; allowed in a '
            f"plan are {', '.join(PATHS)}"
        )
    for name, stage in (("sft", config.sft), ("rl", config.rl)):
        if stage.optimizer != "adamw":
            raise InputError(f'{name}.optimizer = "{stage.optimizer}": a plan follows "adamw" alone')
    if gpus > 1 and how in ("zero2", "zero3"):
        raise InputError(
            f'distributed.strategy = "{how}": a plan does not run DeepSpeed; allowed are "ddp" and "fsdp2" '
            "(`--dry-run` estimates ZeRO by formulas)"
        )
    attention = "packed" if model.attention == "flash_attention_2" else model.attention  # as much memory
    return replaced(
        config,
        {
            "model.device": "auto",
            "model.compile": False,
            "model.attention": attention,
            "distributed.strategy": "fsdp2" if how == "auto" else how,
        },
    )


class Sampler:
    """Memory of what samples, on each GPU."""

    def __init__(self, config: Config, cost: ModelCost, lm_config: Any, gpu: Gpu) -> None:
        rollout = config.rollout
        half = rollout.dtype == "bfloat16" or (rollout.dtype == "auto" and config.model.compute_dtype == "bfloat16")
        element = 2 if half else 4
        text = lm_config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        row = 2 * config.data.max_length * text.num_hidden_layers * heads * size * element
        self.sleeping, self.problem = 0.0, ""
        if rollout.engine == "hf":
            casts = 2 * cost.all_weights if config.model.compute_dtype == "bfloat16" and not config.lora.rank else 0
            logits = 3 * 4 * rollout.batch_size * cost.vocabulary
            self.working = float(rollout.batch_size * row + casts + logits)
            self.description = f"transformers, {self.working / 2**30:.1f} GiB of KV cache, casts and logits"
            return
        elsewhere = rollout.engine == "vllm-server" and (rollout.servers or rollout.server_devices)
        if elsewhere:
            self.working, self.description = 0.0, "vLLM servers on GPUs of their own"
            return
        weights = cost.all_weights * element
        self.working = rollout.memory_fraction * gpu.memory
        text = f"rollout.memory_fraction = {rollout.memory_fraction:g}"
        if rollout.kv_cache_gib is not None:
            self.working = weights + rollout.kv_cache_gib * 2**30
            text = f"weights and rollout.kv_cache_gib = {rollout.kv_cache_gib:g}"
        self.sleeping = min(self.working, SLEEPING) if rollout.sleep_level else self.working
        self.description = (
            f"vLLM, {self.working / 2**30:.1f} GiB ({text}), of them {weights / 2**30:.1f} of weights; "
            f"{self.sleeping / 2**30:.1f} GiB while it sleeps (rollout.sleep_level = {rollout.sleep_level})"
        )
        needed = weights + row + SLEEPING
        if self.working < needed:
            self.problem = (
                f"vLLM's {self.working / 2**30:.1f} GiB ({text}) do not hold its weights, one sequence and 1 GiB to "
                f"work in: {needed / 2**30:.1f} GiB"
            )


def _stage(config: Config, stage: str, gpu: Gpu, gpus: int, cost: ModelCost, sampler: Sampler) -> StageEstimate:
    settings = config.sft if stage == "sft" else config.rl
    rows = -(-(config.sft.batch_size if stage == "sft" else config.rl.mini_batch_size) // gpus)
    given = min(rows, settings.micro_batch_tokens // config.data.max_length)
    with Steps(config, stage, gpu, gpus, cost.layers, rows) as steps:
        found = steps.of(given)
        launches = steps.counts(given)
        largest = _largest(lambda k: _needed(steps.of(k), sampler) - gpu.memory * USABLE, given, rows)
    phases = {
        name: PhaseEstimate(
            size, dict(sorted(parts.items(), key=lambda x: -x[1])), _share(sampler, name), *launches.get(name, (0, 0))
        )
        for name, (size, parts) in found.items()
    }
    return StageEstimate(
        phases,
        settings.micro_batch_tokens,
        largest * config.data.max_length if largest else None,
        largest == rows,
        (_seconds(config, stage, gpu, gpus, cost, LONGEST), _seconds(config, stage, gpu, gpus, cost, SHORT)),
        _drafts(config, stage, gpu, gpus, cost),
    )


def _needed(found: Mapping[str, tuple[float, Parts]], sampler: Sampler) -> float:
    return max(size + _share(sampler, name) for name, (size, _) in found.items())


def _largest(excess: Callable[[int], float], given: int, most: int) -> int:
    """The largest k of at most `most` with excess(k) <= 0, beginning at `given`; 0 where there is none.

    Excess grows with k, nearly as a straight line.
    """
    at = {k: excess(k) for k in {given, most}}
    if at[most] <= 0:
        return most
    low, high = max((k for k, e in at.items() if e <= 0), default=0), min(k for k, e in at.items() if e > 0)
    while high - low > 1:
        if low in at:
            guess = low + int((high - low) * -at[low] / (at[high] - at[low]))
        else:
            guess = high // 2 if len(at) < 3 else int(_zero(at))
        guess = min(max(guess, low + 1), high - 1)
        at[guess] = excess(guess)
        low, high = (guess, high) if at[guess] <= 0 else (low, guess)
    return low


def _zero(at: Mapping[int, float]) -> float:
    """Where a line through the two smallest k is 0."""
    (a, excess_a), (b, excess_b) = sorted(at.items())[:2]
    return a - excess_a * (b - a) / ((excess_b - excess_a) or 1)


def _share(sampler: Sampler, phase: str) -> float:
    """Of the sampler; it starts behind the load."""
    return 0.0 if phase == "load" else sampler.working if phase in SAMPLING else sampler.sleeping


class Steps:
    """Steps of one stage, for any number of sequences in a micro-batch, extrapolated to all layers."""

    def __init__(self, config: Config, stage: str, gpu: Gpu, gpus: int, layers: int, rows: int) -> None:
        """`rows`: sequences in one process's mini-batch."""
        self._config, self._stage, self._gpus, self._layers, self._rows = config, stage, gpus, layers, rows
        most = min(LAYERS[1], layers)
        self._depths = sorted({min(LAYERS[0], most), most})
        self._found: dict[int, list[dict[str, Any]]] = {}
        self._worker = Worker(gpus, gpu.capability)

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()

    def _count(self, k: int) -> int:
        """Micro-batches that are run: gradients of a first one are there in a second; more change nothing."""
        return min(2, -(-self._rows // k))

    def _deep(self, k: int, read: Callable[[dict[str, Any]], Parts]) -> dict[str, Parts]:
        """Phase -> numbers, at the model's own depth."""
        if k not in self._found:
            settings = full_micro_batches(self._config, self._stage, k, self._count(k), self._gpus)
            self._found[k] = [self._worker.step(settings, self._stage, depth) for depth in self._depths]
        first, last = self._found[k][0], self._found[k][-1]
        at = self._depths[0], self._depths[-1]
        return {name: _line(at, (read(first[name]), read(last[name])), self._layers) for name in last if name}

    def of(self, k: int) -> dict[str, tuple[float, Parts]]:
        """Phase -> peak and its parts."""
        found: dict[str, tuple[float, Parts]] = {}
        for name, parts in self._deep(k, lambda phase: phase["parts"]).items():
            phase, size = name.partition(":")[0], sum(parts.values())
            if size >= found.get(phase, (0.0, {}))[0]:
                found[phase] = size, parts
        return found

    def counts(self, k: int) -> dict[str, tuple[int, int]]:
        """Phase -> launches and waits; micro-batches and mini-batches that are not run count as the others."""
        rl = self._config.rl
        updates = -(-rl.batch_size // rl.mini_batch_size) if self._stage == "rl" else 1
        factor = {"load": 1.0, "forward": updates, "update": updates}
        more = -(-self._rows // k) / self._count(k)
        found: dict[str, tuple[int, int]] = {}
        for name, counts in self._deep(k, lambda phase: {n: phase[n] for n in ("launches", "syncs")}).items():
            phase = name.partition(":")[0]
            times = factor.get(phase, 1.0) * (1.0 if phase == "load" or name.endswith("optimizer") else more)
            before = found.get(phase, (0, 0))
            found[phase] = before[0] + round(times * counts["launches"]), before[1] + round(times * counts["syncs"])
        return found


def _line(at: tuple[int, int], values: tuple[Parts, Parts], x: int) -> Parts:
    (x1, x2), (y1, y2) = at, values
    steps = (x - x1) / (x2 - x1) if x2 > x1 else 0.0
    return {n: max(0.0, y1.get(n, 0) + steps * (y2.get(n, 0) - y1.get(n, 0))) for n in {**y1, **y2}}


def full_micro_batches(config: Config, stage: str, rows: int, count: int, gpus: int) -> Config:
    """A step of `count` micro-batches in each process, of `rows` sequences of data.max_length tokens each."""
    group = config.rollout.samples_per_prompt if stage == "rl" else 1
    n = -(-rows * count * gpus // group) * group
    values = {f"{stage}.batch_size": n, f"{stage}.micro_batch_tokens": rows * config.data.max_length}
    return replaced(config, values | ({"rl.mini_batch_size": n} if stage == "rl" else {}))


class Worker:
    """The process of `plan.worker`, which answers one request after the other."""

    def __init__(self, processes: int, capability: tuple[int, int]) -> None:
        environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "1"}
        command = [sys.executable, "-P", "-m", "carft_fast.plan.worker", str(processes), *map(str, capability)]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def step(self, config: Config, stage: str, layers: int) -> dict[str, Any]:
        """Phase -> peak, parts, launches and syncs. Raises what the stage raised."""
        new = config.rollout.max_new_tokens
        asked = {"config": to_toml(config), "stage": stage, "layers": layers}
        asked |= {"prompt": config.data.max_length - new, "completion": new}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            _, error = self._process.communicate()
            raise TrainingError(f"the plan's process ended with exit code {self._process.returncode}:\n{error[-4000:]}")
        found = json.loads(line)
        if "input_error" in found:
            raise InputError(found["input_error"])
        if "error" in found:
            raise TrainingError(f"the plan's process failed:\n{found['error'][-4000:]}")
        return dict(found)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def _drafts(config: Config, stage: str, gpu: Gpu, gpus: int, cost: ModelCost) -> DraftsEstimate | None:
    if stage == "sft" or not config.rollout.drafting:
        return None
    rollout = config.rollout
    limits = DraftsEstimate(rollout.draft_budget, min(rollout.batch_size, -(-config.rl.batch_size // gpus)), {})
    checked = 1 + limits.guesses  # tokens of a sequence in a forward, at most

    def of(length: float, tokens: int) -> float:
        wasted = min(WASTED_PER_TOKEN, checked / tokens - 1)
        return _seconds(config, stage, gpu, gpus, cost, length, tokens, wasted)["rollout"]

    seconds = {tokens: (of(LONGEST, tokens), of(SHORT, tokens)) for tokens in TOKENS_PER_FORWARD if tokens <= checked}
    return replace(limits, seconds=seconds)


def _seconds(
    config: Config,
    stage: str,
    gpu: Gpu,
    gpus: int,
    cost: ModelCost,
    length: float,
    tokens_per_forward: float = 1.0,
    wasted_per_token: float = 0.0,
) -> dict[str, float]:
    """Of a step, by phase."""
    new = max(1, round(config.rollout.max_new_tokens * length))
    prompt = config.data.max_length - config.rollout.max_new_tokens
    batch = config.sft.batch_size if stage == "sft" else config.rl.batch_size
    rows = -(-batch // gpus)
    settings = config.sft if stage == "sft" else config.rl
    mini = rows if stage == "sft" else -(-config.rl.mini_batch_size // gpus)
    one = mini * (prompt + new) <= settings.micro_batch_tokens
    recompute = config.model.gradient_checkpointing
    shape = StepShape(
        [prompt] * rows,
        [new] * rows,
        [new] * rows,
        epochs=config.rl.ppo_epochs,
        updates_per_epoch=-(-rows // mini),
        decode_batch=config.rollout.batch_size,
        shards=gpus if config.distributed.strategy == "fsdp2" else 1,
        tokens_per_forward=tokens_per_forward,
        wasted_per_token=wasted_per_token,
    )
    work: Mapping[str, Work]
    if stage == "sft":
        work = {"sft": sft_step(cost, shape, recompute=recompute)}
    else:
        work = fast_step(cost, shape, recompute=recompute, one_micro_batch=one)
    return {phase: gpu.seconds(of_phase) for phase, of_phase in work.items()}
