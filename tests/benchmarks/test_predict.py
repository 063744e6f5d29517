"""The committed prediction is that of the cost model as it is."""


def test_the_committed_prediction_is_the_cost_models() -> None:
    from benchmarks.predict import RESULTS, report

    assert report() == (RESULTS / "step_predicted.md").read_text()
    assert report().startswith("# Predicted step times (a prediction: none of this was run)")
