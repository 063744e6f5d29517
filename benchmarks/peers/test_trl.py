"""TRL's side against carft_fast's, for real, on the quickstart's model. `make test-peers`"""

import pytest

from benchmarks.peers.__main__ import given_sides, make_work, ours, quickstart, run_case, trl_spec


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return quickstart(tmp_path_factory.mktemp("peers") / "model")


def test_gradient_and_update_are_those_of_trl(model, tmp_path):
    """`run_case` raises where counts, losses, gradients or weights differ."""
    work = make_work(model, 2, 4, 2, method="dr_grpo", given=True)
    rows, about = run_case("given", work, given_sides(8), tmp_path / "case")
    assert {row["side"] for row in rows} >= {"TRL", "TRL, completion positions"}
    assert "gradients by" in about["checks"]


def test_the_gradient_does_not_depend_on_trls_micro_batches(model, tmp_path):
    work = make_work(model, 2, 4, 2, method="dr_grpo", given=True)
    run_case("given", work, [ours("we", ""), trl_spec("TRL", "", 2, valid=True)], tmp_path / "case")


def test_own_samples_all_have_the_length_asked_for(model, tmp_path):
    work = make_work(model, 2, 4, 2, method="dr_grpo", given=False)
    specs = [ours("we", ""), trl_spec("TRL", "", 8, valid=True)]
    _, about = run_case("own", work, specs, tmp_path / "case")
    assert f"{8 * model.own_tokens} completion tokens" in about["checks"]
