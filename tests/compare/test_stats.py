"""A comparison's statistics, worked out by hand."""

import csv
import io
import statistics
from typing import Any

import pytest

from carft_fast.compare.report import evaluations_csv, summary_csv
from carft_fast.compare.stats import (
    Accuracy,
    Evaluation,
    Judgement,
    Trajectory,
    outcomes,
    paired_differences,
    summarise,
    t_quantile,
    trajectory,
    verdict,
)
from carft_fast.training.evaluation import wilson_interval


def run(
    label: str, seed: int, correct: list[int], seconds: list[float], *, rows: int = 100, **state: Any
) -> Trajectory:
    return Trajectory(
        label,
        label,
        seed,
        [
            Evaluation(i, 64 * i, s, c, rows, **({"extractable": 1.0, "completion_length": 9.0} | state))
            for i, (c, s) in enumerate(zip(correct, seconds, strict=True))
        ],
    )


def test_records_become_a_trajectory() -> None:
    def record(kind: str, step: int, seconds: dict[str, float], **values: Any) -> dict[str, Any]:
        return {"stage": "rl", "kind": kind, "step": step, "seconds": seconds, **values}

    held_out = {"rows": 20, "extractable": 0.9, "completion_length": 11.0}
    records = [
        record("eval", 0, {"load": 5.0, "evaluate": 7.0}, correct=4, **held_out),
        record("train", 1, {"rollout": 1.0, "update": 2.0}, reward=0.2, entropy=1.0),
        record("train", 2, {"rollout": 1.5, "update": 2.5, "checkpoint": 9.0}, reward=0.4, entropy=2.0),
        record("guard", 2, {}, action="rollback", cause="reward"),
        record("eval", 2, {"evaluate": 8.0}, correct=10, **held_out),
        record("train", 3, {"update": 1.0}, reward=0.9, entropy=3.0),
        record("eval", 3, {"evaluate": 8.0}, correct=6, **held_out),
    ]
    found = trajectory(records, label="x", method="reft", seed=0, samples_per_step=8)
    assert [(e.step, e.samples, e.seconds, e.accuracy) for e in found.evaluations] == [
        (0, 0, 0.0, 0.2),
        (2, 16, 7.0, 0.5),
        (3, 24, 8.0, 0.3),
    ]
    assert [e.reward for e in found.evaluations] == [None, pytest.approx(0.3), 0.9]
    assert [e.kl for e in found.evaluations] == [None, None, None]
    assert (found.best, found.worst_drop) == (0.5, pytest.approx(0.2))


def test_drop_and_collapse() -> None:
    assert run("a", 0, [50, 40, 60, 55], [0, 1, 2, 3]).worst_drop == pytest.approx(0.05)
    assert run("a", 0, [50, 60, 20, 58], [0, 1, 2, 3]).worst_drop == pytest.approx(0.4)
    assert not run("a", 0, [50, 60, 31], [0, 1, 2]).collapsed
    assert run("a", 0, [50, 60, 29], [0, 1, 2]).collapsed
    silent = Trajectory("a", "a", 0, [Evaluation(0, 0, 0, 5, 10, 0.9, 1), Evaluation(1, 8, 1, 5, 10, 0.4, 1)])
    assert silent.collapsed, "answers stopped being extractable"


def test_a_collapse_is_the_fall_that_lasts() -> None:
    fallen = run("a", 0, [50, 60, 20, 58, 29, 10], [0, 1, 2, 3, 4, 5])
    assert fallen.collapse is fallen.evaluations[4], "it came back from the fall to 20"
    stood = run("b", 0, [50, 60, 20, 58, 40, 31], [0, 1, 2, 3, 4, 5])
    assert stood.collapse is None
    assert [s.samples_to_collapse for s in summarise([fallen, stood])] == [fallen.evaluations[4].samples, None]
    *_, until = outcomes([fallen, stood], Judgement(["b"], 0.7))
    assert until.name == "samples until collapse"
    assert until.values == {"a": {0: fallen.evaluations[4].samples}, "b": {0: stood.final.samples}}
    assert len(outcomes([stood, stood], Judgement(["b"], 0.7))) == 2, "nobody collapsed"


def test_equal_samples_and_equal_time() -> None:
    """The fastest RL run ends after 10 s: the slower ones are read off at their last evaluation before that."""
    runs = [
        run("sft", 0, [40, 50, 52, 48], [0, 1, 2, 3]),
        run("reft", 0, [40, 45, 70, 60], [0, 3, 6, 10]),
        run("carft", 0, [40, 55, 65, 90], [0, 5, 11, 16]),
    ]
    sft, reft, carft = summarise(runs)
    assert [s.equal_samples.spread.mean for s in (sft, reft, carft)] == [0.48, 0.6, 0.9]
    assert [s.equal_time.spread.mean for s in (sft, reft, carft)] == [0.48, 0.6, 0.55]
    # the best that continued SFT reached is 52
    assert (reft.reached, reft.samples_to_reach, reft.seconds_to_reach) == (1, 128, 6)
    assert (carft.samples_to_reach, carft.seconds_to_reach) == (64, 5)
    assert sft.samples_to_reach == 128
    assert carft.samples_per_second == pytest.approx(192 / 16)


def test_spread_over_seeds_and_pooled_interval() -> None:
    runs = [run("reft", seed, [40, final], [0, 4]) for seed, final in enumerate((60, 70, 50))]
    (found,) = summarise(runs)
    assert found.final.spread.mean == pytest.approx(0.6)
    assert found.final.spread.sd == pytest.approx(statistics.stdev([0.6, 0.7, 0.5]))
    assert (found.final.spread.low, found.final.spread.high) == (0.5, 0.7)
    assert found.final.ci95 == wilson_interval(180, 300)
    assert found.reached is None, "no continued SFT to reach"


def test_never_reached_is_said() -> None:
    runs = [run("sft", 0, [40, 60], [0, 1]), run("reft", 0, [40, 50], [0, 2])]
    rows = {row["label"]: row for row in csv.DictReader(io.StringIO(summary_csv(summarise(runs))))}
    assert rows["reft"]["samples_to_reach_sft"] == rows["reft"]["seconds_to_reach_sft"] == "never"
    assert rows["sft"]["samples_to_reach_sft"] == "64.0"
    points = list(csv.DictReader(io.StringIO(evaluations_csv(runs))))
    assert [(p["label"], p["samples"], p["accuracy"]) for p in points] == [
        ("sft", "0", "0.4"),
        ("sft", "64", "0.6"),
        ("reft", "0", "0.4"),
        ("reft", "64", "0.5"),
    ]


def test_overlapping_intervals_cannot_be_told_apart() -> None:
    def accuracy(correct: int) -> Accuracy:
        return Accuracy.of([Evaluation(1, 64, 1.0, correct, 100, 1.0, 9.0)])

    text = verdict({"reft": accuracy(60), "carft": accuracy(64), "grpo": accuracy(30)})
    assert text.startswith("Highest mean: carft, 64.0%. It cannot be told apart from reft")
    assert "The intervals of grpo lie below" in text


SLEEP = {
    "drug 1": [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    "drug 2": [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
}
"""Hours of sleep gained by ten patients (Student 1908); R's t.test prints the figures below."""


def test_a_paired_difference_is_that_of_students_sleep_data() -> None:
    (found,) = paired_differences({k: dict(enumerate(v)) for k, v in SLEEP.items()}, "drug 2")
    assert (found.label, found.seeds) == ("drug 1", 10)
    assert found.mean == pytest.approx(-1.58)
    assert (found.low, found.high) == (pytest.approx(-2.4598858, abs=1e-7), pytest.approx(-0.7001142, abs=1e-7))
    assert found.p == found.adjusted_p == pytest.approx(0.002833, abs=1e-6)


@pytest.mark.parametrize(
    ("probability", "degrees", "quantile"),
    [(0.975, 1, 12.7062), (0.975, 7, 2.36462), (0.975, 30, 2.04227), (0.8, 9, 0.883404)],  # printed tables
)
def test_t_quantiles(probability: float, degrees: int, quantile: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(quantile, rel=1e-5)


def test_holms_correction_and_equal_arms() -> None:
    noise = [1.0, -1.0, 2.0, -2.0, 0.5, -0.5]
    arms = {"base": [0.0] * 6, "same": [0.0] * 6, "shifted": [3.0] * 6}
    arms |= {f"+{shift}": [shift + x for x in noise] for shift in (0.5, 1.5, 2.5)}
    found = {f.label: f for f in paired_differences({k: dict(enumerate(v)) for k, v in arms.items()}, "base")}
    assert (found["same"].p, found["same"].adjusted_p) == (1.0, 1.0)
    assert (found["shifted"].p, found["shifted"].mean, found["shifted"].low) == (0.0, 3.0, 3.0)
    by_hand = [4 * found["+2.5"].p, 3 * found["+1.5"].p, 2 * found["+0.5"].p]  # 5 arms, the smallest p is shifted's
    assert [found[f"+{s}"].adjusted_p for s in (2.5, 1.5, 0.5)] == pytest.approx([min(1.0, p) for p in by_hand])


def test_outcomes_of_a_study() -> None:
    """Each seed is compared at its own fewest samples; a run that does not get there counts with all of them."""
    runs = [
        run("reft", 0, [10, 40, 71, 80], [0, 1, 2, 3]),
        run("carft", 0, [10, 70, 75], [0, 1, 2]),
        run("reft", 1, [12, 30, 50, 60], [0, 1, 2, 3]),
        run("carft", 1, [12, 35, 65, 66], [0, 1, 2, 3]),
    ]
    accuracy, samples = outcomes(runs, Judgement(["reft"], 0.7))
    assert accuracy.values == {"reft": {0: 71, 1: 60}, "carft": {0: 75, 1: 66}}
    assert samples.values == {"reft": {0: 128, 1: 192}, "carft": {0: 64, 1: 192}}
    assert accuracy.differences["reft"][0].mean == pytest.approx(5)
    assert samples.differences["reft"][0].mean == pytest.approx(-32)
    (alone, _) = outcomes(runs[:2], Judgement(["reft"], 0.7))
    assert alone.differences == {}  # one seed says nothing of a spread
