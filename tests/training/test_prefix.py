"""`rollout.prefix`: the first tokens of an annotation go with the prompt, and the rest is sampled."""

import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carft_fast.config.sections import RolloutConfig
from carft_fast.core.console import Console
from carft_fast.core.example import Example
from carft_fast.data.prompts import EncodedExample
from carft_fast.objective.passes import Rows
from carft_fast.rewards.answers import extract_answer
from carft_fast.rollout.base import Rollout, RolloutEngine, SamplingParams
from carft_fast.rollout.engines import build_engine
from carft_fast.training.pipeline import evaluate_only, prepare, train
from carft_fast.training.rl import as_samples, prefix_share
from carft_fast.training.run import Run

from .runs import records, tiny_config
from .stepcase import CPU, METHODS, Case, gradients, quick_config, random_case, take_apart
from .test_step import assert_same


def test_the_share_falls_linearly_to_zero() -> None:
    whole, part = RolloutConfig(prefix=0.8), RolloutConfig(prefix=0.8, prefix_steps=4)
    assert [prefix_share(whole, step, 8) for step in range(9)] == pytest.approx([0.8 - 0.1 * step for step in range(9)])
    assert [prefix_share(part, step, 8) for step in range(6)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0])
    assert prefix_share(RolloutConfig(), 0, 8) == 0


def test_a_prefix_is_the_annotations_and_leaves_room_for_what_is_sampled() -> None:
    row = EncodedExample(Example("r", "q", ("a",), "2"), [1, 2], ([5, 6, 7, 8, 9],))
    led = row.with_prefix(0.59, 100)
    assert (led.prefix_ids, led.sampling_ids, led.completion_ids) == ([5, 6], [1, 2, 5, 6], [5, 6, 7, 8, 9])
    assert row.with_prefix(0.99, 100).prefix_ids == [5, 6, 7, 8], "never the end"
    assert row.with_prefix(0.99, 1).sampling_ids == [1, 2, 5]
    assert (row.sampling_ids, row.with_prefix(0.1, 100).sampling_ids) == ([1, 2], [1, 2])


def led_case(seed: int, share: float, *, per_prompt: int = 1) -> tuple[Case, Rows]:
    """Rollouts after prefixes; and the same with the prefixes as a part of what was sampled."""
    case = random_case(seed, "mixed", prompts=12 // per_prompt, per_prompt=per_prompt)
    pairs = list(case.samples.annotated.pairs)
    rows = [EncodedExample(Example("", "", (), "1"), prompt, (cot,)) for prompt, cot in pairs]
    rows = [row.with_prefix(share * (row.prompt_ids != pairs[0][0]), 1000) for row in rows]
    logprobs = case.samples.sampled_logprob_C.split(case.samples.rollouts.lengths)
    completions = case.samples.rollouts.completions
    rollouts = [Rollout(ids, x.tolist(), "stop", 0) for ids, x in zip(completions, logprobs, strict=True)]
    whole = Rows([p for p, _ in pairs], [r.prefix_ids + ids for r, ids in zip(rows, completions, strict=True)])
    assert rows[-1].prefix_tokens > 0 == rows[0].prefix_tokens
    return Case(as_samples(rows, rollouts, CPU), case.grades), whole


@pytest.mark.parametrize("impl", ["fast", "padded"])
@pytest.mark.parametrize("per_prompt", [1, 4])
def test_what_is_sampled_is_trained_on_and_the_whole_is_embedded(impl: str, per_prompt: int) -> None:
    """Against the same tokens, all of them sampled: log-probs, values and reference of the last ones, z of all."""
    options = [*METHODS["carft_both"], f"model.impl={impl}", "rl.micro_batch_tokens=300"]
    config = quick_config(*options, f"rollout.samples_per_prompt={per_prompt}")
    case, whole = led_case(1, 0.5, per_prompt=per_prompt)
    sampled_C = torch.zeros(sum(whole.lengths))
    found = take_apart(config, case).experience
    all_sampled = Case(case.samples.__class__(whole, case.samples.annotated, sampled_C), case.grades)
    expected = take_apart(config, all_sampled).experience
    ends, lengths = list(accumulate(whole.lengths)), case.samples.rollouts.lengths

    def last(x_C: Tensor | None) -> Tensor:
        assert x_C is not None
        return torch.cat([x_C[end - length : end] for end, length in zip(ends, lengths, strict=True)])

    for name in ("old_logprob_C", "ref_logprob_C", "old_value_C"):
        torch.testing.assert_close(getattr(found, name), last(getattr(expected, name)), rtol=1e-5, atol=1e-5)
    assert found.samples.rollouts.parts is not None
    filled = torch.stack([part.any(1) for part in found.samples.rollouts.parts])  # the z of no token means nothing
    for name, rows in (("z_1", ...), ("z_2", filled), ("common", filled[:, 1]), ("cosine_N", ...)):
        torch.testing.assert_close(getattr(found, name)[rows], getattr(expected, name)[rows], rtol=1e-5, atol=1e-5)
    assert found.completion_cu.tolist() == [0, *accumulate(lengths)]


@pytest.mark.parametrize("per_prompt", [1, 4])
def test_fast_equals_plain(per_prompt: int) -> None:
    options = [*METHODS["carft_both"], "rl.ppo_epochs=1", "contrastive.coef=0.3", "rl.micro_batch_tokens=300"]
    options += [f"rollout.samples_per_prompt={per_prompt}"]
    case, _ = led_case(2, 0.6, per_prompt=per_prompt)
    assert_same(*(gradients(quick_config(*options, f"model.impl={impl}"), case) for impl in ("fast", "padded")))


class Recorder:
    """Samples like the engine it wraps and keeps what it was asked."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine, self.asked = engine, list[tuple[list[list[int]], SamplingParams]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, **options: Any) -> list[Rollout]:
        self.asked.append(([list(prompt) for prompt in prompts], sampling))
        return self._engine.generate(prompts, sampling, **options)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The samplers of the runs of a test, each of which keeps what it was asked."""
    made: list[Recorder] = []

    def sampler(self: Run, model: Any) -> RolloutEngine:
        if self._engine is None:
            made.append(Recorder(build_engine(self.config, model, self.tokenizer)))
            self._engine = made[-1]
        return self._engine

    monkeypatch.setattr(Run, "sampler", sampler)
    return made


def test_a_run_and_one_that_was_resumed(tmp_path: Path, tiny_run: list[str], engines: list[Recorder]) -> None:
    """An untrained model cannot answer, but it can after a prefix that does: what is graded has it."""
    options = ["rollout.prefix=0.99", "rollout.prefix_steps=2", "rollout.samples_per_prompt=2", "contrastive.mode=both"]
    options += ["rl.lr_schedule=constant", "output.samples_per_step=12", "data.eval_rows=2", "data.train_rows=30"]
    options += ["output.trackers=[]"]

    def run(name: str, steps: int, *, resume: bool = False) -> tuple[Run, list[dict[str, Any]]]:
        config = tiny_config(tiny_run, *options, f"rl.max_steps={steps}")
        prepared = prepare(config, tmp_path / name, Console(), stages=("rl",), resume=resume)
        train(prepared, ("rl",), resume=resume)
        found = records(tmp_path / name, "rl", "train")
        return prepared, [{k: x for k, x in r.items() if k not in ("seconds", "shares")} for r in found]

    def read(text: str) -> Any:
        return extract_answer(text, answer_type="numeric")

    prepared, found = run("whole", 2)
    asked = engines[0].asked
    run("parts", 1)
    assert run("parts", 2, resume=True)[1] == found

    lengths = [record["prefix_length"] for record in found]
    assert lengths[0] > 1.5 * lengths[1] > 0
    for step in range(2):
        name = f"samples/rl-{step + 1:06d}.jsonl"
        samples = [json.loads(line) for line in (tmp_path / "whole" / name).read_text().splitlines()]
        assert len(samples) == 12
        for sample in samples:
            assert sample["completion"].startswith(sample["prefix"])
            assert sample["extracted"] == read(sample["completion"])
        if step == 0:
            assert all("the answer is" in sample["prefix"] for sample in samples)
            assert any(sample["extracted"] != read(sample["completion"][len(sample["prefix"]) :]) for sample in samples)
            assert any(sample["reward"] == 1 for sample in samples)

    drawn = [(prompts, sampling.drafts) for prompts, sampling in asked if sampling.drafts]
    taught = [row.prompt_ids + row.completion_ids for row in prepared.train_rows]
    assert len(drawn) == 2
    for (prompts, drafts), length in zip(drawn, lengths, strict=True):
        assert len(prompts) == 6
        assert all(prompt + draft in taught for prompt, [draft] in zip(prompts, drafts, strict=True))
        assert sum(map(len, prompts)) > 6 * length
    evaluated = [prompts for prompts, sampling in asked if not sampling.temperature]
    assert evaluated
    assert all(prompts == [row.prompt_ids for row in prepared.eval_rows] for prompts in evaluated)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_all_annotations_of_a_question_are_its_drafts(
    share: float, tmp_path: Path, tiny_run: list[str], engines: list[Recorder]
) -> None:
    """The epoch's own first, which the next epoch has last; cut behind the prefix. Evaluation has none, and with
    `rollout.drafts = "off"` there are none at all."""
    texts = {f"{n} coins": [f"{n} {word} {n + 1}" for word in ("coins", "cards", "Leo")] for n in range(1, 7)}
    rows = [{"question": q, "cot": list(cots), "answer": 3} for q, cots in texts.items()]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    file = tmp_path / "rows.json"
    options = [f"data.train={file}", f"data.eval={file}", "data.train_rows=6", "data.eval_rows=2"]
    options += ["rl.max_steps=3", "rl.batch_size=6", "rl.mini_batch_size=6", "output.trackers=[]"]
    options += [f"rollout.prefix={share}"] * bool(share)

    def run(name: str, *more: str) -> tuple[Run, Recorder]:
        prepared = prepare(tiny_config(tiny_run, *options, *more), tmp_path / name, Console(), stages=("rl",))
        train(prepared, ("rl",), resume=False)
        return prepared, engines.pop()

    prepared, engine = run("auto")
    questions = {tuple(row.prompt_ids): list(row.completions) for row in prepared.train_rows}
    assert len(questions) == 6
    assert {len(annotations) for annotations in questions.values()} == {3}
    steps = [(prompts, sampling.drafts) for prompts, sampling in engine.asked if sampling.drafts]
    assert len(steps) == 3
    turns: dict[tuple[int, ...], list[int]] = {}
    for prompts, drafts in steps:
        assert len(prompts) == len(drafts) == 6
        for prompt, (first, *others) in zip(prompts, drafts, strict=True):
            question = next(ids for ids in questions if tuple(prompt[: len(ids)]) == ids)
            prefix = prompt[len(question) :]
            annotations = questions[question]
            turn = annotations.index([*prefix, *first])
            assert bool(prefix) == bool(share)
            assert others == [annotations[(turn + 1) % 3], annotations[(turn + 2) % 3]]
            turns.setdefault(question, []).append(turn)
    assert all(found == [(found[0] + epoch) % 3 for epoch in range(3)] for found in turns.values()), turns
    assert len({found[0] for found in turns.values()}) > 1
    greedy = [sampling for _, sampling in engine.asked if not sampling.temperature]
    assert len(greedy) > 1
    assert not any(sampling.drafts for sampling in greedy)

    _, engine = run("off", "rollout.drafts=off")
    assert len([1 for prompts, _ in engine.asked if len(prompts) == 6]) >= 3
    assert not any(sampling.drafts for _, sampling in engine.asked)


def test_greedy_and_sampled_evaluation_draft_nothing(
    tmp_path: Path, tiny_run: list[str], engines: list[Recorder]
) -> None:
    config = tiny_config(tiny_run, "data.eval_rows=2", "eval.samples=3")
    assert config.rollout.drafts == "auto"
    prepared = prepare(config, tmp_path / "eval", Console(), stages=())
    evaluate_only(prepared)
    asked = [(sampling.temperature > 0, sampling.samples_per_prompt) for _, sampling in engines[0].asked]
    assert asked == [(False, 1), (True, 3)]
    assert not any(sampling.drafts for _, sampling in engines[0].asked)
