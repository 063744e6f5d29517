"""The sampler of transformers: against the model's own distribution, its seeds, and by-hand decoding."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from carft_fast.core.errors import EngineError
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.load import load_model
from carft_fast.rollout.base import SamplingParams
from carft_fast.rollout.hf import HFEngine

from ..models.checks import PROMPTS, config, logits_of


@pytest.fixture
def model() -> CarftModel:
    return load_model(config(), "synthetic", torch.device("cpu"), heads=True)


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
