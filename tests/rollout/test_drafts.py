"""Drafts make fewer forwards of the same completions: on a real vLLM, whatever the drafts are."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from carft_fast.models.causal_lm import CarftModel
from carft_fast.rollout.base import Rollout, RolloutEngine, SamplingParams
from carft_fast.rollout.drafts import LONGEST, LastCompletions, Usefulness, find_draft
from carft_fast.rollout.stream import RolloutStream
from carft_fast.rollout.vllm.engine import VLLMEngine

from .checks import EOS, PROMPTS, assert_samples_of, make_config
from .test_coupled import LIMIT, UNSURE, enumerated, follow_tail, next_logits, with_bias

SAMPLED = SamplingParams(24, temperature=0.8, top_p=0.9, top_k=12, samples_per_prompt=3, seed=11)
TO_THE_END = SamplingParams(89, temperature=1.0, samples_per_prompt=2, seed=12)  # of the context of 96
GREEDY = SamplingParams(20, temperature=0)


@pytest.mark.parametrize(
    ("drafts", "completion", "most", "expected"),
    [
        ([[1, 2, 3, 4, 5]], [1], 8, [2, 3, 4, 5]),  # the whole completion begins the draft
        ([[1, 2, 3, 4, 5]], [1, 2], 8, [3, 4, 5]),
        ([[1, 2, 3, 4, 5]], [1, 2], 1, [3]),
        ([[1, 2, 3, 4, 5]], [9, 2], 8, [3]),  # one token in the middle
        ([[1, 2, 3, 4, 5]], [2, 9], 8, []),
        ([[1, 2, 3, 4, 5]], [9, 2, 3], 8, [4, 5]),
        ([[1, 2, 3, 4, 5]], [4, 5], 8, []),  # nothing follows
        ([[1, 2, 3, 4, 5, 6]], [9, 2, 3], 8, [4, 5]),  # as long as the match
        ([[7, 7, 7, 7, 8]], [7, 7], 8, [7, 7, 8]),  # of equally long matches the nearest
        ([[2, 3, 1], [2, 3, 4]], [2, 3], 8, [1]),  # then the first draft
        ([[5, 2, 3, 1], [1, 2, 3, 4]], [1, 2, 3], 8, [4]),  # a longer match before a nearer
        ([[]], [1, 2], 8, []),
        ([], [1, 2], 8, []),
        ([list(range(30))], list(range(12)), 8, list(range(12, 20))),
    ],
)
def test_what_is_drafted(drafts: list[list[int]], completion: list[int], most: int, expected: list[int]) -> None:
    assert list(find_draft(drafts, completion, most)) == expected


def test_a_draft_follows_a_longest_match() -> None:
    """Against every pair of places, in drafts of few different tokens."""
    generator = random.Random(0)
    found = 0
    for _ in range(2000):
        drafts = [[generator.randrange(3) for _ in range(generator.randrange(12))] for _ in range(3)]
        completion = [generator.randrange(3) for _ in range(generator.randrange(1, 12))]
        best = max(
            (
                size
                for draft in drafts
                for end in range(1, len(draft))
                for size in range(1, min(end, len(completion), LONGEST) + 1)
                if draft[end - size : end] == completion[-size:]
            ),
            default=0,
        )
        drafted = list(find_draft(drafts, completion, LONGEST))
        assert bool(drafted) == bool(best)
        suffix = completion[len(completion) - best :]
        allowed = [
            draft[end : end + (LONGEST if best == end == len(completion) else best)]
            for draft in drafts
            for end in range(best, len(draft))
            if draft[end - best : end] == suffix
        ]
        assert not best or drafted in allowed
        found += bool(best)
    assert found > 1000


def test_a_short_match_is_no_draft_where_a_longer_one_is_asked_for() -> None:
    drafts = [[1, 2, 3, 4, 5, 6]]
    assert list(find_draft(drafts, [9, 3, 4], 8, least=2)) == [5, 6]
    assert list(find_draft(drafts, [9, 3, 4], 8, least=3)) == []
    assert list(find_draft(drafts, [1, 2], 8, least=3)) == []  # not where the completion begins the draft, either


def test_guesses_that_do_not_stand_make_longer_matches_the_rule_for_a_while() -> None:
    useful = Usefulness()
    asked = []
    for guessed, stood in [(8, 1), (8, 1), (8, 0), (8, 0), (8, 8), *[(0, 0)] * 100, (8, 0)]:
        useful.add(guessed, stood)
        asked.append(useful.shortest_match)
    assert asked[:5] == [1, 1, 4, 4, 1]
    useful.add(100, 9)
    assert useful.shortest_match == 4
    for _ in range(100):  # few guesses of late: it looks again
        useful.add(0, 0)
    assert useful.shortest_match == 1


def rollout(*ids: int) -> Rollout:
    return Rollout(list(ids), [0.0] * len(ids), "length", 0)


def test_two_completions_of_a_question_are_kept_and_old_questions_go() -> None:
    last = LastCompletions(capacity=14)
    last.add([[1], [2]], [rollout(10), rollout(11), rollout(12), rollout(20), rollout(21), rollout(22)])
    assert last.of([1]) == [[12], [11]]
    last.add([[1]], [rollout(13, 14)])
    assert last.of([1]) == [[13, 14], [12]]
    assert last.of([3]) == []
    last.add([[3]], [rollout(*range(8))])  # 9 tokens more than the 7 there are: the question of longest ago goes
    assert (last.of([2]), last.of([1]), last.of([3])) == ([], [[13, 14], [12]], [list(range(8))])
    last.add([[4]], [rollout(*range(20))])  # more than fits: nothing of it stays
    assert [last.of([n]) for n in (1, 3, 4)] == [[], [], []]
    last.add([[5]], [rollout(1)])
    assert last.of([5]) == [[1]]


def groups(rollouts: Sequence[Rollout], samples: int) -> list[list[list[int]]]:
    """The completions of each prompt."""
    ids = [r.completion_ids for r in rollouts]
    return [ids[start : start + samples] for start in range(0, len(ids), samples)]


@pytest.mark.parametrize("sampling", [SAMPLED, TO_THE_END, GREEDY])
def test_drafts_change_nothing_of_what_is_sampled(
    engine: RolloutEngine, model: CarftModel, sampling: SamplingParams
) -> None:
    """Own completions, those of other prompts, cut ones, and garbage as drafts."""
    engine.sync(model)
    expected = engine.generate(PROMPTS, sampling)
    assert sum(r.accepted for r in expected) == 0
    samples, generator = sampling.samples_per_prompt, random.Random(1)
    own = groups(expected, samples)
    broken = [[[t if generator.random() < 0.8 else 7 for t in ids] for ids in group] for group in own]
    garbage = [[[generator.randrange(60) for _ in range(90)], [3], []] for _ in PROMPTS]
    for name, drafts in {"own": own, "broken": broken, "others'": own[::-1], "garbage": garbage}.items():
        found = engine.generate(PROMPTS, replace(sampling, drafts=drafts))
        assert [r.completion_ids for r in found] == [r.completion_ids for r in expected], name
        assert [r.finish_reason for r in found] == [r.finish_reason for r in expected]
        assert_samples_of(model.lm, found, sampling)
        tokens, accepted = sum(len(r.completion_ids) for r in found), sum(r.accepted for r in found)
        assert all(0 <= r.accepted <= r.drafted for r in found)
        assert all(r.accepted < len(r.completion_ids) for r in found)
        if name == "own":
            assert accepted > tokens / 3
        if name == "garbage":
            assert accepted < tokens / 20
    rest = engine.generate(PROMPTS[2:], replace(sampling, first_prompt=2, drafts=own))  # a share of the prompts
    assert [r.completion_ids for r in rest] == [r.completion_ids for r in expected[2 * samples :]]
    assert sum(r.accepted for r in rest) > sum(len(r.completion_ids) for r in rest) / 3


ENOUGH = 10_000
"""Completions among which a bias of two percent is found."""


@pytest.mark.parametrize(
    ("setting", "draws"),
    [
        ((1.0, 0, 1.0), 3000),
        ((0.4, 0, 0.9), 3000),
        *(
            pytest.param(setting, ENOUGH, marks=pytest.mark.long)
            for setting in ((1.0, 0, 1.0), (0.4, 0, 1.0), (1.0, 0, 0.8), (0.4, 0, 0.9))
        ),
    ],
)
def test_three_tokens_follow_the_model_with_and_without_drafts(
    wide_engine: VLLMEngine,
    model: CarftModel,
    setting: tuple[float, int, float],
    draws: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Usefulness, "_LEAST_SHARE", 0.0)  # guesses that seldom stand, too
    temperature, _, top_p = setting
    wide_engine.sync(model)
    sampling = SamplingParams(6, temperature=temperature, top_p=top_p, samples_per_prompt=draws, seed=9)
    plain = wide_engine.generate([UNSURE], sampling)
    drafts = [[r.completion_ids for r in plain[:40]]]
    drafted = wide_engine.generate([UNSURE], replace(sampling, drafts=drafts))
    assert sum(r.accepted for r in drafted) > draws / 20
    assert sum(r.drafted - r.accepted for r in drafted) > draws / 20
    assert [r.completion_ids for r in drafted] == [r.completion_ids for r in plain]
    found = [tuple(r.completion_ids[:3]) for r in drafted if len(r.completion_ids) >= 3]
    assert len(found) > 0.9 * draws
    probability = enumerated(lambda prefixes: next_logits(model, UNSURE, prefixes), setting, 5 / draws)
    ended = [sequence for sequence in probability if EOS in sequence[:2]]
    whole = 1 - sum(probability.pop(sequence) for sequence in ended)
    probability = {sequence: p / whole for sequence, p in probability.items()}
    assert follow_tail(found, probability) > LIMIT
    if draws == ENOUGH:
        assert follow_tail(with_bias(found, probability), probability) < LIMIT


def proposer_of(engine: VLLMEngine) -> Any:
    llm: Any = engine._engine._llm
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter


def test_no_drafts_where_the_batch_fills_the_budget(wide_engine: VLLMEngine, model: CarftModel) -> None:
    wide_engine.sync(model)
    proposer = proposer_of(wide_engine)
    sampling = SamplingParams(6, temperature=0.7, samples_per_prompt=16, seed=3)
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 2][:4]  # vLLM pads the first forward of single tokens
    plain = wide_engine.generate(prompts, sampling)
    sampling = replace(sampling, drafts=groups(plain, 16))
    for budget, checked in ((127, 0), (128, 1), (10_000, LONGEST)):  # 64 sequences: 127 leave less than one draft token
        proposer._budget = budget
        found = wide_engine.generate(prompts, sampling)
        assert [r.completion_ids for r in found] == [r.completion_ids for r in plain]
        assert (sum(r.drafted for r in found) > 0) == bool(checked)
    assert proposer._budget == 10_000


def test_drafts_of_which_nothing_stands_are_followed_less(wide_engine: VLLMEngine, model: CarftModel) -> None:
    """And drafts that stand are followed again."""
    wide_engine.sync(model)
    proposer_of(wide_engine)._usefulness = Usefulness()  # other tests' drafts have left their count
    sampling, generator = SamplingParams(60, temperature=1.0, seed=4), random.Random(2)
    plain = wide_engine.generate(PROMPTS, sampling)
    garbage = replace(sampling, drafts=[[[generator.randrange(60) for _ in range(300)]] for _ in PROMPTS])
    own = replace(sampling, drafts=groups(plain, 1))
    tokens = sum(len(r.completion_ids) for r in plain)
    wide_engine.generate(PROMPTS, garbage)
    for asked, least, most in ((garbage, 0.0, 0.1), (own, 0.5, 1.0)):
        found = wide_engine.generate(PROMPTS, asked)
        assert [r.completion_ids for r in found] == [r.completion_ids for r in plain]
        assert least * tokens <= sum(r.drafted for r in found) <= most * tokens


@pytest.mark.parametrize("depth", [0, 1])
def test_a_step_drafts_what_the_steps_before_sampled(local_engine: VLLMEngine, model: CarftModel, depth: int) -> None:
    """The same weights and seeds in every step: a step that drafts the last completions repeats them."""
    config = make_config("rollout.engine=vllm", f"rollout.async_depth={depth}").rollout
    local_engine.sync(model)
    expected = [r.completion_ids for r in local_engine.generate(PROMPTS[:6], SAMPLED)]

    def accepted(config: Any, drafts: list[list[list[int]]]) -> list[int]:
        counts = []
        request = (PROMPTS[:6], replace(SAMPLED, drafts=drafts))
        with RolloutStream(local_engine, lambda step: request, 3, config) as stream:
            for step in range(3):
                rollouts, _ = stream.take(step, lambda _: None)
                assert [r.completion_ids for r in rollouts] == expected
                counts.append(sum(r.accepted for r in rollouts))
                stream.sync(model)
        return counts

    tokens = sum(map(len, expected))
    first, *later = accepted(config, [])
    assert first == 0
    assert min(later) > tokens / 4
    first, *later = accepted(config, [[ids] for ids in expected[:: SAMPLED.samples_per_prompt]])
    assert min(first, *later) > tokens / 10
    off = make_config("rollout.engine=vllm", f"rollout.async_depth={depth}", "rollout.drafts=off").rollout
    assert accepted(off, []) == [0, 0, 0]
