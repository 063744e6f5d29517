"""Predicted step times on GPUs nobody here has run: cost model times the paper's recipes. Part of `make bench-step`.

Arithmetic, not measurement; says so at the top of what it writes, benchmarks/results/step_predicted.md.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import transformers

from benchmarks.rows import RESULTS
from carft_fast import plan
from carft_fast.models import ModelCost, StepShape, Work, fast_step, published_step

GPUS = [plan.GPUS[name] for name in ("a100-80", "h100-80", "b200-180")]
RANKS, GLOBAL_BATCH = 8, 64
BATCHES = (8, 32, 64, 128, 256)
MODELS: dict[str, Any] = {
    "CodeLlama-7B": transformers.LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        intermediate_size=11008,
        vocab_size=32016,
    ),
    "Qwen2.5-7B-Instruct": transformers.Qwen2Config(
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        vocab_size=152064,
    ),
}
LENGTHS = {
    "SVAMP": ([32, 36, 39, 43, 46, 49, 54, 65], [82, 94, 100, 108, 115, 124, 139, 167]),
    "GSM8K": ([42, 50, 55, 61, 68, 75, 85, 106], [49, 62, 73, 84, 97, 113, 132, 173]),
}
"""Prompt and annotated-CoT tokens at eight evenly spaced quantiles of the training sets, by SmolLM2's tokenizer."""


def shape_of(task: str) -> StepShape:
    """One GPU's eight rollouts. Prompts and completions are paired out of order, as they come."""
    prompts, completions = LENGTHS[task]
    completions = completions[::3] + completions[1::3] + completions[2::3]
    return StepShape(prompts, completions, completions, epochs=2, shards=RANKS)


class Prediction(NamedTuple):
    """Milliseconds by phase."""

    model: str
    data: str
    gpu: str
    fast: dict[str, float]
    published: dict[str, float]
    drafted: dict[int, dict[str, float]]
    """`fast`, by the tokens that a forward of the sampler yields."""


def milliseconds(gpu: plan.Gpu, step: Mapping[str, Work]) -> dict[str, float]:
    return {phase: 1e3 * gpu.seconds(work) for phase, work in step.items()}


def predictions() -> list[Prediction]:
    found = []
    for model, config in MODELS.items():
        cost = ModelCost.of_config(config)
        for task in LENGTHS:
            shape = shape_of(task)
            for gpu in GPUS:
                drafted = {
                    tokens: milliseconds(
                        gpu,
                        fast_step(
                            cost, replace(shape, tokens_per_forward=tokens, wasted_per_token=plan.WASTED_PER_TOKEN)
                        ),
                    )
                    for tokens in plan.TOKENS_PER_FORWARD
                }
                fast, published = (milliseconds(gpu, step(cost, shape)) for step in (fast_step, published_step))
                found.append(Prediction(model, task, gpu.title, fast, published, {1: fast} | drafted))
    return found


def assumptions() -> list[tuple[str, str]]:
    return [
        (
            "a phase's time",
            f"the larger of FLOPs / ({plan.MATMUL_SHARE:.0%} of the peak) and bytes / ({plan.MEMORY_SHARE:.0%} of the "
            "bandwidth)",
        ),
        *(
            (gpu.title, f"{gpu.flops / 1e12:.0f} TFLOP/s dense bfloat16, {gpu.bandwidth / 1e12:.2f} TB/s")
            for gpu in GPUS
        ),
        (
            "rollouts of one GPU",
            f"{GLOBAL_BATCH // RANKS}; lengths at eight quantiles of the training set, counted by SmolLM2's tokenizer; "
            "GSM8K with its own CoTs, not the paper's; completions as long as annotations",
        ),
        *((task, f"prompts {p}, completions {c} tokens") for task, (p, c) in LENGTHS.items()),
        (
            "sampling",
            "the same sampler on both sides, a replica a GPU: a round reads all weights once, and no KV cache",
        ),
        (
            "drafts",
            f"of the fast step alone; {plan.WASTED_PER_TOKEN:g} tokens that do not stand are checked for each token of "
            "a completion; those that stand are evenly spread",
        ),
        (
            "sync",
            "float32 weights read, written in bfloat16, read and written again to their place; on both sides",
        ),
        (
            "published step",
            "rows padded to longest prompt + longest completion; LM head on every position of every pass; logits in "
            "float32, written and read by cast and log-softmax; activations recomputed",
        ),
        (
            "left out, on both sides",
            "communication, launch overhead, loading, the published code's Python loops and garbage collection",
        ),
    ]


def report() -> str:
    lines = [
        "# Predicted step times (a prediction: none of this was run)",
        "",
        f"CARFT, {GLOBAL_BATCH} rollouts a step on {RANKS} GPUs, two PPO epochs, bfloat16, milliseconds a step.",
        "`fast` is this trainer without activation recomputation, `published` the published code's step by the same",
        "arithmetic.",
        "",
        "| model | data | GPU | rollout | log-probs fast / published | update fast / published "
        "| step fast / published | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for p in predictions():
        fast, published = p.fast, p.published
        total = sum(fast.values()), sum(published.values())
        lines.append(
            f"| {p.model} | {p.data} | {p.gpu} | {fast['rollout']:.0f} | {fast['log-probs']:.0f} / "
            f"{published['log-probs']:.0f} | {fast['update']:.0f} / {published['update']:.0f} | {total[0]:.0f} / "
            f"{total[1]:.0f} | {total[1] / total[0]:.2f} |"
        )
    lines += [
        "",
        "## Drafts",
        "",
        "The same at 1, 2 and 4 tokens that a forward of the sampler yields, against the published step, whose sampler",
        "has no drafts. What a run reaches depends on its policy; `tokens_per_forward` in its metrics says it.",
        "",
        "| model | data | GPU | rollout at 1 / 2 / 4 | step at 1 / 2 / 4 | published / step at 1 / 2 / 4 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for p in predictions():
        steps = [sum(phases.values()) for phases in p.drafted.values()]
        columns = (
            " / ".join(f"{phases['rollout']:.0f}" for phases in p.drafted.values()),
            " / ".join(f"{step:.0f}" for step in steps),
            " / ".join(f"{sum(p.published.values()) / step:.2f}" for step in steps),
        )
        lines.append(f"| {p.model} | {p.data} | {p.gpu} | {' | '.join(columns)} |")
    lines += [
        "",
        "Drafts are free while a forward computes its tokens in the time of reading the weights, and cost more than",
        f"they save from so many sequences at once on a GPU ({plan.WASTED_PER_TOKEN:g} wasted for each token of a",
        "completion). Gain: of decoding at 2 tokens a forward, by sequences at once. `rollout.draft_budget` = 64 stays",
        "where they are free.",
        "",
        f"| GPU | tokens computed meanwhile | sequences | {' | '.join(f'gain at {n}' for n in BATCHES)} |",
        f"| --- | --- | --- | {' | '.join('---' for _ in BATCHES)} |",
        *(
            f"| {gpu.title} | {gpu.free_rows:.0f} | {gpu.sequences_for_drafts(plan.WASTED_PER_TOKEN):.0f} | "
            f"{' | '.join(f'{gpu.draft_gain(n, 2, plan.WASTED_PER_TOKEN):.2f}' for n in BATCHES)} |"
            for gpu in GPUS
        ),
        "",
        "## Assumptions",
        "",
        "| quantity | assumed |",
        "| --- | --- |",
        *(f"| {quantity} | {assumed} |" for quantity, assumed in assumptions()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    text = report()
    (RESULTS / "step_predicted.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
