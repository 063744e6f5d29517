"""The learning rate's schedule, by hand."""

import math

import pytest

from carft_fast.config.sections import SftConfig
from carft_fast.training.optim import learning_rate


def test_learning_rate() -> None:
    def curve(**values: object) -> list[float]:
        config = SftConfig.model_validate({"lr": 2.0, **values})
        return [learning_rate(step, 11, config) for step in range(11)]

    assert curve() == [2.0] * 11
    assert curve(warmup_steps=4)[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    linear = curve(lr_schedule="linear", lr_final_ratio=0.1)
    assert linear[0] == 2.0
    assert linear[5] == pytest.approx(1.1)
    assert linear[-1] == pytest.approx(0.2)
    cosine = curve(lr_schedule="cosine", warmup_steps=1)
    assert cosine[1] == 2.0
    assert cosine[-1] == pytest.approx(0.0)
    assert cosine[4] == pytest.approx(1 + math.cos(math.pi / 3))
