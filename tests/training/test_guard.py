"""When the collapse guard speaks up, on records written by hand."""

import math
from typing import Any

import pytest

from carft_fast.config.sections import GuardConfig
from carft_fast.training.guard import find_collapse, rollbacks, stopped_at


def records(**series: list[float]) -> list[dict[str, Any]]:
    columns = {"reward": [0.5], "extractable": [1.0], **series}
    n = max(map(len, columns.values()))
    return [
        {"stage": "rl", "kind": "train", "step": i + 1}
        | {name: values[min(i, len(values) - 1)] for name, values in columns.items()}
        for i in range(n)
    ]


def watch(**values: Any) -> GuardConfig:
    return GuardConfig(action="stop", **({"window": 2} | values))


@pytest.mark.parametrize(
    ("series", "settings", "cause"),
    [
        ({"reward": [0.2, 0.6, 0.6, 0.4, 0.3]}, {}, None),  # (0.4 + 0.3) / 2 is above half of 0.6
        ({"reward": [0.2, 0.6, 0.6, 0.4, 0.1]}, {}, "reward fell to 0.250, mean of 2 steps, from 0.600 at its best"),
        ({"reward": [0.6, 0.6, 0.4, 0.1]}, {"reward_drop": 0.7}, None),
        ({"reward": [0.6, 0.6, 0.0]}, {}, None),  # one bad step of two
        ({"reward": [0.6, 0.0]}, {"window": 3}, None),  # too few steps for a mean
        ({"reward": [0.0, 0.0, 0.0]}, {}, None),  # nothing to lose
        ({"reward": [-0.6, -0.4, -0.4, -0.7]}, {}, None),  # half of what it was below its best would be -0.6
        ({"reward": [-0.6, -0.4, -0.4, -0.9]}, {}, "reward fell to -0.650, mean of 2 steps, from -0.400 at its best"),
        ({"extractable": [1.0, 1.0, 0.5, 0.4]}, {}, "extractable fell to 0.450"),
        ({"entropy": [1.0, 0.2, 0.05]}, {}, None),
        ({"entropy": [1.0, 0.2, 0.05]}, {"entropy_min": 0.2}, "entropy fell to 0.125 nats"),
        ({"entropy": [1.0, 4.0, 6.0]}, {"entropy_max": 4.5}, "entropy rose to 5 nats"),
        ({"kl": [0.0, 0.5, 1.5]}, {"kl_max": 0.9}, "kl rose to 1 nats"),
        ({}, {"kl_max": 0.9}, None),  # a method without a reference has no KL
        ({"kl": [0.1, math.nan]}, {}, "kl is nan"),
        ({"entropy": [math.inf]}, {}, "entropy is inf"),  # at once, whatever the window
    ],
)
def test_causes(series: dict[str, list[float]], settings: dict[str, Any], cause: str | None) -> None:
    found = find_collapse(records(**series), watch(**settings))
    if cause is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith(cause)


def test_an_answered_collapse_is_not_found_again() -> None:
    fallen = records(reward=[0.6, 0.6, 0.1, 0.1])
    assert find_collapse(fallen, watch()) is not None
    event = {"stage": "rl", "kind": "guard", "step": 4, "action": "rollback", "cause": "reward"}
    after = [*fallen, event, *records(reward=[0.1, 0.1])]
    assert find_collapse(after, watch()) is None
    assert find_collapse([*after, *records(reward=[0.4, 0.4, 0.1, 0.1])], watch()) is not None
    assert (rollbacks(after), stopped_at(after)) == (1, None)
    assert stopped_at([*after, event | {"action": "stop", "step": 9}]) == 9


def test_sft_records_are_not_watched() -> None:
    sft = [r | {"stage": "sft"} for r in records(reward=[0.9, 0.9])]
    assert find_collapse([*sft, *records(reward=[0.1, 0.1])], watch()) is None
