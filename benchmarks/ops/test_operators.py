"""Every operator on the CPU against plain torch, torch.compile and other libraries.

    pytest benchmarks/ops --benchmark-json=FILE

A group is an operator at one size, its variants are parameters. What a variant returns, gradients too, is compared with
plain torch before it is timed. `make bench-ops` calls it five times, so that the variants take turns, and
`benchmarks.ops.table` makes rows of the files.
"""

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from benchmarks.ops.cases import CASES, MATMULS, PLAIN, Case, Variants
from benchmarks.ops.measure import disagreement, peaks_mb

ON_CPU = {case.name: case for case in CASES if "cpu" in case.devices}


def variant_names(case: Case) -> list[str]:
    """At small sizes: to know the names means to make the tensors."""
    return list(replace(case, shape={name: min(size, 64) for name, size in case.shape.items()}).variants("cpu"))


@pytest.fixture(scope="module")
def case_variants(request: pytest.FixtureRequest) -> tuple[Case, Variants, list[Tensor]]:
    """A case, its variants, and what plain torch returns."""
    case = ON_CPU[request.param]
    variants = case.variants("cpu")
    plain = variants[PLAIN]
    assert callable(plain)
    return case, variants, plain()


@pytest.mark.parametrize(
    ("case_variants", "variant"),
    [(name, variant) for name, case in ON_CPU.items() for variant in variant_names(case)],
    indirect=["case_variants"],
)
def test_operator(
    case_variants: tuple[Case, Variants, list[Tensor]], variant: str, benchmark: Any, pytestconfig: pytest.Config
) -> None:
    case, variants, wanted = case_variants
    step = variants[variant]
    if isinstance(step, str):
        pytest.skip(step)
    results = step()
    if variant != MATMULS:
        why = disagreement(results, wanted)
        assert not why, why
    del results
    benchmark.group = case.name
    if pytestconfig.getoption("memory"):
        benchmark.extra_info["peak_mb"] = peaks_mb(case, {variant: step}, "cpu")[variant]
    benchmark(step)
