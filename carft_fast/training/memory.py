"""What training holds in memory, estimated from the model's sizes; nothing here is measured.

Counted: weights, gradients, AdamW's moments, the reference, what a strategy gathers, the largest activations, the
KV cache of the trainer's own sampler. Not counted: the two heads, temporaries of kernels, fragmentation, a vLLM engine.

Share of each that one of n devices holds, by strategy:

              weights  gradients  moments  reference
    ddp         all       all       all       all
    zero2       all       1/n       1/n       all
    zero3       1/n       1/n       1/n       1/n
    fsdp2       1/n       1/n       1/n       1/n
"""

from typing import Any

from carft_fast.config import Config, Strategy
from carft_fast.models import ModelCost
from carft_fast.training.batch import Needs
from carft_fast.training.parallel import BUCKET

FLOAT32 = 4


def estimate_memory(
    config: Config, cost: ModelCost, lm_config: Any, stage: str, strategy: Strategy = "ddp", devices: int = 1
) -> dict[str, tuple[float, str]]:
    """What -> (bytes on each device, formula) for a stage, "total" last. Activations and KV cache are never there
    together, so the total has the larger one.
    """
    compute = 2 if config.model.compute_dtype == "bfloat16" else FLOAT32
    frozen = cost.layer_weights * compute + (cost.all_weights - cost.layer_weights) * FLOAT32
    frozen_text = f"layers x {compute} + embeddings and head x 4 bytes"
    weight_shards = devices if strategy in ("fsdp2", "zero3") else 1
    update_shards = 1 if strategy == "ddp" else devices

    def share(size: float, text: str, shards: int) -> tuple[float, str]:
        return (size / shards, f"({text}) / {shards}") if shards > 1 else (size, text)

    lasting: dict[str, tuple[float, str]] = {}
    trained = cost.all_weights
    if rank := config.lora.rank:
        trained = rank * cost.linear_width
        lasting["weights"] = share(frozen, f"{frozen_text}, frozen", weight_shards)
        lasting["adapters"] = share(trained * FLOAT32, f"at most {trained:,} x 4 bytes", weight_shards)
    else:
        lasting["weights"] = share(trained * FLOAT32, "weights x 4 bytes", weight_shards)
    lasting["gradients"] = share(trained * FLOAT32, "trained weights x 4 bytes", update_shards)
    lasting["optimizer"] = share(2 * trained * FLOAT32, "two moments x trained weights x 4 bytes", update_shards)
    if stage == "rl" and Needs.of(config).reference and not rank and not config.rl.reference_offload:
        lasting["reference"] = share(frozen, frozen_text, weight_shards)
    if devices > 1:
        lasting |= _in_transit(cost, strategy, compute, lora=bool(rank), trained=trained)
        if strategy in ("zero2", "zero3"):  # its optimizer works on a copy of its part of the weights
            lasting["DeepSpeed's copy"] = share(trained * FLOAT32, "trained weights x 4 bytes", devices)
    passing = {"activations": _activations(config, cost, stage, compute)}
    if config.rollout.engine == "hf":
        passing["sampler's KV cache"] = _kv_cache(config, lm_config, compute)
    total = sum(size for size, _ in lasting.values()) + max(size for size, _ in passing.values())
    return {**lasting, **passing, "total": (total, "the sum, of activations and KV cache the larger")}


def _in_transit(
    cost: ModelCost, strategy: Strategy, compute: int, *, lora: bool, trained: int
) -> dict[str, tuple[float, str]]:
    """Divided weights while they are gathered for use; gradients until they are summed over devices."""
    if strategy == "ddp":
        return {"gradient bucket": (min(BUCKET, trained * FLOAT32), "128 MiB, or all gradients where they are less")}
    layer, rest = cost.layer_weights / cost.layers, cost.all_weights - cost.layer_weights
    # FSDP2 gathers in the compute dtype, DeepSpeed in that of the weights
    layer_size = compute if strategy == "fsdp2" or lora else FLOAT32
    rest_size = compute if strategy == "fsdp2" else FLOAT32
    found: dict[str, tuple[float, str]] = {}
    if strategy != "zero2":
        text = f"two layers x {layer_size} + embeddings and head x {rest_size} bytes"
        found["gathered weights"] = 2 * layer * layer_size + rest * rest_size, text
    if not lora:  # those of adapters are small
        text = f"one layer x {layer_size} + embeddings and head x {rest_size} bytes"
        found["whole gradients"] = layer * layer_size + rest * rest_size, text
    return found


def _activations(config: Config, cost: ModelCost, stage: str, compute: int) -> tuple[float, str]:
    tokens = config.sft.micro_batch_tokens if stage == "sft" else config.rl.micro_batch_tokens
    width, text = cost.linear_width, "inputs and outputs of all linear layers"
    if config.model.gradient_checkpointing:
        width = cost.layers * cost.hidden_size + cost.linear_width // cost.layers
        text = "(layers x hidden size + one layer's linear inputs and outputs)"
    size, text = tokens * width * float(compute), f"{tokens:,} tokens x {text} x {compute} bytes"
    if config.model.impl == "padded":
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
