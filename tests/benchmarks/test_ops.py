"""What times the operators: which variants there are, that they are compared, and how times become rows."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pytest_benchmark.utils import load_timer

from benchmarks import compare
from benchmarks.ops import cases as op_cases
from benchmarks.ops import conftest, table
from benchmarks.ops import measure as ops
from benchmarks.ops.cases import MATMULS, PLAIN, Case, Maker
from benchmarks.rows import RESULTS
from carft_fast.core.errors import InputError

ROOT = RESULTS.parents[1]

SMALL = {
    "token_logprob": {"T": 8, "V": 50},
    "linear_logprob": {"T": 8, "V": 50, "D": 16},
    "linear_policy_loss": {"T": 128, "V": 50, "D": 16},
    "value_pool": {"T": 32, "D": 8, "length": 8},
    "masked_infonce": {"N": 16, "D": 8},
    "policy_loss": {"T": 32},
    "value_loss": {"T": 32},
    "whiten": {"T": 32},
    "gae": {"T": 32, "length": 8},
    "kl_shaped_reward": {"T": 32, "length": 8},
    "cpu_linear": {"N": 9, "K": 8, "M": 7},
    "lcs_mask": {"T": 32, "length": 8},
}


@pytest.mark.parametrize("operator", SMALL)
def test_variants_agree_with_plain_torch(operator: str) -> None:
    case = next(case for case in op_cases.CASES if case.operator == operator)
    variants = case.build(Maker("cpu", torch.float32), **SMALL[operator])
    variants.pop("torch.compile")  # takes a compiler and half a minute
    good, left_out = ops.checked(variants)
    assert set(good) - {MATMULS} >= {operator, PLAIN}
    assert all(why.startswith(("not applicable", "not installed")) for why in left_out.values())


def test_every_operator_is_measured() -> None:
    import carft_kernels

    assert {case.operator for case in op_cases.CASES} == set(carft_kernels.__all__) - {"set_index_checks"} == set(SMALL)


def test_a_wrong_variant_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def result(value: float) -> Callable[[], list[torch.Tensor]]:
        return lambda: [torch.full((4,), value)]

    calls: list[str] = []

    def wrong() -> list[torch.Tensor]:
        calls.append("wrong")
        return [torch.full((4,), 1.01)]

    def variants(make: Maker, T: int) -> Any:
        return {
            "op": result(1.0),
            PLAIN: result(1.0),
            "other": wrong,
            "broken": broken,
            "absent": "not applicable: nothing there",
        }

    def broken() -> list[torch.Tensor]:
        raise RuntimeError("no such device\nand more")

    case = Case("op", {"T": 4}, variants, bytes=lambda size, T: 1e6 * size)
    monkeypatch.setattr(ops, "peaks_mb", lambda case, steps, device: dict.fromkeys(steps, 1.0))
    ceiling = {"bytes": 1e9, "flops": 1e9, "device": "cpu"}
    rows = {row["variant"]: row for row in ops.measure_case(case, "cpu", ceiling, budget=0.0)}
    assert calls == ["wrong"]  # once, to be looked at
    assert rows["other"].keys() == {"case", "variant", "why"}
    assert rows["other"]["why"].startswith("wrong: result 0 is off by 0.01")
    assert rows["absent"]["why"] == "not applicable: nothing there"
    assert rows["broken"]["why"] == "failed: RuntimeError: no such device"
    assert [row["variant"] for row in ops.bad_rows(list(rows.values()))] == ["other", "broken"]
    assert rows["op"]["rounds"] == ops.FEWEST


WRONG_AND_BROKEN = """
import carft_kernels

real = carft_kernels.whiten
carft_kernels.whiten = lambda x: 1.01 * real(x)

def kl_shaped_reward(*inputs, **options):
    raise RuntimeError("no such device\\nand more")

carft_kernels.kl_shaped_reward = kl_shaped_reward
"""


@pytest.mark.long
def test_what_pytest_benchmark_measured_becomes_rows(tmp_path: Path) -> None:
    """Two runs; one operator is right, one wrong, one raises."""
    (tmp_path / "broken.py").write_text(WRONG_AND_BROKEN)
    files = [tmp_path / f"{turn}.json" for turn in (1, 2)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    for file in files:
        words = ["-q", "benchmarks/ops", "-k", "(whiten or gae or kl_shaped) and not whiten-torch.compile"]
        words += ["--benchmark-min-rounds=2", "--benchmark-max-time=0.01", f"--benchmark-json={file}", "-p", "broken"]
        run = subprocess.run(
            [sys.executable, "-m", "pytest", *words],
            env=clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 1, run.stdout + run.stderr
    runs = [json.loads(file.read_text()) for file in files]
    rows = {(row["case"].partition(",")[0], row["variant"]): row for row in table.rows_of(runs)}
    assert rows["whiten", "whiten"]["why"].startswith("wrong: result 0 is off by 0.0")
    assert rows["kl_shaped_reward", "kl_shaped_reward"]["why"] == "failed: RuntimeError: no such device"
    assert rows["gae", "torch.compile"]["why"] == op_cases.LOOP
    assert {row["variant"] for row in ops.bad_rows(list(rows.values()))} == {"whiten", "kl_shaped_reward"}
    gae = [found for run in runs for found in run["benchmarks"] if found["group"].startswith("gae")]
    for variant in ("gae", PLAIN):
        rounds = [len(found["stats"]["data"]) for found in gae if found["params"]["variant"] == variant]
        assert len(rounds) == 2
        assert rows["gae", variant]["rounds"] == sum(rounds)
    assert rows["gae", PLAIN]["plain_over_this"] == 1
    assert rows["gae", "gae"]["plain_over_this"] > 1
    machine = table.machine_of(runs)
    assert (machine["runs"], machine["clock"], machine["threads"]) == ("2", "wall", "1")
    with pytest.raises(InputError, match="two machines or commits"):
        table.machine_of([runs[0], runs[1] | {"machine_info": runs[1]["machine_info"] | {"commit": "other"}}])
    assert compare.read(files[0]).rows[0]["machine"]["clock"] == "wall"
    list(compare.differences(compare.read(files[0]), compare.read(files[1]), 0.1))


@pytest.mark.parametrize(("timer", "clock"), [("time.perf_counter", "wall"), ("time.process_time", "cpu")])
def test_rows_say_which_clock_timed_them(timer: str, clock: str) -> None:
    for given in (timer, load_timer(timer)):
        assert conftest.clock(mock.Mock(getoption=lambda name, given=given: {"benchmark_timer": given}[name])) == clock


@pytest.mark.parametrize("half", [False, True])
def test_half_precision_does_not_make_the_policy_loss_look_wrong(half: bool) -> None:
    """A ratio at a clip bound loses its gradient by a rounding, so that there may be none near one."""
    for seed in range(4):
        results = []
        for exact in (False, True):
            make = Maker("cpu", torch.bfloat16, exact=exact)
            make.generator.manual_seed(seed)
            plain = op_cases.linear_policy_loss(make, T=1024, V=1001, D=256, half=half)[PLAIN]
            assert callable(plain)
            results.append(plain())
        assert ops.disagreement(*results) == ""


def test_a_policy_loss_without_its_clip_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some ratios are beyond the bounds: else the check above would pass without a clip as well."""
    real = op_cases.ck.linear_policy_loss

    def unclipped(*inputs: Any, **options: Any) -> Any:
        return real(*inputs, **options, clip_low=1.0, clip_high=100.0)

    case = Case("linear_policy_loss", {"T": 256, "V": 50, "D": 16}, op_cases.linear_policy_loss)
    found = ops.against_float64(case, "cpu", torch.float32)
    assert re.fullmatch(r"off by \S+ of the largest value, plain torch by \S+", found["linear_policy_loss"])
    assert float(found["linear_policy_loss"].split()[2]) < 1e-5
    monkeypatch.setattr(op_cases.ck, "linear_policy_loss", unclipped)
    assert ops.against_float64(case, "cpu", torch.float32)["linear_policy_loss"].startswith("wrong: result 0 is off by")


def test_chunked_variants_agree_with_plain_torch() -> None:
    """Those of a GPU, whose tensors may be anywhere."""
    variants = op_cases.linear_logprob_forward(Maker("cpu", torch.float32), T=8, V=50, D=16)
    variants.pop("torch.compile")
    good, _ = ops.checked(variants)
    assert len([name for name in good if name.startswith(op_cases.CHUNKED)]) == 2


def test_the_cache_is_overwritten_before_each_timed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """And outside of what the events time."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None:
            log.append("event")

        def synchronize(self) -> None: ...
        def elapsed_time(self, end: "Event") -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(ops, "flusher", lambda device: lambda: log.append("flush"))
    times = ops.timed({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, "cuda", "wall", budget=0.0)
    first = ["event", "a", "event", "event", "b", "event"]
    assert log == first + ["flush", "event", "a", "event", "flush", "event", "b", "event"] * ops.FEWEST
    assert times == dict.fromkeys("ab", [0.002] * ops.FEWEST)


def test_rates_and_shares() -> None:
    sizes = {"T": 100, "V": 10, "D": 10}
    case = Case("op", sizes, lambda make: {}, op_cases.three_products)
    row = ops.row_of(case, "op", [0.1, 0.2, 0.3, 0.4, 0.5], 7.0, 0.6, {"bytes": 1e9, "flops": 1e6, "device": "cpu"})
    assert (row["p20_ms"], row["p50_ms"], row["p80_ms"]) == (180, 300, 420)
    assert row["plain_over_this"] == 2
    assert row["gflop_per_s"] == pytest.approx(60_000 / 0.3 / 1e9)
    assert row["ceiling_share"] == pytest.approx(60_000 / 0.3 / 1e6)
    assert "gb_per_s" not in row
    assert op_cases.passes_over_logits(size=2, T=3, V=5) == 90
    assert op_cases.floats_a_token(size=2, T=10, count=5) == 200
