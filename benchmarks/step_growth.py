"""How time and memory of a training step grow: with its tokens, the vocabulary, the rollouts of a device.

Part of `make bench-step`. Writes its share of benchmarks/results/step_cpu.{json,md}.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.ops.measure import seconds
from benchmarks.step import (
    DEVICE_AT_ONCE,
    PATHS,
    RIGHT,
    Inputs,
    Prepared,
    Sampler,
    case_config,
    machine,
    parser_of,
    peaks_mb,
    random_inputs,
)
from benchmarks.step_report import BASELINE, ROLLOUT_VOCABULARY, load, report, save
from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config import Config, load_config
from carft_fast.core import Console
from carft_fast.data import build_model_config, build_tokenizer
from carft_fast.models import load_model
from carft_fast.training import prepare

SLOPE_TOKENS = (2048, 4096, 8192, 16384)
VOCABULARIES = (8_192, 32_768, 131_072)
ROLLOUTS = (4, 8, 16, 32, 64)
SMOLLM2_ROLLOUTS = (8, 16, 32)
ROLLOUT_PATHS = {path: PATHS[path] for path in ("fast, recomputing", BASELINE)}
SMOLLM2_PATHS = {
    "fast, recomputing": PATHS["fast, recomputing"],
    "fast, recomputing, one micro-batch": [*PATHS["fast, recomputing"], DEVICE_AT_ONCE],
    BASELINE: PATHS[BASELINE],
}


def slope(repeats: int) -> list[dict[str, float]]:
    """Seconds of look and update as the tokens of a step double: the quickstart model, sequences of 128 tokens."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for tokens in SLOPE_TOKENS:
        n = tokens // 128
        config = load_config(
            str(QUICKSTART_CONFIG),
            # one micro-batch: cut into several, a step makes one forward more
            [f"rl.batch_size={n}", f"rl.mini_batch_size={n}", f"rl.micro_batch_tokens={tokens}", "rl.ppo_epochs=2"],
        )
        prepared = Prepared(config, "synthetic", random_inputs(n, 64, 97, generator), [RIGHT] * n)
        prepared.update()
        times = [seconds(lambda p=prepared: (p.look(), p.update())) for _ in range(repeats)]
        result.append({"tokens": tokens, "seconds": round(min(times), 4)})
        print(result[-1], flush=True)
    return result


def model_with_vocabulary(folder: Path, vocabulary: int) -> str:
    """The quickstart's model, 2 layers of width 64, untrained, with another number of tokens."""
    path = folder / str(vocabulary)
    lm_config = build_model_config(len(build_tokenizer()))
    lm_config.vocab_size = vocabulary
    transformers.AutoModelForCausalLM.from_config(lm_config).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)


def vocabulary_memory(folder: Path) -> list[dict[str, float]]:
    """Peak of a step with growing vocabularies: 2,048 tokens in one micro-batch."""
    result = []
    for vocabulary in VOCABULARIES:
        path = model_with_vocabulary(folder, vocabulary)
        row: dict[str, float] = {"vocabulary": vocabulary, "head_mb": round(vocabulary * 64 * 4 / 2**20, 1)}
        makers: dict[str, Callable[[], Prepared]] = {}
        for impl in ("fast", "padded"):
            options = ["rl.batch_size=32", "rl.mini_batch_size=32", "rl.micro_batch_tokens=2048", "rl.ppo_epochs=1"]
            config = load_config(str(QUICKSTART_CONFIG), [f"model.path={path}", f"model.impl={impl}", *options])
            inputs = random_inputs(32, 32, vocabulary, torch.Generator().manual_seed(0))
            makers[impl] = partial(Prepared, config, path, inputs, [RIGHT] * 32)
        row |= peaks_mb(makers)
        result.append(row)
        print(row, flush=True)
    return result


def rollout_memory(folder: Path) -> list[dict[str, float]]:
    """Peak of a step with growing numbers of rollouts on a device, of 128 tokens each; a vocabulary of 49,152."""
    path, result = model_with_vocabulary(folder, ROLLOUT_VOCABULARY), []
    for n in ROLLOUTS:
        options = [f"model.path={path}", f"rl.batch_size={n}", f"rl.mini_batch_size={n}", "rl.ppo_epochs=1"]
        inputs = random_inputs(n, 64, ROLLOUT_VOCABULARY, torch.Generator().manual_seed(0))
        makers: dict[str, Callable[[], Prepared]] = {}
        for name, words in ROLLOUT_PATHS.items():
            config = load_config(str(QUICKSTART_CONFIG), [*options, "rl.micro_batch_tokens=1024", *words])
            makers[name] = partial(Prepared, config, path, inputs, [RIGHT] * n)
        result.append({"rollouts": n, **peaks_mb(makers)})
        print(result[-1], flush=True)
    return result


def smollm2_rollout_memory(model: str, data: str) -> list[dict[str, Any]]:
    """The same with SmolLM2-135M on what vLLM samples for SVAMP's first rows, 2,048 tokens a micro-batch or all."""
    name = "SmolLM2-135M"

    def config(n: int, *options: str) -> Config:
        return case_config(name, model, data, f"rl.batch_size={n}", f"rl.mini_batch_size={n}", *options)

    most = config(max(SMOLLM2_ROLLOUTS), "rollout.engine=vllm")
    run = prepare(most, Path("runs/benchmark"), Console(), stages=("rl",), write=False)
    rows, path = run.train_rows[: max(SMOLLM2_ROLLOUTS)], run.config.model.path
    sampler = Sampler(most, load_model(most, path, run.device, heads=True), run, rows)
    rollouts = sampler.rollouts
    sampler.engine.close()
    decoded = [run.prompt_format.decode(r.completion_ids) for r in rollouts]
    result: list[dict[str, Any]] = []
    for n in SMOLLM2_ROLLOUTS:
        inputs = Inputs(rows[:n], rollouts[:n])
        makers: dict[str, Callable[[], Prepared]] = {
            p: partial(Prepared, config(n, *words), path, inputs, decoded[:n]) for p, words in SMOLLM2_PATHS.items()
        }
        result.append({"model": name, "rollouts": n, **peaks_mb(makers), "machine": machine()})
        print(result[-1], flush=True)
    return result


def main() -> None:
    arguments, here = parser_of(__doc__).parse_args(), machine()  # before files change
    found: dict[str, Any] = {"growth_machine": here}
    with tempfile.TemporaryDirectory() as folder:
        found["vocabulary"] = vocabulary_memory(Path(folder))
        found["rollouts"] = rollout_memory(Path(folder))
    if arguments.smollm2:
        found["smollm2_rollouts"] = smollm2_rollout_memory(arguments.smollm2, arguments.data)
    found["slope"] = slope(arguments.repeats)
    save(load() | found)
    print(report(load()))


if __name__ == "__main__":
    main()
