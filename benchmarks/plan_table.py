"""`carft-fast plan` for the shipped recipes: the table of docs/plan.md, with rows in benchmarks/results/plan.

    python -m benchmarks.plan_table

A prediction from steps on tensors without data: nothing was ever run on a GPU. Takes minutes of CPU time.
"""

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from benchmarks import predict
from benchmarks.pages import with_part
from benchmarks.rows import RESULTS
from carft_fast.config import Config, load_config
from carft_fast.data import build_tokenizer
from carft_fast.plan import estimate, verdict

ROOT = Path(__file__).resolve().parents[1]
PAGE, ROWS = ROOT / "docs" / "plan.md", RESULTS / "plan" / "recipes.json"
START, END = "<!-- plan table: python -m benchmarks.plan_table -->", "<!-- end of the plan table -->"
MODELS = predict.MODELS | {
    "Qwen2.5-1.5B-Instruct": transformers.Qwen2Config(
        hidden_size=1536,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
}
"""By the last part of the Hub id, without a hyphen at CodeLlama."""
PAPER = ("gsm8k_codellama_7b", "gsm8k_qwen2.5_7b")


class Claim(NamedTuple):
    """A recipe and where its first lines say that it fits."""

    recipe: Path
    stage: str
    gpu: str
    gpus: int


def claims() -> list[Claim]:
    """Of configs/one_gpu by their own first lines; the paper's on eight H100."""
    found = []
    for path in sorted((ROOT / "configs" / "one_gpu").glob("*.toml")):
        said = re.search(r"^# Fits on (\d+) x (\S+) by `carft-fast plan`", path.read_text(), re.MULTILINE)
        assert said is not None, path
        found.append(Claim(path, _stage(path), said[2], int(said[1])))
    for name in PAPER:
        for method in ("sft", "carft"):
            path = ROOT / "configs" / "paper" / f"{name}_{method}.toml"
            found.append(Claim(path, _stage(path), "h100-80", 8))
    return found


def _stage(path: Path) -> str:
    return "sft" if path.stem.endswith("_sft") else "rl"


def config_of(recipe: Path, folder: Path) -> Config:
    """With a model folder that holds config and tokenizer alone, in the place of a Hub id."""
    name = load_config(str(recipe)).model.path.rpartition("/")[2].replace("CodeLlama-7b-hf", "CodeLlama-7B")
    if not (folder / name).is_dir():
        MODELS[name].save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    return load_config(str(recipe), [f"model.path={folder / name}"])


def row(claim: Claim, folder: Path) -> dict[str, Any]:
    found = estimate(config_of(claim.recipe, folder), gpu=claim.gpu, gpus=claim.gpus, stages=(claim.stage,))
    stage = found.stages[claim.stage]
    peak = max(stage.phases.values(), key=lambda phase: phase.total)
    return {
        "recipe": str(claim.recipe.relative_to(ROOT)),
        "gpu": claim.gpu,
        "gpus": claim.gpus,
        "fits": found.fits(),
        "verdict": verdict(found, claim.stage),
        "phases_gib": {name: round(phase.total / 2**30, 1) for name, phase in stage.phases.items()},
        "largest_parts_gib": {part: round(size / 2**30, 1) for part, size in list(peak.parts.items())[:3]},
        "largest_micro_batch_tokens": stage.largest_micro_batch_tokens,
        "seconds_longest": {phase: round(x, 2) for phase, x in stage.seconds[0].items()},
        "seconds_quarter": {phase: round(x, 2) for phase, x in stage.seconds[1].items()},
        "launches": sum(phase.launches for name, phase in stage.phases.items() if name != "load"),
        "waits": sum(phase.syncs for name, phase in stage.phases.items() if name != "load"),
        "torch": sys.modules["torch"].__version__,
        "measured": "nothing: a prediction",
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "A prediction: none of this was ever run on a GPU.",
        "",
        "| recipe | GPUs | | GiB at the peak's phase | its largest parts (GiB) | largest micro-batch (tokens) "
        "| s a step, longest (quarter) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in rows:
        phase = max(found["phases_gib"], key=found["phases_gib"].get)
        parts = ", ".join(f"{name} {size}" for name, size in found["largest_parts_gib"].items())
        largest = found["largest_micro_batch_tokens"]
        seconds = [sum(found[f"seconds_{which}"].values()) for which in ("longest", "quarter")]
        lines.append(
            f"| {found['recipe']} | {found['gpus']} x {found['gpu']} | {'fits' if found['fits'] else 'does not fit'} "
            f"| {phase} {found['phases_gib'][phase]} | {parts} | {f'{largest:,}' if largest else 'none'} "
            f"| {seconds[0]:.1f} ({seconds[1]:.1f}) |"
        )
    return "\n".join(lines)


def with_table(page: str, rows: list[dict[str, Any]]) -> str:
    return with_part(page, START, END, f"\n{table(rows)}\n", PAGE.name)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for claim in claims():
            rows.append(row(claim, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
    ROWS.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()
