"""What training holds in memory, estimated from the model's sizes; nothing here is measured.

Counted: weights, gradients, AdamW's moments, the reference, the largest activations, the sampler's KV cache where the
trainer samples itself. Not counted: the two heads, temporaries of kernels, fragmentation, a vLLM engine.
"""

from typing import Any

from carft_fast.config import Config
from carft_fast.flops import ModelCost
from carft_fast.step import Needs

FLOAT32 = 4


def estimate_memory(config: Config, cost: ModelCost, lm_config: Any, stage: str) -> dict[str, tuple[float, str]]:
    """What -> (bytes, formula) for a stage on one device, "total" last.

    Activations and KV cache take turns: the total has the larger one.
    """
    compute = 2 if config.model.compute_dtype == "bfloat16" else FLOAT32
    frozen = cost.layer_weights * compute + (cost.all_weights - cost.layer_weights) * FLOAT32
    frozen_text = f"layers x {compute} + embeddings and head x 4 bytes"
    lasting: dict[str, tuple[float, str]] = {}
    trained = cost.all_weights
    if rank := config.lora.rank:
        trained = rank * cost.linear_width
        lasting["weights"] = frozen, f"{frozen_text}, frozen"
        lasting["adapters"] = trained * FLOAT32, f"at most {trained:,} x 4 bytes"
    else:
        lasting["weights"] = trained * FLOAT32, "weights x 4 bytes"
    lasting["gradients"] = trained * FLOAT32, "trained weights x 4 bytes"
    lasting["optimizer"] = 2 * trained * FLOAT32, "two moments x trained weights x 4 bytes"
    if stage == "rl" and Needs.of(config).reference and not rank and not config.rl.reference_offload:
        lasting["reference"] = frozen, frozen_text
    passing = {"activations": _activations(config, cost, stage, compute)}
    if config.rollout.engine == "hf":
        passing["sampler's KV cache"] = _kv_cache(config, lm_config, compute)
    total = sum(size for size, _ in lasting.values()) + max(size for size, _ in passing.values())
    return {**lasting, **passing, "total": (total, "the sum, of activations and KV cache the larger")}


def _activations(config: Config, cost: ModelCost, stage: str, compute: int) -> tuple[float, str]:
    tokens = config.sft.micro_batch_tokens if stage == "sft" else config.rl.micro_batch_tokens
    width, text = cost.linear_width, "inputs and outputs of all linear layers"
    if config.model.gradient_checkpointing:
        width = cost.layers * cost.hidden_size + cost.linear_width // cost.layers
        text = "(layers x hidden size + one layer's linear inputs and outputs)"
    size, text = tokens * width * float(compute), f"{tokens:,} tokens x {text} x {compute} bytes"
    if config.model.impl == "reference":
        size += 3 * tokens * cost.vocabulary * FLOAT32
        text += f" + 3 x {tokens:,} x vocabulary x 4 bytes of logits"
    return size, text


def _kv_cache(config: Config, lm_config: Any, compute: int) -> tuple[float, str]:
    text_config = lm_config.get_text_config()
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    size = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    rows, length, layers = config.rollout.batch_size, config.data.max_length, text_config.num_hidden_layers
    return (
        2.0 * rows * length * layers * heads * size * compute,
        f"2 x {rows} rows x {length} tokens x {layers} layers x {heads} heads x {size} x {compute} bytes",
    )
