"""What training holds in memory, estimated from the model's sizes; nothing here is measured.

Counted: weights, gradients, AdamW's moments, the reference, what a strategy gathers, the largest activations with the
LM head's scratch, the KV cache of the trainer's own sampler. Not counted: the two heads, temporaries of kernels,
fragmentation, a vLLM engine. `carft-fast plan` finds the same from a step on tensors without data.

Share of each that one of n devices holds, by strategy:

              weights  gradients  moments  reference
    ddp         all       all       all       all
    zero2       all       1/n       1/n       all
    zero3       1/n       1/n       1/n       1/n
    fsdp2       1/n       1/n       1/n       1/n
"""

import math
from typing import Any

import torch

from carft_fast.config import Config, Strategy
from carft_fast.models import ModelCost
from carft_fast.training.batch import Needs
from carft_fast.training.parallel import BUCKET
from carft_kernels._runtime import chunk_size, most_rows, token_chunks

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
    settings = config.sft if stage == "sft" else config.rl
    moment, moment_text = (1 + FLOAT32 / 256, "(1 + 4 / 256)") if settings.optimizer == "adamw_8bit" else (FLOAT32, "4")
    text = f"two moments x trained weights x {moment_text} bytes"
    lasting["optimizer"] = share(2 * trained * moment, text, update_shards)
    if stage == "rl" and Needs.of(config).reference and not rank and not config.rl.reference_offload:
        lasting["reference"] = share(frozen, frozen_text, weight_shards)
    if devices > 1:
        lasting |= _in_transit(cost, stage, strategy, compute, lora=bool(rank), trained=trained)
        if strategy in ("zero2", "zero3"):  # its optimizer works on a copy of its part of the weights
            lasting["DeepSpeed's copy"] = share(trained * FLOAT32, "trained weights x 4 bytes", devices)
    passing = {"activations": _activations(config, cost, stage, compute, devices)}
    if config.rollout.engine == "hf":
        passing["sampler's KV cache"] = _kv_cache(config, lm_config, compute)
    total = sum(size for size, _ in lasting.values()) + max(size for size, _ in passing.values())
    return {**lasting, **passing, "total": (total, "the sum, of activations and KV cache the larger")}


def _in_transit(
    cost: ModelCost, stage: str, strategy: Strategy, compute: int, *, lora: bool, trained: int
) -> dict[str, tuple[float, str]]:
    """Divided weights while they are gathered for use; gradients until they are summed over devices."""
    if strategy == "ddp":
        return {"gradient bucket": (min(BUCKET, trained * FLOAT32), "128 MiB, or all gradients where they are less")}
    layer, rest = cost.layer_weights / cost.layers, cost.all_weights - cost.layer_weights
    # FSDP2 gathers layers in the compute dtype, DeepSpeed in that of the weights
    layer_size = compute if strategy == "fsdp2" or lora else FLOAT32
    found: dict[str, tuple[float, str]] = {}
    if strategy == "fsdp2":  # RL's losses work while the rest is there as it arrived, and each weight in its place
        times = 1 if stage == "sft" else 2
        text = f"two layers x {layer_size} + {times} x embeddings and head x 4 bytes"
        found["gathered weights"] = 2 * layer * layer_size + times * rest * FLOAT32, text
    elif strategy == "zero3":
        text = f"two layers x {layer_size} + embeddings and head x 4 bytes"
        found["gathered weights"] = 2 * layer * layer_size + rest * FLOAT32, text
    if not lora and strategy != "fsdp2":  # those of adapters are small; FSDP2 divides a layer's before the next
        text = f"one layer x {layer_size} + embeddings and head x 4 bytes"
        found["whole gradients"] = layer * layer_size + rest * FLOAT32, text
    return found


def _activations(config: Config, cost: ModelCost, stage: str, compute: int, devices: int) -> tuple[float, str]:
    """Of a full micro-batch. A device never has more tokens than its share of the longest mini-batch."""
    settings, rows = (config.sft, config.sft.batch_size) if stage == "sft" else (config.rl, config.rl.mini_batch_size)
    tokens = min(settings.micro_batch_tokens, -(-rows // devices) * config.data.max_length)
    # the residual stream is float32 under autocast
    kept = cost.layers * cost.hidden_size * FLOAT32
    layer = cost.linear_width // cost.layers * compute
    if not config.model.gradient_checkpointing:
        kept += cost.linear_width * compute
    if config.model.impl == "padded":
        size = tokens * (kept + 2.0 * layer + 3 * cost.vocabulary * FLOAT32)
        return size, f"{tokens:,} tokens x (kept for backward + a layer twice + 3 x vocabulary x 4 bytes of logits)"
    head, head_text = _head_scratch(config, cost, tokens, compute)
    kept_text = "all layers' inputs" if config.model.gradient_checkpointing else "all layers' inputs and outputs"
    text = f"{tokens:,} tokens x {kept_text} + the larger of a layer twice and {head_text}"
    return tokens * kept + max(2.0 * tokens * layer, head), text


def _head_scratch(config: Config, cost: ModelCost, tokens: int, compute: int) -> tuple[float, str]:
    """Of the two linear operators on a GPU: a chunk's logits, whose gradient takes their place where every token has
    one, the head's weight in the compute dtype, and its gradient in float32."""
    completion_tokens = math.ceil(tokens * config.rollout.max_new_tokens / config.data.max_length)
    most = chunk_size(completion_tokens, cost.vocabulary, torch.device("cuda"))
    logits = most_rows(token_chunks(completion_tokens, most)) * cost.vocabulary * FLOAT32
    cast = cost.head_weights * compute if compute < FLOAT32 else 0
    gradient = 0 if config.lora.rank else cost.head_weights * FLOAT32
    return logits + cast + gradient, "the LM head's logits, cast and gradient"


def _kv_cache(config: Config, lm_config: Any, compute: int) -> tuple[float, str]:
    text_config = lm_config.get_text_config()
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    size = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    rows, length, layers = config.rollout.batch_size, config.data.max_length, text_config.num_hidden_layers
    return (
        2.0 * rows * length * layers * heads * size * compute,
        f"2 x {rows} rows x {length} tokens x {layers} layers x {heads} heads x {size} x {compute} bytes",
    )
