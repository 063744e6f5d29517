"""The cost model against torch's own count, and against differences known by hand."""

from dataclasses import replace

import pytest
import torch

from carft_fast.models.flops import ModelCost, StepShape, causal_pairs, fast_step, published_step
from carft_fast.models.packing import pack

from .test_packing import COMPLETIONS, CPU, MODELS, PROMPTS, build


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3, window 4"])
def test_predicted_flops_are_those_torch_counts(name: str) -> None:
    """torch's counter on a real forward with a block-diagonal mask, which it counts as the square it is in."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build(MODELS[name], "eager")
    lengths = [len(p) + len(c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    batch, cost = pack(PROMPTS, COMPLETIONS, CPU), ModelCost.of(model.lm)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = model.hidden_states(batch).hidden_TD
        _ = hidden[batch.predict_index_C] @ model.head_weight_VD.T
    by_operator = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in by_operator.items() if "bmm" in op)
    assert attention == cost.layers_flops(0, sum(lengths) ** 2)
    completion_tokens = sum(map(len, COMPLETIONS))
    assert sum(by_operator.values()) - attention == cost.layers_flops(sum(lengths), 0) + cost.head_flops(
        completion_tokens
    )
    ours = sum(cost.sequence_flops(len(p), len(c)) for p, c in zip(PROMPTS, COMPLETIONS, strict=True))
    pairs = sum(causal_pairs(n) for n in lengths)
    assert ours == cost.layers_flops(sum(lengths), pairs) + cost.head_flops(completion_tokens)
    assert ModelCost.of_config(MODELS[name]) == cost


def test_the_published_step_without_padding_costs_recomputation_and_prompt_logits() -> None:
    """Rows of one length: what is left of the difference is known by hand."""
    cost = ModelCost.of_config(MODELS["llama"])
    shape = StepShape([10] * 4, [20] * 4, [20] * 4, epochs=2, updates_per_epoch=3)
    ours, published = fast_step(cost, shape, one_micro_batch=False), published_step(cost, shape)
    layers = 4 * cost.layers_flops(30, causal_pairs(30))
    assert published["update"].flops - ours["update"].flops == 2 * (layers + 3 * cost.head_flops(4 * 10))
    prompts_again = 4 * cost.layers_flops(9, causal_pairs(9))
    head = cost.head_flops(2 * 4 * 10 + 4 * 30)
    assert published["log-probs"].flops - ours["log-probs"].flops == head + prompts_again
    recomputing = fast_step(cost, shape, recompute=True, one_micro_batch=False)
    assert recomputing["update"].flops - ours["update"].flops == 2 * layers
    assert ours["update"].flops - fast_step(cost, shape)["update"].flops == pytest.approx(layers / 3)
    assert published["rollout"] == ours["rollout"]
    # AdamW moves 32 bytes a parameter and update, whatever the path; the rest of `bytes` are weights and logits
    one = fast_step(cost, replace(shape, updates_per_epoch=1), one_micro_batch=False)["update"].bytes
    assert ours["update"].bytes - one == 2 * 2 * 32 * cost.all_weights
    padded = published_step(cost, replace(shape, completions=[5, 5, 5, 20]))["update"].flops
    assert padded == published["update"].flops


def test_drafts_change_the_rounds_and_what_a_round_computes_of_this_step_alone() -> None:
    """Two tokens a forward, half a token wasted for each: 24 tokens are 12 forwards of three rows, 36 rows."""
    cost = ModelCost.of_config(MODELS["llama"])
    plain = StepShape([10] * 4, [24] * 4, [24] * 4, epochs=1, decode_batch=4)
    drafted = replace(plain, tokens_per_forward=2.0, wasted_per_token=0.5)
    before, after = (fast_step(cost, shape)["rollout"] for shape in (plain, drafted))
    weights = 2 * (cost.layer_weights + cost.head_weights)
    assert (before.bytes, after.bytes) == (24 * weights, 12 * weights)
    pairs = causal_pairs(34) - causal_pairs(10)
    assert after.flops - before.flops == 4 * (cost.layers_flops(12, pairs / 2) + cost.head_flops(12))
    assert published_step(cost, drafted) == published_step(cost, plain)
    assert {**fast_step(cost, drafted), "rollout": before} == fast_step(cost, plain)
