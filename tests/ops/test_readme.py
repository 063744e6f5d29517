"""The examples of kernels/README.md run as they stand."""

import re
from pathlib import Path

import pytest

import carft_kernels

README = (Path(__file__).resolve().parents[2] / "kernels" / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("example", EXAMPLES, ids=[re.findall(r"import (\w+)", e)[1] for e in EXAMPLES])
def test_example(example: str) -> None:
    exec(compile(example, "kernels/README.md", "exec"), {})


def test_every_operator_has_an_example() -> None:
    shown = " ".join(EXAMPLES)
    assert [n for n in carft_kernels.__all__ if n != "set_index_checks" and not re.search(rf"\b{n}\(", shown)] == []
