"""What the JSON of `pytest benchmarks/ops` holds beside times: machine, ceilings, why a variant has none."""

from typing import Any

import pytest
import torch

from benchmarks.ops.measure import FAILED, WRONG, ceilings
from benchmarks.rows import this_machine

CLOCKS = {"perf_counter": "wall", "process_time": "cpu"}
left_out = pytest.StashKey[dict[str, dict[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--memory", action="store_true", help="also the most memory of a call, each in a process")
    parser.addoption("--note", default="", help="goes into the machine's line: what else ran, say")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[left_out] = {}
    if clock(config) == "cpu" and torch.get_num_threads() != 1:
        found = torch.get_num_threads()
        raise pytest.UsageError(f"time.process_time: has to be with OMP_NUM_THREADS=1, there are {found} threads")


def clock(config: pytest.Config) -> str:
    return CLOCKS[str(config.getoption("benchmark_timer")).rpartition(".")[2]]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if call.when == "call" and call.excinfo is not None:
        error = call.excinfo.value
        reason = (str(error).strip().splitlines() or [""])[0].removeprefix("Skipped: ")
        if isinstance(error, AssertionError):
            reason = reason[reason.index(WRONG) :] if WRONG in reason else f"{FAILED}: {reason}"
        elif not report.skipped:
            reason = f"{FAILED}: {type(error).__name__}: {reason}"
        names = item.callspec.params
        item.config.stash[left_out].setdefault(names["case_variants"], {})[names["variant"]] = reason
    return report


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(this_machine() | {"clock": clock(config)})
    if note := config.getoption("note"):
        machine_info["note"] = note


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["ceilings"] = ceilings("cpu", clock(config))
    output_json["left_out"] = config.stash[left_out]
