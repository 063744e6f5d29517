"""What an engine of somebody's own may return, and what is refused by name."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from carft_fast.core.errors import EngineError
from carft_fast.rollout.base import Rollout, SamplingParams
from carft_fast.rollout.checked import CheckedEngine

SAMPLING = SamplingParams(max_new_tokens=3, samples_per_prompt=2)
PROMPTS = [[5, 6], [7]]


class Own:
    """Right but for what `spoil` makes of its rollouts, or `returned` of what `sync` says."""

    def __init__(self, spoil: Callable[[list[Rollout]], Any] = lambda rollouts: rollouts, returned: Any = 4) -> None:
        self.version, self._spoil, self._returned = 3, spoil, returned

    def generate(self, prompts: Any, sampling: SamplingParams, *, on_progress: Any = None) -> Any:
        each = [Rollout([8, 9], [-0.5, -1.0], "stop", self.version) for _ in prompts]
        return self._spoil([rollout for rollout in each for _ in range(sampling.samples_per_prompt)])

    def sync(self, model: Any) -> Any:
        self.version = 4
        return self._returned

    def close(self) -> None: ...


def second(**values: Any) -> Callable[[list[Rollout]], list[Rollout]]:
    """The rollout with index 1 has other values."""
    return lambda rollouts: [rollouts[0], replace(rollouts[1], **values), *rollouts[2:]]


REFUSED: dict[str, tuple[Callable[[list[Rollout]], Any], str]] = {
    "too few": (lambda r: r[:3], "Own.generate returned 3 rollouts: expected a list of 4, 2 for each of 2 prompts"),
    "too many": (lambda r: [*r, r[0]], "returned 5 rollouts: expected a list of 4"),
    "nothing": (lambda r: None, "returned a NoneType: expected a list of 4"),
    "a generator": (lambda r: iter(r), "returned a list_iterator: expected a list of 4"),
    "texts": (lambda r: ["a"] * 4, "rollout 0 is a str: expected a Rollout"),
    "no token": (second(completion_ids=[], sampled_logprobs=[]), "rollout 1 has 0 tokens: expected a list of 1 to 3"),
    "too long": (second(completion_ids=[1] * 4), "rollout 1 has 4 tokens: expected a list of 1 to 3"),
    "a token outside": (
        second(completion_ids=[8, 10]),
        "the token 10: expected whole numbers from 0 to 9",
    ),
    "a negative token": (second(completion_ids=[-1, 2]), "rollout 1 has the token -1"),
    "half a token": (second(completion_ids=[1.5, 2]), "rollout 1 has the token 1.5"),
    "a log-prob short": (second(sampled_logprobs=[-1.0]), "rollout 1 has 1 sampled_logprobs for 2 tokens"),
    "no log-probs": (second(sampled_logprobs=None), "rollout 1 has NoneType sampled_logprobs for 2 tokens"),
    "a log-prob that is none": (second(sampled_logprobs=[-1.0, float("nan")]), "rollout 1 has the log-prob nan"),
    "an end unheard of": (
        second(finish_reason="eos"),
        'rollout 1 has finish_reason \'eos\': expected "stop" or "length"',
    ),
    "other weights": (second(weight_version=2), "rollout 1 was sampled by weights 2: the engine has 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_breaks_the_contract_is_named(case: str) -> None:
    spoil, message = REFUSED[case]
    with pytest.raises(EngineError) as refused:
        CheckedEngine(Own(spoil), 10).generate(PROMPTS, SAMPLING)
    assert message in str(refused.value)


def test_what_keeps_it_comes_through_unchanged() -> None:
    engine = CheckedEngine(Own(), 10)
    assert engine.generate(PROMPTS, SAMPLING) == Own().generate(PROMPTS, SAMPLING)
    assert (engine.sync(None), engine.version) == (4, 4)


@pytest.mark.parametrize("returned", [None, 3, 5, "4"])
def test_a_sync_says_the_version_that_it_made(returned: Any) -> None:
    with pytest.raises(EngineError, match=r"Own\.sync returned .* its version was 3 and is 4: expected a larger"):
        CheckedEngine(Own(returned=returned), 10).sync(None)
