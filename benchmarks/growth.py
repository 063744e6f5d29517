"""Time and memory as one size doubles: `python -m benchmarks.growth`.

operators: ours against plain torch. group size: a Dr.GRPO step (look and update) of the quickstart's model with a fixed
number of prompts, from two samples a prompt on, since one alone has no advantage. ranks: the same CARFT step on several
processes of one thread, from a common barrier to the slowest one's end; neither strategy divides anything on one.
Variants take turns, and are compared before they are timed. Memory of a step is that of its first epoch, beyond model
and optimizer state, and of the process that takes most. Writes benchmarks/results/growth_cpu.json; the exponents are
fitted where the rows are shown.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import step as training
from benchmarks.ops.cases import (
    PLAIN,
    Case,
    Variants,
    linear_policy_loss,
    masked_infonce,
    three_products,
    three_similarities,
)
from benchmarks.ops.measure import FEWEST, add_clock, checked, clock_of, peaks_mb, seconds, timed
from benchmarks.rows import RESULTS, Row, read, this_machine, write
from benchmarks.step import RIGHT, Inputs, Prepared, random_inputs
from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config import METHODS, load_config
from carft_fast.core import leave

BASE = {"T": 512, "V": 8192, "D": 128}
LETTERS = {"tokens": "T", "vocabulary": "V", "hidden size": "D"}
DOUBLINGS = 4
BUDGET_SECONDS = 1.0

PROMPTS, PROMPT_TOKENS, SAMPLE_TOKENS, VOCABULARY = 4, 128, 32, 97
GROUP_SIZES = (2, 4, 8, 16)
GROUP_VARIANTS = {
    "carft_fast, shared prompts": ["rl.micro_batch_tokens=2048", "rl.share_prompts=true"],
    "carft_fast": ["rl.micro_batch_tokens=2048", "rl.share_prompts=false"],
    PLAIN: ["model.impl=padded", training.DEVICE_AT_ONCE],
}
RANKS = (1, 2, 4)
STRATEGIES = {"DDP": "ddp", "FSDP2": "fsdp2"}
SEQUENCES = 64


def sweeps() -> list[tuple[str, int, Case]]:
    """What grows, how large it is, and the case of that size."""
    found = []
    for against, letter in LETTERS.items():
        for step in range(DOUBLINGS):
            shape = BASE | {letter: BASE[letter] << step}
            found.append(
                (against, shape[letter], Case("linear_policy_loss", shape, linear_policy_loss, three_products))
            )
    for step in range(DOUBLINGS):
        n = 256 << step
        case = Case("masked_infonce", {"N": n, "D": 64}, masked_infonce, three_similarities)
        found.append(("embeddings in a group", n, case))
    return found


def operators(clock: str) -> list[Row]:
    rows: list[Row] = []
    for against, size, case in sweeps():
        variants = case.variants("cpu")
        steps, _ = checked({name: variants[name] for name in (case.operator, PLAIN)})
        times, peaks = timed(steps, "cpu", clock, BUDGET_SECONDS), peaks_mb(case, steps, "cpu")
        rows += rows_of(case.operator, against, size, times, peaks)
    return rows


def rows_of(
    operator: str, against: str, size: int, times: dict[str, list[float]], peaks: dict[str, float]
) -> list[Row]:
    rows: list[Row] = []
    for name, found in times.items():
        p50_ms, peak_mb = round(1e3 * statistics.median(found), 3), round(peaks[name], 2)
        row = {"operator": operator, "against": against, "size": size, "variant": name}
        rows.append(row | {"p50_ms": p50_ms, "peak_mb": peak_mb})
        print(rows[-1], flush=True)
    return rows


def group_makers(samples: int) -> dict[str, Callable[[], Prepared]]:
    """Every variant of a Dr.GRPO step with so many samples of each prompt, half of them right."""
    generator = torch.Generator().manual_seed(0)
    prompts = random_inputs(PROMPTS, PROMPT_TOKENS, VOCABULARY, generator).rows
    n = PROMPTS * samples
    rollouts = random_inputs(n, SAMPLE_TOKENS, VOCABULARY, generator).rollouts
    inputs = Inputs([row for row in prompts for _ in range(samples)], rollouts)
    decoded = [RIGHT, ""] * (n // 2)
    size = {"rl.batch_size": n, "rl.mini_batch_size": n, "rollout.samples_per_prompt": samples}
    configs = {
        name: load_config(str(QUICKSTART_CONFIG), words, METHODS["dr_grpo"] | size)
        for name, words in GROUP_VARIANTS.items()
    }
    return {name: partial(Prepared, config, "synthetic", inputs, decoded) for name, config in configs.items()}


def group_steps(prepared: dict[str, Prepared]) -> Variants:
    """Look and update; they return the gradient's norm, since the loss of groups of equal lengths is 0."""

    def step(p: Prepared) -> list[torch.Tensor]:
        p.look()
        return [torch.tensor(p.update()["grad_norm"])]

    return {name: partial(step, p) for name, p in prepared.items()}


def group_size(clock: str, sizes: Sequence[int] = GROUP_SIZES) -> list[Row]:
    rows: list[Row] = []
    for samples in sizes:
        makers = group_makers(samples)
        peaks = training.peaks_mb(makers)
        steps, wrong = checked(group_steps({name: make() for name, make in makers.items()}))
        if wrong:
            raise RuntimeError(f"{samples} samples a prompt: {wrong}")
        rows += rows_of("Dr.GRPO step", "group size", samples, timed(steps, "cpu", clock, BUDGET_SECONDS), peaks)
    return rows


def _rank(rank: int, size: int, sequences: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    inputs = random_inputs(sequences, 64, VOCABULARY, torch.Generator().manual_seed(0))
    # a micro-batch for each process at most: else one process alone would do more forwards than several together
    words = [f"rl.{name}={sequences}" for name in ("batch_size", "mini_batch_size")]
    words.append(f"rl.micro_batch_tokens={128 * sequences}")
    prepared, found = {}, {}
    for name, strategy in STRATEGIES.items():
        config = load_config(str(QUICKSTART_CONFIG), [*words, f"distributed.strategy={strategy}"])
        make = partial(Prepared, config, "synthetic", inputs, [RIGHT] * sequences)
        with training.blocks_of_the_system():
            peak_mb = training.step_peak_mb(make())
        prepared[name] = make()
        found[name] = {"loss": prepared[name].update()["loss"], "seconds": [], "peak_mb": peak_mb}
    for _ in range(rounds):
        for name, p in prepared.items():
            dist.barrier()
            found[name]["seconds"].append(seconds(lambda p=p: (p.look(), p.update())))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    leave()


def ranks(
    clock: str = "wall", sizes: Sequence[int] = RANKS, sequences: int = SEQUENCES, rounds: int = FEWEST
) -> list[Row]:
    """Whatever `clock` says, that of the wall: processes wait for each other."""
    rows: list[Row] = []
    losses: list[float] = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_rank, (size, sequences, rounds, folder), nprocs=size)
            each = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]
        losses += [found["loss"] for of_rank in each for found in of_rank.values()]
        if max(losses) - min(losses) > 1e-4 * max(1.0, abs(losses[0])):
            raise RuntimeError(f"{size} processes: losses from {min(losses)} to {max(losses)}")
        times = {
            name: [max(turn) for turn in zip(*(of_rank[name]["seconds"] for of_rank in each), strict=True)]
            for name in STRATEGIES
        }
        peaks = {name: max(of_rank[name]["peak_mb"] for of_rank in each) for name in STRATEGIES}
        rows += rows_of("CARFT step", "ranks", size, times, peaks)
    return [row | {"machine": this_machine() | {"threads": "1", "clock": "wall"}} for row in rows]


PARTS: dict[str, Callable[[str], list[Row]]] = {"operators": operators, "group size": group_size, "ranks": ranks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS), help="keep the other parts' rows")
    add_clock(parser)
    arguments = parser.parse_args()
    machine = this_machine() | clock_of(arguments)
    file = RESULTS / "growth_cpu.json"
    rows = [row for name in PARTS if arguments.only in (None, name) for row in PARTS[name](arguments.clock)]
    if arguments.only and file.is_file():
        new = {(row["operator"], row["against"]) for row in rows}
        rows = [row for row in read(file).rows if (row["operator"], row["against"]) not in new] + rows
    write(file, "growth", machine, rows)


if __name__ == "__main__":
    main()
