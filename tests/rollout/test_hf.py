"""Model, heads and sampler against transformers' own forward, the published heads, and by-hand decoding."""

import dataclasses
import itertools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from carft_fast.config.schema import Config
from carft_fast.config.toml import load_config
from carft_fast.core.errors import EngineError
from carft_fast.core.seeds import chunks, epoch_rows
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.heads import CarftHeads
from carft_fast.models.load import load_model
from carft_fast.models.packing import PackedBatch, pack, sequence_mean_weights
from carft_fast.objective.losses import completion_logprobs, cot_embeddings, sft_loss
from carft_fast.objective.passes import Rows, build_passes
from carft_fast.rewards.answers import Grade
from carft_fast.rollout.base import SamplingParams, request_seed
from carft_fast.rollout.hf import HFEngine, inverse_cdf
from carft_fast.rollout.vllm.adapter import sampling_fields
from carft_fast.training.rl import score_rollouts
from carft_kernels import value_pool

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "visible" / "value_head.safetensors"
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]
COMPLETIONS = [[20, 21, 2], [22, 2], [23, 24, 25, 26, 2]]


def config(*overrides: str) -> Config:
    return load_config(None, ["model.path=synthetic", *overrides])


@pytest.fixture
def model() -> CarftModel:
    return load_model(config(), "synthetic", torch.device("cpu"), heads=True)


@pytest.fixture
def batch() -> PackedBatch:
    return pack(PROMPTS, COMPLETIONS, torch.device("cpu"))


@pytest.mark.parametrize(
    ("override", "by_onednn"),
    [
        ("model.compute_dtype=float32", True),
        ("lora.rank=2", True),
        ("model.compute_dtype=bfloat16", False),
        ("model.impl=reference", False),  # the published trainers' way
    ],
)
def test_linear_layers_on_a_cpu(override: str, by_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 every product goes to oneDNN, also the LM head's, the heads' and LoRA's; and the way back."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr("carft_kernels._runtime.ONEDNN_FROM", 1)
    model = load_model(config(override), "synthetic", torch.device("cpu"), heads=True)
    passes = build_passes(config(override), model, 100)
    with torch.profiler.profile() as profile:
        loss = passes.cross_entropy(model, Rows(PROMPTS, COMPLETIONS), 10) + model.value(torch.ones(4, 64)).sum()
        loss.backward()
    names = {event.key for event in profile.key_averages()}
    assert ("mkldnn::_linear_pointwise" in names) == by_onednn
    if by_onednn:
        assert not names & {"aten::mm", "aten::addmm", "aten::linear"}


@pytest.mark.parametrize(("version", "value_head"), [("v1", "separate"), ("v2", "shared")])
def test_heads_of_the_published_code(version: str, value_head: str) -> None:
    if not GOLDEN.is_file():
        pytest.skip(f"reference vectors {GOLDEN} do not exist")
    case = f"head0_{version}/"
    a = {name.removeprefix(case): x for name, x in load_file(GOLDEN).items() if name.startswith(case)}
    hidden = a["h"].flatten(0, 1).requires_grad_()
    heads = CarftHeads(hidden.shape[1], 64, value_head)
    heads.load_state_dict({name: a[name] for name in heads.state_dict()})
    value, embedding = heads.value(hidden), heads.embed(hidden)
    torch.testing.assert_close(value, a["value"].flatten(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(embedding, a["emb"].flatten(0, 1), rtol=1e-5, atol=1e-6)
    loss = (value * a["up_value"].flatten()).sum() + (embedding * a["up_emb"].flatten(0, 1)).sum()
    d_hidden, d_proj = torch.autograd.grad(loss, (hidden, heads.proj.weight))
    torch.testing.assert_close(d_hidden, a["grad_h"].flatten(0, 1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(d_proj, a["grad_proj_weight"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["part0", "part1"])
def test_embedding_enhanced_partial_reward_of_the_published_code(case: str) -> None:
    """Ids, values and embeddings to z_1, z_2, their cosine, and the score of wrong but extractable answers."""
    if not GOLDEN.is_file():
        pytest.skip(f"reference vectors {GOLDEN} do not exist")
    manifest = json.loads((GOLDEN.parent / "manifest.json").read_text())
    params = manifest["topics"]["reward_partial"]["cases"][case]["params"]
    vectors = load_file(GOLDEN.parent / "reward_partial.safetensors")
    a = {name.removeprefix(f"{case}/"): x for name, x in vectors.items() if name.startswith(f"{case}/")}

    def pooled(ids: Tensor, hidden: Tensor, value: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        rows, length = ids.shape
        mask = (torch.arange(length) >= prefix[:, None]) & (ids != params["pad_id"])
        offsets = torch.arange(0, rows * length + 1, length)
        return value_pool(hidden.flatten(0, 1), value.flatten(), offsets, mask_T=mask.flatten())[0], mask.any(1)

    prompt = torch.full_like(a["base_prefix_len"], params["prompt_len"])
    z_1, filled_1 = pooled(a["base_ids"], a["base_hidden"], a["base_value"], a["base_prefix_len"])
    z_2, filled_2 = pooled(a["model_ids"], a["hidden"], a["value"], prompt)
    # the published code pools a row without completion over everything, pads included (test_golden.py: test_value_pool)
    rows = filled_1 & filled_2
    assert rows.sum() >= 4
    for ours, expected in ((z_1, a["z_1"]), (z_2, a["z_2"])):
        torch.testing.assert_close(ours[rows], expected[rows], rtol=1e-5, atol=1e-6)
    cosine = torch.cosine_similarity(z_1, z_2)
    torch.testing.assert_close(cosine[rows], a["cos"][rows], rtol=1e-5, atol=1e-6)
    grades = [Grade(reward == 1, None if reward == 0 else 5.0) for reward in a["reward_in"].tolist()]
    assert any(not g.correct and g.extractable for g, filled in zip(grades, rows.tolist(), strict=True) if filled)
    score = score_rollouts(grades, cosine, config())
    torch.testing.assert_close(score.double()[rows], a["reward_out"][rows], rtol=1e-5, atol=1e-6)


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


def test_every_epoch_visits_every_row_once() -> None:
    drawn = [pair for step in range(14) for pair in epoch_rows(7, 3, step, seed=1)]
    assert [epoch for _, epoch in drawn] == [k // 7 for k in range(42)]
    epochs = chunks([row for row, _ in drawn], 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert drawn != [pair for step in range(14) for pair in epoch_rows(7, 3, step, seed=2)]


def logits_of(model: CarftModel, ids_BL: Tensor) -> Tensor:
    """transformers' own forward with its own attention."""
    with model.padded() as lm:
        return lm(ids_BL).logits


def alone(model: CarftModel) -> list[Tensor]:
    """Each sequence by itself through transformers: its log-probs."""
    found = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        logits = logits_of(model, torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return found


def test_packed_logprobs_equal_each_sequence_alone(model: CarftModel, batch: PackedBatch) -> None:
    with torch.no_grad():
        ours = completion_logprobs(model, model(batch), batch)
        torch.testing.assert_close(ours, torch.cat(alone(model)), rtol=1e-5, atol=1e-5)


def test_heads_beyond_a_plain_matmul_take_the_logits_path(batch: PackedBatch) -> None:
    """A soft cap and a scale after the LM head: found at load, and the log-probs are the model's own."""
    common: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    gemma = transformers.Gemma2Config(**common, head_dim=16, final_logit_softcapping=0.2, initializer_range=0.5)
    gemma._attn_implementation = "eager"  # its attention has a soft cap too, which "packed" refuses
    granite = transformers.GraniteConfig(**common, logits_scaling=4.0, initializer_range=0.5)
    for lm_config in (gemma, granite):
        torch.manual_seed(0)
        lm = transformers.AutoModelForCausalLM.from_config(lm_config).eval()
        model = CarftModel(lm, CarftHeads(32, 8, "shared"), torch.float32)
        assert not model.plain_head
        with torch.no_grad():
            output = model(batch)
            assert output.logits_CV is not None
            ours = completion_logprobs(model, output, batch)
            torch.testing.assert_close(ours, torch.cat(alone(model)), rtol=1e-4, atol=1e-5)
            last = lm.base_model(batch.ids_T[None, :6]).last_hidden_state[0]
            torch.testing.assert_close(output.hidden_TD[:6], last, rtol=1e-4, atol=1e-5)


def test_sft_loss_is_that_of_transformers(model: CarftModel, batch: PackedBatch) -> None:
    longest = max(batch.segments.q_lengths)
    ids = torch.zeros(len(PROMPTS), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        ids[row, : len(prompt + completion)] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : len(prompt + completion)] = torch.tensor(completion)
    with model.padded() as lm:
        theirs = lm(input_ids=ids, labels=labels).loss
    ours = sft_loss(model, model(batch), batch, total_tokens=len(batch.read_index_C))
    torch.testing.assert_close(ours, theirs)
    weight = model.head_weight_VD
    (our_gradient,), (their_gradient,) = torch.autograd.grad(ours, weight), torch.autograd.grad(theirs, weight)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-6)


def test_cot_embedding_reads_the_completion_tokens_themselves(model: CarftModel, batch: PackedBatch) -> None:
    """Paper eq. 6 by hand, one sequence: states AT the tokens, projected first and pooled after."""
    with torch.no_grad():
        hidden = model(batch).hidden_TD
        ours = cot_embeddings(model, hidden, batch)[:, 0]
        with model.padded() as lm:
            last = lm.base_model(torch.tensor([PROMPTS[1] + COMPLETIONS[1]])).last_hidden_state[0]
        states = last[len(PROMPTS[1]) :]
        by_hand = (model.value(states).softmax(0)[:, None] * model.embed(states)).sum(0)
    torch.testing.assert_close(ours[1], by_hand, rtol=1e-4, atol=1e-5)


def test_a_saved_folder_is_a_plain_model_with_heads_beside_it(
    model: CarftModel, batch: PackedBatch, tmp_path: Path
) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    again = load_model(config(), str(tmp_path), torch.device("cpu"), heads=True)
    with torch.no_grad():
        expected = logits_of(model, batch.ids_T[None])
        assert torch.equal(plain(batch.ids_T[None]).logits, expected)
        hidden = model(batch).hidden_TD
        assert torch.equal(again.value(hidden), model.value(hidden))
        assert torch.equal(again.embed(hidden), model.embed(hidden))


@pytest.fixture
def engine(model: CarftModel) -> HFEngine:
    with torch.no_grad():  # far from uniform, so that truncation and temperature matter
        for parameter in model.lm.parameters():
            parameter.mul_(1.5)
    return HFEngine(model, build_tokenizer(), batch_size=2)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.3, 0.8, 0), (1.0, 1.0, 5)]
)
def test_sampled_logprobs_are_of_the_distribution_sampled_from(
    model: CarftModel, engine: HFEngine, temperature: float, top_p: float, top_k: int
) -> None:
    sampling = SamplingParams(12, temperature=temperature, top_p=top_p, top_k=top_k, samples_per_prompt=2, seed=5)
    rollouts = engine.generate(PROMPTS, sampling)
    assert len(rollouts) == 2 * len(PROMPTS)
    for prompt, rollout in zip([p for p in PROMPTS for _ in range(2)], rollouts, strict=True):
        ids = rollout.completion_ids
        with torch.no_grad():
            logits = logits_of(model, torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1] / temperature
        if top_k:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
        if top_p < 1:
            ordered, order = logits.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            logits = logits.masked_fill((before >= top_p).scatter(1, order, before >= top_p), float("-inf"))
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.sampled_logprobs), expected, rtol=1e-4, atol=1e-4)
    again = engine.generate(PROMPTS, sampling)
    assert [r.completion_ids for r in again] == [r.completion_ids for r in rollouts]
    other = engine.generate(PROMPTS, SamplingParams(12, temperature=temperature, samples_per_prompt=2, seed=6))
    assert [r.completion_ids for r in other] != [r.completion_ids for r in rollouts]


def test_a_models_generation_config_reaches_its_copies_and_not_the_sampler(
    model: CarftModel, engine: HFEngine, tmp_path: Path
) -> None:
    own = {"top_k": 3, "top_p": 0.5, "repetition_penalty": 1.7, "temperature": 0.1, "suppress_tokens": [5, 6]}
    own |= {"min_new_tokens": 6, "max_time": 1e-9, "return_dict_in_generate": True, "guidance_scale": 2.0}
    first, second = tmp_path / "first", tmp_path / "second"
    model.save(first)
    build_tokenizer().save_pretrained(first)
    (first / "generation_config.json").write_text(json.dumps(own))  # transformers reads it, and would not write it
    loaded = load_model(config(), str(first), torch.device("cpu"), heads=True)
    sampling = SamplingParams(12, samples_per_prompt=2, seed=5)
    expected = engine.generate(PROMPTS, sampling)
    assert HFEngine(loaded, build_tokenizer(), batch_size=2).generate(PROMPTS, sampling) == expected
    loaded.save(second)
    written = json.loads((second / "generation_config.json").read_text())
    assert own.items() <= written.items()


def test_sampling_leaves_the_global_random_state_alone(engine: HFEngine) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    engine.generate(PROMPTS, SamplingParams(4, seed=1))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.0, 1.0, 6), (1.4, 0.8, 0), (1.2, 0.9, 12)]
)
def test_frequencies_follow_the_model(
    model: CarftModel, engine: HFEngine, temperature: float, top_p: float, top_k: int
) -> None:
    """First sampled token over many draws, against the softmax of the model's logits: chi-square, and none of those
    that were cut."""
    draws = 4000
    engine = HFEngine(model, build_tokenizer(), batch_size=draws)
    sampling = SamplingParams(
        1, temperature=temperature, top_p=top_p, top_k=top_k, samples_per_prompt=draws, seed=top_k
    )
    first = torch.tensor([r.completion_ids[0] for r in engine.generate([PROMPTS[0]], sampling)])
    with torch.no_grad():
        logits = logits_of(model, torch.tensor([PROMPTS[0]]))[0, -1].double() / temperature
    if top_k:
        logits[logits < logits.topk(top_k).values[-1]] = float("-inf")
    ordered, order = logits.softmax(-1).sort(descending=True)
    logits[order[ordered.cumsum(-1) - ordered >= top_p]] = float("-inf")
    kept = logits > float("-inf")
    assert bool(kept.all()) == (top_p == 1 and not top_k)
    expected = draws * logits.softmax(-1)
    counts = torch.bincount(first, minlength=len(expected)).double()
    assert counts[~kept].sum() == 0
    common = expected >= 5
    observed, wanted = (torch.cat([x[common], x[~common & kept].sum()[None]]) for x in (counts, expected))
    bins = wanted > 0
    chi_square = float(((observed - wanted)[bins] ** 2 / wanted[bins]).sum())
    freedom = int(bins.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_the_token_is_where_the_cumulative_distribution_passes_the_number() -> None:
    """Against exact fractions; the first and the last number that can be drawn, with cut tokens at either end."""
    generator = torch.Generator().manual_seed(0)
    logprob = torch.randn(64, 30, generator=generator)
    logprob[torch.rand(64, 30, generator=generator) < 0.5] = float("-inf")
    logprob[:, 0], logprob[::2, -1], logprob[1::2, 15] = float("-inf"), float("-inf"), 1.0
    logprob[::2, 14] = 1.0
    logprob = logprob.log_softmax(-1)
    for uniform in (0.0, 0.25, 1 - 2.0**-53):
        found = inverse_cdf(logprob, torch.full((64, 1), uniform, dtype=torch.float64))[:, 0].tolist()
        for row, token in zip(logprob.exp().tolist(), found, strict=True):
            totals = list(itertools.accumulate(map(Fraction, row)))
            assert token == next(i for i, total in enumerate(totals) if total > Fraction(uniform) * totals[-1])
            assert row[token] > 0


def test_a_completion_depends_on_its_own_seed_alone(model: CarftModel, engine: HFEngine) -> None:
    """Not on the rows beside it: any batch size, any share of the prompts, fewer samples, a lower limit."""
    prompts = [*PROMPTS, PROMPTS[0], *PROMPTS]
    sampling = SamplingParams(16, temperature=0.9, top_k=20, top_p=0.9, samples_per_prompt=3, seed=4)

    def sampled(part: list[list[int]], batch_size: int, **changes: int) -> list[list[int]]:
        engine = HFEngine(model, build_tokenizer(), batch_size=batch_size)
        return [r.completion_ids for r in engine.generate(part, dataclasses.replace(sampling, **changes))]

    whole = sampled(prompts, 64)
    assert len({tuple(ids) for ids in whole}) == len(whole), "every sample has a seed of its own"
    assert sampled(prompts, 1) == sampled(prompts, 3) == whole
    for cut in (1, 4):
        assert sampled(prompts[:cut], 64) + sampled(prompts[cut:], 2, first_prompt=cut) == whole
    assert sampled(prompts, 5, samples_per_prompt=2) == [ids for i, ids in enumerate(whole) if i % 3 < 2]
    assert sampled(prompts, 5, max_new_tokens=7) == [ids[:7] for ids in whole]
    assert sampled(prompts, 64, seed=5) != whole


def test_every_engine_counts_seeds_from_the_first_prompt() -> None:
    whole = SamplingParams(8, samples_per_prompt=2, seed=3)
    part = dataclasses.replace(whole, first_prompt=5)
    assert request_seed(part, 2) == request_seed(whole, 7) != request_seed(whole, 2)
    assert sampling_fields(part, 2, 0) == sampling_fields(whole, 7, 0)


def test_weights_that_are_not_finite_sample_nothing(model: CarftModel, engine: HFEngine) -> None:
    with torch.no_grad():
        model.lm.get_input_embeddings().weight.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(EngineError, match="the weights hold NaN or infinity"):
            engine.generate(PROMPTS, SamplingParams(4, temperature=temperature))


def test_greedy_finish_reasons_and_versions(model: CarftModel, engine: HFEngine) -> None:
    assert engine.sync(model) == 1
    seen: list[int] = []
    rollouts = engine.generate(PROMPTS, SamplingParams(6, temperature=0), on_progress=seen.append)
    assert sum(seen) == len(PROMPTS)
    eos = build_tokenizer().eos_token_id
    for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(logits_of(model, torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] == eos:
                break
        assert rollout.completion_ids == ids[len(prompt) :]
        assert rollout.finish_reason == ("stop" if ids[-1] == eos else "length")
        assert rollout.weight_version == 1


def test_a_long_generation_can_be_stopped_between_tokens(engine: HFEngine) -> None:
    calls: list[int] = []

    def stop_at_the_third_token(finished: int) -> None:
        calls.append(finished)
        if len(calls) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        engine.generate([PROMPTS[0]], SamplingParams(200, seed=0), on_progress=stop_at_the_third_token)
    assert len(calls) == 3


def test_completions_end_at_their_eos_though_padding_has_its_id(model: CarftModel) -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with torch.no_grad():  # make EOS likely, so that rows of a batch end at different steps
        model.lm.get_input_embeddings().weight[tokenizer.eos_token_id] *= 3
    rollouts = HFEngine(model, tokenizer, batch_size=64).generate([PROMPTS[0]] * 64, SamplingParams(30, seed=1))
    stopped = [r for r in rollouts if r.finish_reason == "stop"]
    assert len(stopped) > 5
    assert len({len(r.completion_ids) for r in stopped}) > 2
    for rollout in rollouts:
        ids = rollout.completion_ids
        assert (
            ids.index(tokenizer.eos_token_id) == len(ids) - 1
            if rollout in stopped
            else tokenizer.eos_token_id not in ids
        )
        assert len(rollout.sampled_logprobs) == len(ids)
