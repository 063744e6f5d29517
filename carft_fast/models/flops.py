"""What a step costs: matmul FLOPs and bytes of every phase, for any model. Pure arithmetic; nothing here is measured.

F is a forward pass. A multiply-add is two FLOPs. Attention counts the pairs a causal mask leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from carft_fast.core import InputError, first_line


@dataclass(frozen=True, slots=True)
class ModelCost:
    """One model's matmuls. Built from the model's own layers, so it holds for any dense architecture."""

    layer_weights: int
    """Elements of all weight matrices in the decoder layers."""
    head_weights: int
    """Elements of the LM head: vocabulary x hidden size."""
    all_weights: int
    """Every parameter, tied ones once."""
    attention_width: int
    """Layers x query heads x head size."""
    hidden_size: int
    vocabulary: int
    layers: int
    linear_width: int
    """Inputs and outputs of all linear layers in the decoder layers, summed: elements per token."""

    @classmethod
    def of(cls, lm: nn.Module) -> "ModelCost":
        """Of a transformers causal LM; its tensors may be on the meta device, or divided over processes."""

        def numel(weight: Any) -> int:
            return getattr(weight, "ds_numel", weight.numel())  # of ZeRO-3, which leaves an empty tensor

        config: Any = lm.config
        config = config.get_text_config()
        head: Any = lm.get_output_embeddings()  # type: ignore[operator]
        vocabulary, hidden = getattr(head.weight, "ds_shape", head.weight.shape)
        linear = [m for m in lm.modules() if isinstance(m, nn.Linear) and m is not head]
        head_size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        return cls(
            layer_weights=sum(numel(m.weight) for m in linear),
            head_weights=numel(head.weight),
            all_weights=sum(map(numel, lm.parameters())),
            attention_width=config.num_hidden_layers * config.num_attention_heads * head_size,
            hidden_size=hidden,
            vocabulary=vocabulary,
            layers=config.num_hidden_layers,
            linear_width=sum(m.in_features + m.out_features for m in linear),
        )

    @classmethod
    def of_config(cls, config: Any, *, trust_remote_code: bool = False) -> "ModelCost":
        """Of a transformers config, without memory for its weights."""
        try:
            with torch.device("meta"):
                return cls.of(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
        except Exception as error:  # whatever a model's code makes of sizes that do not fit
            raise InputError(f"no model can be built of this {type(config).__name__}: {first_line(error)}") from None

    def layers_flops(self, tokens: float, pairs: float) -> float:
        """Forward of all layers over `tokens` tokens with `pairs` (query, key) pairs in each head."""
        return 2 * self.layer_weights * tokens + 4 * self.attention_width * pairs

    def head_flops(self, tokens: float) -> float:
        """One matmul with the LM head: logits, or either of its two gradients."""
        return 2 * self.head_weights * tokens

    def sequence_flops(self, prompt: int, completion: int) -> float:
        """Forward of one packed sequence, the LM head on its completion only."""
        n = prompt + completion
        return self.layers_flops(n, causal_pairs(n)) + self.head_flops(completion)


def causal_pairs(n: float) -> float:
    return n * (n + 1) / 2


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of matmuls and bytes that have to move through device memory beside them."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> "Work":
        return Work(self.flops * factor, self.bytes * factor)


@dataclass(frozen=True, slots=True)
class StepShape:
    """Rollouts of one step: prompt, completion and annotated-CoT lengths, an entry for each rollout (tokens)."""

    prompts: Sequence[int]
    completions: Sequence[int]
    annotated: Sequence[int]
    epochs: int
    updates_per_epoch: int = 1
    decode_batch: int = 64
    """Sequences the sampler decodes at once."""
    bytes_per_weight: int = 2
    shards: int = 1
    """Devices that share gradients and optimizer state (ZeRO, FSDP)."""
    tokens_per_forward: float = 1.0
    """Of a completion, by drafts; a forward of the sampler then checks several tokens of a sequence."""
    wasted_per_token: float = 0.0
    """Drafted tokens that were checked and did not stand, for each token of a completion."""


def fast_step(
    cost: ModelCost, shape: StepShape, *, recompute: bool = False, one_micro_batch: bool = True
) -> dict[str, Work]:
    """Work of this trainer's step (CARFT), by phase: packed, LM head on completion tokens only, 3 matmuls in the loss,
    annotated CoTs after the prompts of their rollouts.

    `recompute` is model.gradient_checkpointing. `one_micro_batch`: a mini-batch is one micro-batch, so the first
    update reuses the forward of the log-prob pass.
    """
    rows = list(zip(shape.prompts, shape.completions, strict=True))
    tokens, completion_tokens = sum(map(sum, rows)), sum(shape.completions)
    layers = cost.layers_flops(tokens, sum(causal_pairs(p + c) for p, c in rows))
    # an annotated CoT goes on from its prompt, whose last token is forwarded again
    pairs = (causal_pairs(p + a) - causal_pairs(p - 1) for p, a in zip(shape.prompts, shape.annotated, strict=True))
    layers_annotated = cost.layers_flops(sum(shape.annotated) + len(rows), sum(pairs))
    head = cost.head_flops(completion_tokens)
    weights = cost.all_weights * shape.bytes_per_weight
    backward = (4 if recompute else 3) * layers + 3 * head
    spared = Work(-layers, -weights) * (1 / shape.updates_per_epoch if one_micro_batch else 0)
    return {
        "rollout": _decode(cost, shape),
        "log-probs": Work(2 * (layers + head) + layers_annotated, 3 * weights),
        "update": (Work(backward, 3 * weights) + _optimizer(cost, shape)) * shape.epochs + spared,
        "sync": _sync(cost, shape),
    }


def sft_step(cost: ModelCost, shape: StepShape, *, recompute: bool = False) -> Work:
    """Work of an SFT step over prompts and annotated CoTs: LM head on CoT tokens only, its logits found twice."""
    rows = list(zip(shape.prompts, shape.annotated, strict=True))
    layers = cost.layers_flops(sum(map(sum, rows)), sum(causal_pairs(p + a) for p, a in rows))
    weights = cost.all_weights * shape.bytes_per_weight
    flops = (4 if recompute else 3) * layers + 4 * cost.head_flops(sum(shape.annotated))
    return Work(flops, 3 * weights) + _optimizer(cost, shape)


def published_step(cost: ModelCost, shape: StepShape) -> dict[str, Work]:
    """Work of the published trainers' step: rows padded to the longest prompt and completion, float32 logits of every
    position in each of three passes and in the update, activations recomputed.

    The logits of a pass are written, read by log-softmax, which writes its result, which is read again; in the update
    twice that. Its sampler and its sync are taken to be as good as ours, but for drafts.
    """
    shape = replace(shape, tokens_per_forward=1.0, wasted_per_token=0.0)
    width = max(shape.prompts) + max(shape.completions)
    width_annotated = max(p + a for p, a in zip(shape.prompts, shape.annotated, strict=True))
    rows = len(shape.prompts)
    layers = cost.layers_flops(rows * width, rows * causal_pairs(width))
    layers_annotated = cost.layers_flops(rows * width_annotated, rows * causal_pairs(width_annotated))
    logits_bytes = 4.0 * cost.vocabulary * rows
    weights = cost.all_weights * shape.bytes_per_weight
    head = cost.head_flops(rows * width)
    return {
        "rollout": _decode(cost, shape),
        "log-probs": Work(
            2 * (layers + head) + layers_annotated + cost.head_flops(rows * width_annotated),
            3 * weights + 4 * logits_bytes * 2 * width + logits_bytes * width_annotated,
        ),
        "update": (Work(4 * layers + 3 * head, 4 * weights + 8 * logits_bytes * width) + _optimizer(cost, shape))
        * shape.epochs,
        "sync": _sync(cost, shape),
    }


def _decode(cost: ModelCost, shape: StepShape) -> Work:
    """Prefill, then `tokens_per_forward` tokens at a time: a round reads all weights for `decode_batch` sequences."""
    rows = list(zip(shape.prompts, shape.completions, strict=True))
    checked = 1 + shape.wasted_per_token
    prompt_pairs = sum(map(causal_pairs, shape.prompts))
    pairs = prompt_pairs + checked * (sum(causal_pairs(p + c) for p, c in rows) - prompt_pairs)
    flops = cost.layers_flops(sum(shape.prompts) + checked * sum(shape.completions), pairs)
    rounds = max(shape.completions) / shape.tokens_per_forward * -(-len(rows) // shape.decode_batch)
    weights = (cost.layer_weights + cost.head_weights) * shape.bytes_per_weight
    return Work(flops + cost.head_flops(checked * sum(shape.completions)), weights * rounds)


def _sync(cost: ModelCost, shape: StepShape) -> Work:
    """Read in float32, written in the sampler's dtype, read again and written to its place (fused, or packed)."""
    return Work(0, (4 + 3 * shape.bytes_per_weight) * cost.all_weights)


def _optimizer(cost: ModelCost, shape: StepShape) -> Work:
    """AdamW in float32: weight, gradient and two moments read; weight and moments written; the clip reads once more."""
    return Work(0, 8 * 4 * cost.all_weights * shape.updates_per_epoch / shape.shards)
