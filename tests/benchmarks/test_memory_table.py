"""The memory table of the docs is the one computed now, from the published sizes of Qwen2.5."""

import pytest

from benchmarks.memory_table import MODELS, PAGE, cell, with_table
from carft_fast.models.flops import ModelCost


@pytest.mark.parametrize(("name", "billions"), [("Qwen2.5-7B", 7.61), ("Qwen2.5-14B", 14.77), ("Qwen2.5-32B", 32.76)])
def test_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    """As the model cards and the checkpoints' indexes say."""
    assert ModelCost.of_config(MODELS[name]).all_weights / 1e9 == pytest.approx(billions, abs=0.01)


def test_cards() -> None:
    gib = 2**30
    assert [cell(size * gib) for size in (21.5, 21.7, 36, 72, 72.1)] == [
        "21.5: 24",
        "21.7: 40",
        "36.0: 40",
        "72.0: 80",
        "72.1: none",
    ]


def test_the_table_in_the_docs_is_the_one_computed_now() -> None:
    page = PAGE.read_text()
    assert with_table(page) == page
    assert "An estimate, nothing measured on a GPU." in page
