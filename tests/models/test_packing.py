"""Packed attention and micro-batches, against each sequence alone, token by token."""

import itertools
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from carft_fast.config.toml import load_config
from carft_fast.core.errors import InputError
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models.attention import PACKED, packed_attention, take_rows
from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.load import load_model
from carft_fast.models.packing import PackedBatch, balanced_batches, pack, sequence_mean_weights

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.3,
}
MODELS = {
    "llama": transformers.LlamaConfig(**SMALL),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "mistral, window 4": transformers.MistralConfig(**SMALL, sliding_window=4, head_dim=8),
    "gemma3, window 4": transformers.Gemma3TextConfig(**SMALL, sliding_window=4, head_dim=8),
    "granite, scaled": transformers.GraniteConfig(**SMALL, attention_multiplier=0.2),
}
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14], [5, 6, 7], [5, 6, 7]]
COMPLETIONS = [[20, 21, 2], [22, 2, 30, 31], [23, 24, 25, 26, 2], [9], [30, 31, 32]]


def build(lm_config: Any, attention: str) -> CarftModel:
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(lm_config, attn_implementation=attention).eval()
    return CarftModel(lm, None, torch.float32)


@pytest.mark.parametrize("attention", [PACKED, "sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("name", MODELS)
def test_every_sequence_is_as_if_alone(name: str, attention: str) -> None:
    if attention == "flex_attention" and name != "llama":
        return  # transformers' own, compiled anew for each model: once is enough
    model = build(MODELS[name], attention)
    alone = build(MODELS[name], "eager")
    sequences = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    batch = pack(PROMPTS, COMPLETIONS, CPU)
    with torch.no_grad():
        packed, read = (
            model.hidden_states(pack(sequences, [[]] * len(sequences), CPU)).hidden_TD,
            model.hidden_states(batch).hidden_TD,
        )
        expected = torch.cat([alone.lm.base_model(torch.tensor([ids])).last_hidden_state[0] for ids in sequences])
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)
    for index in (batch.predict_index_C, batch.read_index_C):
        torch.testing.assert_close(read[index], expected[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral, window 4"])
def test_a_token_reaches_exactly_those_that_may_see_it(name: str) -> None:
    """Every token changed in turn: which states move is the mask. One layer, so that a window shows."""
    lm_config = transformers.AutoConfig.for_model(**(MODELS[name].to_dict() | {"num_hidden_layers": 1}))
    model = build(lm_config, PACKED)
    window = getattr(lm_config, "sliding_window", None) or 10**6
    lengths = [len(p) + len(c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    sequence = [i for i, n in enumerate(lengths) for _ in range(n)]
    ids = [x for p, c in zip(PROMPTS, COMPLETIONS, strict=True) for x in [*p, *c]]

    def states(changed: int | None) -> Tensor:
        new = iter([(x + 17 if i == changed else x) for i, x in enumerate(ids)])
        sequences = [list(itertools.islice(new, n)) for n in lengths]
        with torch.no_grad():
            return model.hidden_states(pack(sequences, [[]] * len(sequences), CPU)).hidden_TD

    before = states(None)
    for i in range(len(ids)):
        moved = (states(i) - before).abs().amax(1) > 0
        expected = [sequence[j] == sequence[i] and 0 <= j - i < window for j in range(len(ids))]
        assert moved.tolist() == expected, i


@pytest.mark.parametrize("name", MODELS)
def test_a_shared_prompt_changes_no_state_and_no_gradient(name: str) -> None:
    model = build(MODELS[name], PACKED)
    apart, shared = (pack(PROMPTS, COMPLETIONS, CPU, share_prompts=share) for share in (False, True))
    assert len(shared.ids_T) == len(apart.ids_T) - 2 * len(PROMPTS[0])

    def found(batch: PackedBatch) -> list[Tensor]:
        model.zero_grad()
        hidden = model.hidden_states(batch).hidden_TD
        states = torch.cat([hidden[batch.predict_index_C], hidden[batch.read_index_C]])
        weight = torch.linspace(-1, 1, states.numel()).view_as(states)
        (states * weight).sum().backward()
        return [states.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    assert torch.equal(apart.target_C, shared.target_C)
    for ours, expected in zip(found(shared), found(apart), strict=True):
        assert float((ours - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_of_a_row_taken_often_are_added_in_the_order_of_the_index(threads: int) -> None:
    """Bit for bit, whatever the number of threads; the sums are made here one at a time."""
    torch.manual_seed(0)
    index = torch.randint(5, (1000,))
    gradient = torch.randn(1000, 64) * 10 ** torch.linspace(-3, 3, 1000)[:, None]
    expected = torch.zeros(6, 64)
    for i, row in zip(index.tolist(), gradient, strict=True):
        expected[i] += row
    x = torch.randn(6, 64, requires_grad=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        taken = take_rows(x, index)
        taken.backward(gradient)
    finally:
        torch.set_num_threads(before)
    assert x.grad is not None
    assert torch.equal(x.grad, expected)
    assert torch.equal(taken, x.detach()[index])


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_of_shared_keys_are_those_of_float64(window: int | None) -> None:
    """Attention written out: a prompt's queries see it, a completion's see the prompt and then itself."""
    shared = pack(PROMPTS, COMPLETIONS, CPU, share_prompts=True)
    lengths = [3, 3, 10, 6, 1, 3]
    seen = [[0, 1, 2], [0, 1, 2, 3, 4, 5], [*range(6, 16)], [*range(16, 22)], [0, 1, 2, 22], [0, 1, 2, 23, 24, 25]]
    assert shared.segments.q_lengths == tuple(lengths)
    assert shared.segments.key_index is not None
    assert shared.segments.key_index.tolist() == [i for keys in seen for i in keys]
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 26, 8) for heads in (4, 2, 2)]
    d_output = torch.randn(1, 26, 4, 8)

    leaves = [x.double().requires_grad_() for x in inputs]
    q, k, v = (x[0] for x in leaves)
    rows = []
    for keys, n in zip(seen, lengths, strict=True):
        own = keys[-n:]
        behind = torch.arange(len(keys))[-n:, None] - torch.arange(len(keys))
        hidden = (behind < 0) | (behind >= (window or 100))
        for h in range(4):
            score = q[h, own] @ k[h // 2, keys].T * 0.3
            rows.append(score.masked_fill(hidden, -torch.inf).softmax(1) @ v[h // 2, keys])
    expected = torch.cat([torch.stack(rows[i : i + 4], 1) for i in range(0, len(rows), 4)])[None]
    wanted = torch.autograd.grad(expected, leaves, d_output.double())

    leaves = [x.clone().requires_grad_() for x in inputs]
    output, _ = packed_attention(
        torch.nn.Module(), *leaves, None, scaling=0.3, sliding_window=window, segments=shared.segments
    )
    found = torch.autograd.grad(output, leaves, d_output)
    for ours, exact in zip([output, *found], [expected, *wanted], strict=True):
        assert float((ours - exact).detach().abs().max()) <= 1e-6 * float(exact.abs().max())


def test_pack_follows_its_worked_example() -> None:
    packed = pack([[1, 2, 3], [6]], [[4, 5], [7, 8, 9]], torch.device("cpu"))
    assert packed.ids_T.tolist() == list(range(1, 10))
    assert packed.position_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert packed.segments.cu_q.tolist() == packed.segments.cu_k.tolist() == [0, 5, 9]
    assert packed.completion_cu.tolist() == [0, 2, 5]
    assert packed.read_index_C.tolist() == [3, 4, 6, 7, 8]
    assert packed.predict_index_C.tolist() == [2, 3, 5, 6, 7]
    assert packed.target_C.tolist() == [4, 5, 7, 8, 9]
    weights = sequence_mean_weights(packed, sequences=4)
    torch.testing.assert_close(weights, torch.tensor([1 / 8, 1 / 8, 1 / 12, 1 / 12, 1 / 12]))
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        pack([[1], []], [[2], [3]], torch.device("cpu"))


def test_shared_prompts_follow_the_worked_example() -> None:
    batch = pack([[1, 2, 3], [1, 2, 3]], [[4, 5], [6, 7, 8]], CPU, share_prompts=True)
    assert batch.ids_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.position_T.tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert batch.read_index_C.tolist() == [3, 4, 5, 6, 7]
    assert batch.predict_index_C.tolist() == [2, 3, 2, 5, 6]
    assert batch.segments.key_index is not None
    assert batch.segments.key_index.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7]
    assert batch.segments.cu_q.tolist() == [0, 3, 5, 8]
    assert batch.segments.cu_k.tolist() == [0, 3, 8, 14]


@pytest.mark.parametrize("share", [False, True])
def test_a_cot_has_the_last_tokens_of_its_prompt(share: bool) -> None:
    """Two completions of one prompt, one of another, one that is empty."""
    prompts, completions, lengths = [[1, 2, 3], [6], [1, 2, 3], [1, 2, 3]], [[4, 5], [7], [], [8]], [2, 0, 1, 2]
    batch = pack(prompts, completions, CPU, share_prompts=share, prefix_lengths=lengths)
    plain = pack(prompts, completions, CPU, share_prompts=share)
    assert batch.ids_T[batch.cot_index_K].tolist() == [2, 3, 4, 5, 7, 3, 2, 3, 8]
    assert batch.cot_cu.tolist() == [0, 4, 5, 6, 9]
    for name in ("ids_T", "position_T", "completion_cu", "read_index_C", "predict_index_C"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))
    assert torch.equal(plain.cot_index_K, plain.read_index_C)
    assert torch.equal(plain.cot_cu, plain.completion_cu)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [False, True])
def test_a_forward_after_kept_prompts_is_as_if_it_had_them(name: str, share: bool) -> None:
    """Other completions, in another order, some of them of the same prompt and one empty."""
    model = build(MODELS[name], PACKED)
    prompts, completions = PROMPTS[3::-1], [[7], [], [40, 41, 42, 43], [2, 3]]
    first = pack(PROMPTS, COMPLETIONS, CPU, share_prompts=share, keep_prompts=True)
    whole = pack(prompts, completions, CPU)
    with torch.no_grad():
        model.hidden_states(first)
        after = pack(prompts, completions, CPU, share_prompts=share, after=first.segments.keep)
        found, expected = model.hidden_states(after).hidden_TD, model.hidden_states(whole).hidden_TD
    assert len(after.ids_T) == sum(map(len, completions)) + len(prompts)
    assert torch.equal(after.target_C, whole.target_C)
    for index in ("predict_index_C", "read_index_C"):
        torch.testing.assert_close(
            found[getattr(after, index)], expected[getattr(whole, index)], rtol=1e-4, atol=1e-5, msg=index
        )


def test_prompts_are_kept_once_without_gradient_until_closed() -> None:
    model = build(MODELS["llama"], PACKED)
    batch = pack(PROMPTS, COMPLETIONS, CPU, keep_prompts=True)
    kept = batch.segments.keep
    assert kept is not None
    assert kept.at == {(5, 6, 7): 0, (8, 9, 10, 11, 12, 13): 3, (14,): 9}
    model.hidden_states(batch)
    shapes = {tuple(x.shape) for states in kept.layers.values() for x in states}
    assert shapes == {(1, SMALL["num_key_value_heads"], 10, 8)}
    assert len(kept.layers) == SMALL["num_hidden_layers"]
    assert not any(x.requires_grad for states in kept.layers.values() for x in states)
    kept.close()
    model.hidden_states(batch)
    assert not kept.layers


def test_a_batch_after_kept_prompts_follows_the_worked_example() -> None:
    kept = pack([[9], [1, 2, 3]], [[4], [4]], CPU, keep_prompts=True).segments.keep
    batch = pack([[1, 2, 3], [1, 2, 3]], [[4, 5], [6, 7, 8]], CPU, after=kept)
    assert batch.ids_T.tolist() == [3, 4, 5, 3, 6, 7, 8]
    assert batch.position_T.tolist() == [2, 3, 4, 2, 3, 4, 5]
    assert batch.read_index_C.tolist() == [1, 2, 4, 5, 6]
    assert batch.predict_index_C.tolist() == [0, 1, 3, 4, 5]
    assert batch.segments.key_index is not None
    assert batch.segments.key_index.tolist() == [1, 2, 4, 5, 6, 1, 2, 7, 8, 9, 10]  # of [9, 1, 2, 3] and then the batch
    assert batch.segments.cu_q.tolist() == [0, 3, 7]
    assert batch.segments.cu_k.tolist() == [0, 5, 11]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("grouped", [False, True], ids=["torch 2.11", "torch 2.12"])
def test_the_call_of_the_varlen_kernel_means_the_same(
    monkeypatch: pytest.MonkeyPatch, window: int | None, share: bool, grouped: bool
) -> None:
    """The CUDA branch without a GPU: torch's kernel is replaced by its documented meaning, written out.

    torch 2.11 has no `enable_gqa`: as many heads of keys as of queries are needed there.
    """
    from torch.nn.attention import varlen

    from carft_fast.models.attention import _varlen

    def meaning(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **o: Any
    ) -> Tensor:
        left, right = o["window_size"]
        assert (right, cu_q.dtype, cu_k.dtype) == (0, torch.int32, torch.int32)
        assert k.shape[1] == v.shape[1] == (2 if grouped else 4)
        output = torch.empty_like(q)
        for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
            assert b - a <= max_q
            assert d - c <= max_k
            for i in range(a, b):
                last = d - (b - i)  # the last query sees the last key
                first = c if left < 0 else max(c, last - left)
                for h in range(q.shape[1]):
                    keys = slice(first, last + 1)
                    at = h // (q.shape[1] // k.shape[1])
                    weight = (k[keys, at] @ q[i, h] * o["scale"]).softmax(0)
                    output[i, h] = weight @ v[keys, at]
        return output

    def of_2_11(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        return meaning(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    def of_2_12(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        seqused_k: Tensor | None = None,
        block_table: Tensor | None = None,
        num_splits: int | None = None,
    ) -> Tensor:
        assert enable_gqa, "else it refuses fewer heads of keys than of queries"
        assert cu_seq_k is not None
        return meaning(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    segments = pack(PROMPTS, COMPLETIONS, CPU, share_prompts=share).segments
    torch.manual_seed(0)
    tokens = sum(segments.q_lengths)
    q, k, v = (torch.randn(1, heads, tokens, 8) for heads in (4, 2, 2))
    expected, _ = packed_attention(
        torch.nn.Module(), q, k, v, None, scaling=0.3, sliding_window=window, segments=segments
    )
    if segments.key_index is not None:
        k, v = k[:, :, segments.key_index], v[:, :, segments.key_index]
    monkeypatch.setattr(varlen, "varlen_attn", of_2_12 if grouped else of_2_11)
    torch.testing.assert_close(_varlen(q, k, v, 0.3, window, segments), expected)


@pytest.mark.parametrize(
    ("lm_config", "why"),
    [
        (transformers.Gemma2Config(**SMALL, head_dim=8), "a soft cap"),
        (transformers.MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4), "states differ"),
    ],
    ids=["soft cap", "state space"],
)
def test_models_that_packing_would_change_are_refused(lm_config: Any, why: str) -> None:
    with pytest.raises(InputError, match=rf'model\.attention = "packed": .*{why}.*allowed here'):
        build(lm_config, PACKED)


@pytest.mark.parametrize(
    ("lm_config", "attention", "message"),
    [
        (transformers.Gemma2Config(**SMALL, head_dim=8), "sdpa", r'"sdpa": .* soft cap .*allowed here: "eager" or '),
        (transformers.Gemma2Config(**SMALL, head_dim=8), PACKED, r'"packed": .* soft cap.*allowed here: "eager" or '),
        (transformers.BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4), "eager", "states differ"),
        (transformers.BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4), PACKED, "allowed here: model.i"),
    ],
)
def test_no_attention_that_mixes_sequences_is_taken_or_recommended(
    lm_config: Any, attention: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build(lm_config, attention)


def test_the_plain_path_keeps_a_soft_cap(tmp_path: Any) -> None:
    lm_config = transformers.Gemma2Config(**SMALL, head_dim=8, attn_logit_softcapping=0.5)
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(lm_config, attn_implementation="eager").eval()
    lm.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    model = load_model(load_config(None, ["model.impl=padded"]), str(tmp_path), CPU, heads=False)
    ids = torch.tensor([PROMPTS[1] + COMPLETIONS[1]])
    with torch.no_grad(), model.padded() as padded:
        torch.testing.assert_close(padded(ids).logits, lm(ids).logits)


@pytest.mark.parametrize(
    "lm_config",
    [
        transformers.BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4),
        transformers.GPTNeoConfig(
            vocab_size=60, hidden_size=32, num_layers=1, attention_types=[[["global"], 1]], num_heads=4
        ),
    ],
    ids=["without sdpa", "with attention classes of its own"],
)
def test_what_cannot_be_packed_can_be_padded(lm_config: Any, tmp_path: Any) -> None:
    transformers.AutoModelForCausalLM.from_config(lm_config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r'model\.attention = "packed": .*model\.impl = "padded", which pads'):
        load_model(load_config(None, []), str(tmp_path), CPU, heads=True)
    model = load_model(load_config(None, ["model.impl=padded"]), str(tmp_path), CPU, heads=True)
    assert model.attention == "eager"
    module = {"bloom": "query_key_value", "gpt_neo": "q_proj"}[lm_config.model_type]
    options = ["model.impl=padded", "lora.rank=2", f'lora.target_modules=["{module}"]']
    load_model(load_config(None, options), str(tmp_path), CPU, heads=True).save(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(merged[name].equal(tensor) for name, tensor in model.lm.state_dict().items())


def test_a_model_that_does_not_go_through_its_base_model() -> None:
    """And whose masks do not heed positions: packed attention makes its own."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_attention_heads": 4}
    lm_config = transformers.OPTConfig(vocab_size=60, num_hidden_layers=2, init_std=0.3, **sizes)
    with pytest.raises(InputError, match=r'"eager": .*states differ .*allowed here: "packed" or '):
        build(lm_config, "eager")
    model = build(lm_config, PACKED)
    assert model.plain_head
    batch = pack(PROMPTS, COMPLETIONS, CPU)
    with torch.no_grad():
        logits = model.hidden_states(batch).hidden_TD[batch.predict_index_C] @ model.head_weight_VD.T
        with model.padded() as lm:
            alone = [
                lm(torch.tensor([p + c])).logits[0, len(p) - 1 : -1] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
            ]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_the_saved_model_names_no_attention_of_ours(tmp_path: Any) -> None:
    model = load_model(load_config(None, ["model.path=synthetic"]), "synthetic", CPU, heads=True)
    model.save(tmp_path)
    assert PACKED not in (tmp_path / "config.json").read_text()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


# --- micro-batches ----------------------------------------------------------------------------------------------------

ITEMS = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@given(ITEMS, st.integers(100, 400), st.integers(1, 4))
def test_balanced_batches_keep_the_budget_and_every_item(tokens: list[int], budget: int, multiple: int) -> None:
    costs = [n + n * n / 50 for n in tokens]
    batches = balanced_batches(tokens, costs, budget, multiple_of=multiple)
    assert sorted(i for batch in batches for i in batch) == list(range(len(tokens)))
    assert all(sum(tokens[i] for i in batch) <= budget for batch in batches)
    assert len(batches) % multiple == 0
    assert batches == balanced_batches(tokens, costs, budget, multiple_of=multiple)
    # as few as fit, nearly: two more groups than the tokens need would be waste
    assert len(batches) <= multiple * (-(-sum(tokens) // (budget * multiple)) * 2 + 1)


@given(ITEMS, st.integers(1, 8))
def test_costs_are_alike_where_the_budget_leaves_room(tokens: list[int], ranks: int) -> None:
    costs = [n + n * n / 50 for n in tokens]
    batches = balanced_batches(tokens, costs, sum(tokens), multiple_of=ranks)
    assert len(batches) == ranks
    loads = [sum(costs[i] for i in batch) for batch in batches]
    assert max(loads) - min(loads) <= max(costs)


def test_an_item_above_the_budget_is_named() -> None:
    with pytest.raises(ValueError, match="a sequence of 101 tokens does not fit a micro-batch of 100 tokens"):
        balanced_batches([3, 101], [1.0, 1.0], 100)
