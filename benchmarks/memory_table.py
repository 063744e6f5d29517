"""Memory of the trainer on each GPU, by model, method and strategy: the table in docs/multi_gpu.md. Arithmetic alone.

`python -m benchmarks.memory_table` writes it between the two markers there.
"""

from pathlib import Path
from typing import Any

import transformers

from benchmarks.pages import with_part
from carft_fast.config import Config, Strategy, load_config
from carft_fast.models import ModelCost
from carft_fast.training import estimate_memory

PAGE = Path(__file__).resolve().parents[1] / "docs" / "multi_gpu.md"
START, END = "<!-- memory table: python -m benchmarks.memory_table -->", "<!-- end of the memory table -->"
CARDS = (24, 40, 80)
"""GB of memory; a tenth is left to CUDA, kernels and fragmentation."""
USABLE = 0.9
MICRO_BATCHES = (16384, 4096)
COLUMNS: list[tuple[str, Strategy, int]] = [
    ("1 GPU", "ddp", 1),
    ("DDP, 8 GPUs", "ddp", 8),
    ("FSDP2, 8 GPUs", "fsdp2", 8),
    ("ZeRO-3, 8 GPUs", "zero3", 8),
]


def qwen(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> Any:
    return transformers.Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=152064,
        tie_word_embeddings=False,
    )


MODELS = {
    "Qwen2.5-7B": qwen(3584, 28, 28, 4, 18944),
    "Qwen2.5-14B": qwen(5120, 48, 40, 8, 13824),
    "Qwen2.5-32B": qwen(5120, 64, 40, 8, 27648),
}


def config_of(rank: int, micro_batch_tokens: int) -> Config:
    """RL with a reference; vLLM samples on GPUs of its own."""
    options = ["rollout.engine=vllm-server", "model.compute_dtype=bfloat16", "model.gradient_checkpointing=true"]
    return load_config(None, [*options, f"lora.rank={rank}", f"rl.micro_batch_tokens={micro_batch_tokens}"])


def cell(size: float) -> str:
    gib = size / 2**30
    return f"{gib:.1f}: {next((str(card) for card in CARDS if gib <= USABLE * card), 'none')}"


def table() -> str:
    lines = [
        "An estimate, nothing measured on a GPU.",
        "",
        "GiB on each GPU: the smallest of 24, 40 and 80 GB cards that holds it with a tenth to spare.",
        "",
        f"| model | trained | micro-batch (tokens) | {' | '.join(name for name, _, _ in COLUMNS)} |",
        f"| --- | --- | --- | {' | '.join('---' for _ in COLUMNS)} |",
    ]
    for model, lm_config in MODELS.items():
        cost = ModelCost.of_config(lm_config)
        for rank in (0, 16):
            for tokens in MICRO_BATCHES:
                config = config_of(rank, tokens)
                sizes = [
                    estimate_memory(config, cost, lm_config, "rl", strategy, devices)["total"][0]
                    for _, strategy, devices in COLUMNS
                ]
                trained = f"LoRA, rank {rank}" if rank else "all weights"
                lines.append(f"| {model} | {trained} | {tokens:,} | {' | '.join(map(cell, sizes))} |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    """The page with the table of now."""
    return with_part(page, START, END, f"\n{table()}\n", PAGE.name)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
