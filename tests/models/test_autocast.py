"""bfloat16 on a CPU: what autocast gives does not depend on where a tensor is cast, or for how long a cast is kept."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from carft_fast.config import Config
from carft_fast.models import CarftModel, ModelCost, pack
from carft_fast.models.attention import PACKED, packed_attention
from carft_fast.models.heads import CarftHeads
from carft_fast.objective.passes import PackedPasses, Rows
from carft_fast.rollout.base import SamplingParams
from carft_fast.rollout.hf import HFEngine

CPU = torch.device("cpu")
ROWS = Rows([[5, 6, 7], [5, 6, 7], [8, 9]], [[10, 11], [12], [13, 14, 15, 16]])


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


@pytest.mark.parametrize("share", [False, True])
def test_attention_gets_the_bits_that_autocast_gives_sdpa(share: bool) -> None:
    """Queries and keys in float32 from the rotary embeddings, values in bfloat16; SDPA casts under autocast itself.

    Gradients of keys that several completions share are summed in float32, as without the cast.
    """
    segments = pack(ROWS.prompts, ROWS.completions, CPU, share_prompts=share).segments
    tokens = sum(segments.q_lengths)
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, tokens, 8) for heads in (4, 2, 2)]
    inputs[2] = inputs[2].bfloat16()
    d_output = torch.randn(1, tokens, 4, 8).bfloat16()

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(nn.Module(), q, k, v, None, scaling=0.3, segments=segments)[0]

    def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if segments.key_index is not None:
            k, v = (x.index_select(2, segments.key_index) for x in (k, v))
        outputs = []
        lengths = segments.q_lengths, segments.k_lengths, segments.k_lengths
        parts = (x.split(n, 2) for x, n in zip((q, k, v), lengths, strict=True))
        for q_, k_, v_ in zip(*parts, strict=True):
            behind = torch.ones(q_.shape[2], k_.shape[2], dtype=torch.bool).tril(k_.shape[2] - q_.shape[2])
            mask = torch.zeros(behind.shape).masked_fill(~behind, -torch.inf) if q_.shape[2] < k_.shape[2] else None
            outputs.append(
                scaled_dot_product_attention(
                    q_, k_, v_, attn_mask=mask, is_causal=mask is None, scale=0.3, enable_gqa=True
                )
            )
        return torch.cat(outputs, 2).transpose(1, 2)

    found = []
    for attend in (ours, by_hand):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16):
            output = attend(*leaves)
        found.append([output, *torch.autograd.grad(output, leaves, d_output)])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(bits(a), bits(b))


def small_lm() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, attn_implementation=PACKED))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_forward_has_the_same_bits_whether_casts_are_kept(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """Loss and every gradient; torch keeps the casts of trained weights by default."""
    lm, found = small_lm(), []
    for keep in (True, False):
        model = CarftModel(copy.deepcopy(lm), CarftHeads(32, 16, "shared", 0), torch.bfloat16)
        if checkpointing:
            model.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.lm.train()
        kept = []
        with monkeypatch.context() as patch:
            if keep:
                patch.setattr(
                    CarftModel, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16, cache_enabled=True)
                )
            with model.autocast():
                kept.append(torch.is_autocast_cache_enabled())
            passes = PackedPasses(Config(), 64, ModelCost.of(model.lm), share_prompts=False)
            loss = passes.cross_entropy(model, ROWS, 7)
            loss.backward()
        assert kept == [keep]
        found.append([loss.detach(), *(p.grad for p in model.lm.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(bits(a), bits(b))


def test_the_sampler_keeps_casts_from_token_to_token() -> None:
    model, seen = CarftModel(small_lm(), None, torch.bfloat16), []
    head = model.lm.lm_head

    def watch(*_: Any) -> None:
        seen.append(torch.is_autocast_cache_enabled())

    head.register_forward_hook(watch)
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=0)
    sampling = SamplingParams.of(Config().rollout.model_copy(update={"max_new_tokens": 3}), 0)
    HFEngine(model, tokenizer, batch_size=2).generate([[5, 6]], sampling)
    assert seen
    assert all(seen)
