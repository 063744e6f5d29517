"""What every engine has to give, on a real vLLM: the trainer's own log-probs, versions, seeds, and no mixed weights."""

import copy
import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer

from carft_fast.config.schema import Config
from carft_fast.config.toml import load_config
from carft_fast.core.errors import EngineError, InputError
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.load import load_model
from carft_fast.models.sampler_weights import SamplerWeights
from carft_fast.rollout.base import RolloutEngine, SamplingParams
from carft_fast.rollout.engines import build_engine
from carft_fast.rollout.hf import HFEngine
from carft_fast.rollout.stream import RolloutStream
from carft_fast.rollout.vllm import adapter as vllm_adapter
from carft_fast.rollout.vllm.adapter import check_engine
from carft_fast.rollout.vllm.engine import VLLMEngine
from carft_fast.rollout.vllm.servers import VLLMServerEngine
from carft_fast.training.agreement import check_agreement

from .checks import CPU, EOS, PROMPTS, assert_samples_of, make_config, perturb

GREEDY = SamplingParams(20, temperature=0)
SAMPLED = SamplingParams(24, temperature=0.8, top_p=0.9, top_k=12, samples_per_prompt=3, seed=11)


def test_greedy_text_and_logprobs_are_transformers_over_three_syncs(engine: RolloutEngine, model: CarftModel) -> None:
    transformers_engine = HFEngine(model, build_tokenizer(), batch_size=8)
    version = engine.sync(model)
    for change in range(4):
        rollouts = engine.generate(PROMPTS, GREEDY)
        assert_samples_of(model.lm, rollouts, GREEDY)
        expected = transformers_engine.generate(PROMPTS, GREEDY)
        assert [r.completion_ids for r in rollouts] == [r.completion_ids for r in expected]
        assert {r.weight_version for r in rollouts} == {version} == {engine.version}
        perturb(model, 100 + change)
        assert engine.sync(model) == version + 1
        version += 1


def test_a_compiled_model_follows_the_weights(compiled_engine: VLLMEngine, model: CarftModel) -> None:
    for change in range(3):
        perturb(model, change)
        compiled_engine.sync(model)
        for sampling in (GREEDY, SAMPLED):
            assert_samples_of(model.lm, compiled_engine.generate(PROMPTS, sampling), sampling)


@pytest.mark.parametrize(
    ("device", "overrides", "eager"),
    [
        ("cpu", [], True),
        ("cpu", ["model.compile=true"], False),
        ("cpu", ["rollout.enforce_eager=false"], False),
        ("cpu", ["model.compile=true", "rollout.enforce_eager=true"], True),
        ("cuda", [], False),
        ("cuda", ["rollout.enforce_eager=true"], True),
    ],
)
def test_vllm_compiles_its_model_on_a_gpu_and_where_the_trainer_does(
    device: str, overrides: list[str], eager: bool
) -> None:
    options = vllm_adapter.engine_options(make_config("rollout.engine=vllm", *overrides), device, dedicated=False)
    assert options["enforce_eager"] is eager


def test_sampled_logprobs_are_of_the_distribution_sampled_from(engine: RolloutEngine, model: CarftModel) -> None:
    engine.sync(model)
    for sampling in (SAMPLED, SamplingParams(16, temperature=1.4, seed=3), SamplingParams(16, top_p=0.5, seed=4)):
        assert_samples_of(model.lm, engine.generate(PROMPTS, sampling), sampling)


@pytest.mark.parametrize(
    "sampling",
    [
        dataclasses.replace(SAMPLED, samples_per_prompt=8, max_new_tokens=40),
        SamplingParams(40, samples_per_prompt=8, seed=12),
    ],
)
def test_every_engine_samples_the_same_tokens(
    local_engine: VLLMEngine, server_engine: VLLMServerEngine, model: CarftModel, sampling: SamplingParams
) -> None:
    """Transformers, vLLM in process and two servers: 128 of 128 completions."""
    prompts = [*PROMPTS, *PROMPTS[:4]]
    expected = HFEngine(model, build_tokenizer(), batch_size=128).generate(prompts, sampling)
    assert len({tuple(r.completion_ids) for r in expected}) == len(expected) == 128
    for engine in (local_engine, server_engine):
        engine.sync(model)
        found = engine.generate(prompts, sampling)
        assert [r.completion_ids for r in found] == [r.completion_ids for r in expected]
        assert_samples_of(model.lm, found, sampling, prompts)


@pytest.mark.long
def test_a_real_model_samples_the_same_tokens_in_both_libraries(smollm2: Path, at_the_end: ExitStack) -> None:
    """Equal weights in float32, 64 completions of up to 16 tokens: rounding may turn two of them."""
    config = load_config(
        "configs/svamp_smollm2_cpu.toml",
        [f"model.path={smollm2}", "model.compute_dtype=float32", "rollout.engine=vllm", "rollout.batch_size=64"],
    )
    model = load_model(config, str(smollm2), CPU, heads=False)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [tokenizer.encode(f"Question:\n{n} birds and {n + 3} more are how many?\nAnswer:\n") for n in range(64)]
    sampling = SamplingParams(16, temperature=0.8, seed=1)
    expected = HFEngine(model, tokenizer, batch_size=64).generate(prompts, sampling)
    engine = VLLMEngine(config, model, [tokenizer.eos_token_id])
    at_the_end.callback(engine.close)
    engine.sync(model)
    found = engine.generate(prompts, sampling)
    same = [a.completion_ids == b.completion_ids for a, b in zip(found, expected, strict=True)]
    assert sum(same) >= 62
    assert_samples_of(model.lm, found[:4], sampling, prompts[:4])


def test_a_completion_depends_on_its_own_seed_alone(engine: RolloutEngine, model: CarftModel) -> None:
    """Not on what is sampled beside it, nor on the order: one prompt at a time, last one first; fewer samples."""
    engine.sync(model)
    whole = [r.completion_ids for r in engine.generate(PROMPTS, SAMPLED)]
    samples = SAMPLED.samples_per_prompt
    for index in reversed(range(len(PROMPTS))):
        alone = engine.generate(PROMPTS[index : index + 1], dataclasses.replace(SAMPLED, first_prompt=index))
        assert [r.completion_ids for r in alone] == whole[samples * index : samples * (index + 1)]
    first = engine.generate(PROMPTS, dataclasses.replace(SAMPLED, samples_per_prompt=1))
    assert [r.completion_ids for r in first] == whole[::samples]
    other = engine.generate(PROMPTS, dataclasses.replace(SAMPLED, seed=12))
    assert not {tuple(r.completion_ids) for r in other} & set(map(tuple, whole))


def test_a_completion_does_not_depend_on_preemption(local_engine: VLLMEngine, model: CarftModel) -> None:
    local_engine.sync(model)
    expected = [r.completion_ids for r in local_engine.generate(PROMPTS, SAMPLED)]
    llm_engine = local_engine._engine._llm.llm_engine
    steps, preempted = itertools.count(), []

    def preempt(_: int) -> None:
        if next(steps) % 5 == 4:  # all running requests lose their cache and are computed again
            preempted.append(llm_engine.reset_prefix_cache(reset_running_requests=True))

    found = local_engine.generate(PROMPTS, SAMPLED, on_progress=preempt)
    assert [r.completion_ids for r in found] == expected
    assert_samples_of(model.lm, found, SAMPLED)
    assert len(preempted) > 4
    assert all(preempted)


def test_a_drafted_completion_does_not_depend_on_preemption(local_engine: VLLMEngine, model: CarftModel) -> None:
    """Requests lose their cache between forwards, with guesses of theirs waiting to be checked."""
    local_engine.sync(model)
    plain = local_engine.generate(PROMPTS, SAMPLED)
    own = [[r.completion_ids] for r in plain[:: SAMPLED.samples_per_prompt]]
    sampling = dataclasses.replace(SAMPLED, drafts=own)
    undisturbed = local_engine.generate(PROMPTS, sampling)
    llm_engine = local_engine._engine._llm.llm_engine
    steps, preempted = itertools.count(), []

    def preempt(_: int) -> None:
        if next(steps) % 5 == 4:
            preempted.append(llm_engine.reset_prefix_cache(reset_running_requests=True))

    found = local_engine.generate(PROMPTS, sampling, on_progress=preempt)
    assert [r.completion_ids for r in found] == [r.completion_ids for r in plain]
    assert_samples_of(model.lm, found, SAMPLED)
    assert len(preempted) > 3
    assert all(preempted)
    assert sum(r.accepted for r in undisturbed) > sum(len(r.completion_ids) for r in plain) / 6
    assert sum(r.accepted for r in found) > sum(r.accepted for r in undisturbed) / 2, "drafts end with a preemption"


def test_lora_is_merged_for_the_sampler_and_nothing_of_the_trainer_is_touched(
    engine: RolloutEngine, model: CarftModel
) -> None:
    lora = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True)
    adapted: Any = peft.get_peft_model(copy.deepcopy(model.lm), lora)
    trainer = CarftModel(model.lm, None, torch.float32)
    trainer.lm = adapted
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        before = {name: value.clone() for name, value in adapted.state_dict().items()}
        engine.sync(trainer)
        assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
        merged = copy.deepcopy(adapted).merge_and_unload()
        rollouts = engine.generate(PROMPTS, GREEDY)
        assert_samples_of(merged, rollouts, GREEDY)
        with pytest.raises(AssertionError):  # the adapter matters: the base model alone is told apart
            assert_samples_of(model.lm, rollouts, GREEDY)


class _BreaksError(Exception):
    pass


def test_a_sync_that_fails_half_way_serves_nothing_and_the_next_one_mends_it(
    engine: RolloutEngine, model: CarftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.sync(model)
    before = engine.version
    whole = SamplerWeights.groups
    for groups_until in (1, 2, 3):  # the embedding, then layers

        def broken(self: SamplerWeights, until: int = groups_until) -> Iterator[list[tuple[str, Tensor]]]:
            for index, group in enumerate(whole(self)):
                if index == until:
                    raise _BreaksError
                yield group

        perturb(model, groups_until)
        with monkeypatch.context() as patch:
            patch.setattr(SamplerWeights, "groups", broken)
            with pytest.raises(_BreaksError):
                engine.sync(model)
        with pytest.raises(EngineError, match="last weight sync did not finish"):
            engine.generate(PROMPTS, GREEDY)
        assert engine.version == before
        engine.sync(model)
        before = engine.version
        assert_samples_of(model.lm, engine.generate(PROMPTS, GREEDY), GREEDY)


def test_the_probe_refuses_other_weights_than_the_trainers(engine: RolloutEngine, model: CarftModel) -> None:
    config = make_config("rollout.temperature=0.7", "rollout.top_p=0.8", "rollout.top_k=10")
    engine.sync(model)
    found = check_agreement(engine, model, PROMPTS, config)
    assert found.mean < 1e-5
    assert found.max < 1e-4
    assert found.tokens > 8
    perturb(model, 5)
    with pytest.raises(EngineError, match=r"trainer and sampler disagree.*rollout\.probe_tolerance allows 0\.001"):
        check_agreement(engine, model, PROMPTS, config)


def test_prompts_beyond_the_context_are_refused_before_anything_runs(engine: RolloutEngine, model: CarftModel) -> None:
    engine.sync(model)
    too_long = [*PROMPTS[:2], [3] * 77]
    with pytest.raises(InputError, match=r"prompt 2 has 77 tokens; with max_new_tokens = 20 .* of 96 .* 1 to 76"):
        engine.generate(too_long, GREEDY)
    with pytest.raises(InputError, match="prompt 0 has 0 tokens"):
        engine.generate([[]], GREEDY)


def test_a_stopped_generation_leaves_the_engine_clean(engine: RolloutEngine, model: CarftModel) -> None:
    engine.sync(model)
    expected = engine.generate(PROMPTS, SAMPLED)
    calls: list[int] = []

    def stop(finished: int) -> None:
        calls.append(finished)
        if len(calls) == 3:
            raise InterruptedError

    long = SamplingParams(80, temperature=2.0, samples_per_prompt=4)
    with pytest.raises(InterruptedError):
        engine.generate(PROMPTS, long, on_progress=stop)
    seen: list[int] = []
    again = engine.generate(PROMPTS, SAMPLED, on_progress=seen.append)
    assert sum(seen) == len(expected)
    assert [r.completion_ids for r in again] == [r.completion_ids for r in expected]


def test_one_step_ahead_is_one_version_old_and_no_older(engine: RolloutEngine, model: CarftModel) -> None:
    """Step k's completions are of the weights before the last sync, all of them, though the trainer has moved on."""
    steps = 5
    config = make_config("rollout.engine=vllm", "rollout.async_depth=1").rollout
    engine.sync(model)

    def request(step: int) -> tuple[list[list[int]], SamplingParams]:
        return PROMPTS, SamplingParams(20, temperature=1.0, seed=step)

    history: list[Any] = []
    with RolloutStream(engine, request, steps, config) as stream:
        for step in range(steps):
            history.append(copy.deepcopy(model.lm))
            rollouts, staleness = stream.take(step, lambda _: None)
            assert staleness == (0 if step == 0 else 1)
            assert_samples_of(history[max(0, step - 1)], rollouts, request(step)[1])
            perturb(model, step)  # while the next step is being sampled
            stream.sync(model)
    assert_samples_of(model.lm, engine.generate(PROMPTS, GREEDY), GREEDY)


def test_depth_zero_is_on_policy(engine: RolloutEngine, model: CarftModel) -> None:
    engine.sync(model)
    with RolloutStream(engine, lambda step: (PROMPTS, SAMPLED), 3, make_config().rollout) as stream:
        for step in range(3):
            rollouts, staleness = stream.take(step, lambda _: None)
            assert staleness == 0
            assert_samples_of(model.lm, rollouts, SAMPLED)
            perturb(model, step)
            stream.sync(model)


def test_what_fails_while_sampling_ahead_is_raised_by_the_step_that_needs_it(
    local_engine: VLLMEngine, model: CarftModel
) -> None:
    config = make_config("rollout.engine=vllm", "rollout.async_depth=1").rollout
    local_engine.sync(model)

    def request(step: int) -> tuple[list[list[int]], SamplingParams]:
        return ([[3] * 90] if step == 1 else PROMPTS), GREEDY

    with RolloutStream(local_engine, request, 3, config) as stream:
        stream.take(0, lambda _: None)
        stream.sync(model)  # the trainer's update of step 0 is not lost
        with pytest.raises(InputError, match="prompt 0 has 90 tokens"):
            stream.take(1, lambda _: None)


def test_bfloat16_engine_of_a_float32_trainer(local_engine: VLLMEngine, model: CarftModel) -> None:
    """The weights it gets are the trainer's, rounded once."""
    rounded = copy.deepcopy(model.lm)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
    sent = dict(SamplerWeights(model.lm, torch.bfloat16))
    assert all(torch.equal(sent[name].float(), value) for name, value in rounded.state_dict().items())
    local_engine._dtype = torch.bfloat16
    try:
        local_engine.sync(model)
    finally:
        local_engine._dtype = torch.float32
    assert_samples_of(rounded, local_engine.generate(PROMPTS, GREEDY), GREEDY)


def test_head_sizes_the_cpu_attention_lacks_are_refused_at_once(model: CarftModel) -> None:
    lm_config = copy.deepcopy(model.lm.config)
    lm_config.head_dim = 16
    with pytest.raises(InputError, match=r"heads have size 16; vLLM on the CPU takes 32, 64.*rollout\.engine = \"hf\""):
        check_engine(make_config("rollout.engine=vllm"), lm_config, "cpu")


def test_too_little_memory_is_one_sentence(model: CarftModel) -> None:
    with pytest.raises(EngineError, match=r"vLLM has not enough memory .*rollout\.kv_cache_gib"):
        VLLMEngine(make_config("rollout.engine=vllm", "rollout.kv_cache_gib=100000.0"), model, [EOS])


@pytest.mark.parametrize("level", [1, 2])
def test_the_order_of_sleeping_and_waking(
    local_engine: VLLMEngine, model: CarftModel, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    """On the CPU vLLM takes the calls and frees nothing; what is left to show is that the right weights sample."""
    monkeypatch.setattr(local_engine, "_sleep_level", level)
    local_engine.sync(model)
    for change in range(2):
        for _ in range(2):  # the second call finds the engine asleep, its weights gone at level 2
            assert_samples_of(model.lm, local_engine.generate(PROMPTS, GREEDY), GREEDY)
            assert local_engine._asleep
        perturb(model, change)
        local_engine.sync(model)
        assert not local_engine._asleep


def test_vllms_own_senders_read_the_same_stream(model: CarftModel) -> None:
    """Through the groups vLLM makes of it, which check that names come in the order of the metadata."""
    weights = SamplerWeights(model.lm, torch.bfloat16)
    source = vllm_adapter.transfer_source(weights)
    described = source.metadata if hasattr(source, "iter_full") else source.metadata()
    assert [(meta.name, meta.shape) for meta in described] == weights.metadata()
    assert {meta.dtype for meta in described} == {torch.bfloat16}
    read = (
        source.iter_full()
        if hasattr(source, "iter_full")
        else (pair for names, tensors in source.iter_groups() for pair in zip(names, tensors, strict=True))
    )
    sent = dict(read)
    assert all(torch.equal(sent[name], value) for name, value in weights)
    assert len(sent) == len(described)


def test_each_of_several_ids_ends_a_completion(
    engine: RolloutEngine, model: CarftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise hangs on the position alone, so a completion is the one that nothing ended, cut at its first end."""
    sampling = SamplingParams(24, samples_per_prompt=4, seed=8)
    tokenizer = build_tokenizer()
    whole = [r.completion_ids for r in HFEngine(model, tokenizer, batch_size=8, ends=[-1]).generate(PROMPTS, sampling)]
    assert {len(ids) for ids in whole} == {24}
    ends = [token for token, _ in Counter(token for ids in whole for token in ids[3:]).most_common(3)]
    expected = [ids[: next((at + 1 for at, token in enumerate(ids) if token in ends), 24)] for ids in whole]
    assert {ids[-1] for ids in expected} >= set(ends), "each of them ends one"
    monkeypatch.setattr(engine, "_ends", ends)
    engine.sync(model)
    for one in (engine, HFEngine(model, tokenizer, batch_size=8, ends=ends)):
        found = one.generate(PROMPTS, sampling)
        assert [r.completion_ids for r in found] == expected
        assert [r.finish_reason for r in found] == ["stop" if ids[-1] in ends else "length" for ids in expected]


def test_ends_come_from_the_model_and_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    load_model(Config(), "synthetic", CPU, heads=False).save(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pad, unknown, ordinary = tokenizer.pad_token_id, tokenizer.unk_token_id, len(tokenizer) - 1
    for eos, expected in ((EOS, [EOS]), ([pad, EOS, ordinary, unknown], [EOS, pad, unknown]), (None, [EOS])):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        loaded = load_model(Config(), str(tmp_path), CPU, heads=False)
        assert build_engine(make_config("rollout.engine=hf"), loaded, tokenizer)._ends == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "DeepseekV3", "Olmoe"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_models_with_experts_are_refused_before_anything_starts(family: str, device: str) -> None:
    """Tried on the CPU: vLLM 0.32 finds no such weights (Mixtral), or cannot put them back (Qwen3Moe)."""
    lm_config = getattr(transformers, f"{family}Config")(head_dim=32)
    for options in (["rollout.engine=vllm"], ["rollout.engine=vllm-server", 'rollout.servers=["http://127.0.0.1:9"]']):
        with pytest.raises(InputError, match=r"experts = \d+\), and .*rollout\.engine = \"hf\""):
            check_engine(make_config(*options), lm_config, device)
    check_engine(make_config("rollout.engine=vllm"), transformers.LlamaConfig(head_dim=32), device)
