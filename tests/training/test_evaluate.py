"""maj@k and pass@k against enumeration and cases written out by hand."""

import itertools

import pytest

from carft_fast.config.toml import load_config
from carft_fast.core.errors import InputError
from carft_fast.training.evaluation import bootstrap_interval, majority, pass_at_k, wilson_interval


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_all_subsets(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        ([1.0, 2.0, 2.0], 1),
        ([1.0, 2.0, 2.0, 1.0], 1),  # a tie: 2 had two votes first
        ([2.0, 1.0, 1.009, 2.0, 0.995], 1),  # within 0.01 of the first 1.0
        ([1.0, 1.02, 1.02], 1),
        ([None, None, 3.0], 2),
        ([None, None], None),
        (["b", "a", None, "a"], 1),
        ([3.0, 4.0], 0),
    ],
)
def test_majority(answers: list[float | str | None], winner: int | None) -> None:
    assert majority(answers, 0.01) == winner


def test_bootstrap_is_seeded_and_near_the_normal_interval() -> None:
    values = [0.0, 0.25, 0.5, 1.0] * 100
    low, high = bootstrap_interval(values, seed=1)
    assert (low, high) == bootstrap_interval(values, seed=1)
    assert (low, high) != bootstrap_interval(values, seed=2)
    mean = sum(values) / 400
    half = 1.96 * (sum((v - mean) ** 2 for v in values) / 400 / 400) ** 0.5
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=5e-3)


def test_rows_all_alike_are_no_certainty() -> None:
    assert bootstrap_interval([1.0] * 10, seed=0) == wilson_interval(10, 10)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.samples=4", "eval.k=[8]"], "eval.k = [8]: at most samples = 4"),
        (["eval.maj_k=[1]"], "eval.maj_k = [1]: at most samples = 0"),
        (["eval.max_new_tokens=2000"], "eval.max_new_tokens = 2000 must be below data.max_length = 1024"),
        (["eval.temperature=3.0", "rollout.engine=vllm"], "eval.temperature = 3"),
    ],
)
def test_impossible_settings(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        load_config(None, overrides)
    assert message in str(error.value)


def test_wilson_interval() -> None:
    """Against values of the textbook formula."""
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(400, 400) == pytest.approx((0.9905, 1.0), abs=1e-4)
