"""Benchmark rows and their comparison; no clock is asked."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compare, growth, long_run
from benchmarks.ops import measure as ops
from benchmarks.ops.cases import PLAIN
from benchmarks.rows import COLUMNS, RESULTS, commit, processor_model, read, write
from carft_fast.models.packing import pack

from .rowcase import MACHINE, ROOT, committed, ops_file


def outcome(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


# --- rows -------------------------------------------------------------------------------------------------------------


def test_processors_of_one_name_are_told_apart(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    one = "processor\t: {}\ncpu family\t: {}\nmodel\t\t: {}\nmodel name\t: AMD, EPYC\nstepping\t: 1\n\n"
    info.write_text(one.format(0, 25, 17) + one.format(1, 25, 17))
    assert processor_model(info) == "AMD EPYC family 25 model 17"
    info.write_text(one.format(0, 26, 2))
    assert processor_model(info) == "AMD EPYC family 26 model 2"
    info.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert processor_model(info) == processor_model(tmp_path / "missing") == "unknown"


def test_new_rows_do_not_make_a_commit_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert commit() == "unknown"

    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True)

    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    files = [tmp_path / "benchmarks" / "results" / "rows.json", tmp_path / "benchmarks" / "step.py"]
    for file in files:
        file.write_text("old")
    git("init")
    git("add", ".")
    git("commit", "-m", "rows")
    clean = commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    files[0].write_text("new")
    monkeypatch.chdir(tmp_path / "benchmarks")
    assert commit() == clean
    files[1].write_text("new")
    assert commit() == f"{clean}-dirty"


# --- compare ----------------------------------------------------------------------------------------------------------


def test_a_figure_worse_beyond_the_band_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ops_file(tmp_path, "base.json", 10.0, plain_over_this=2.0)
    near = ops_file(tmp_path, "near.json", 10.9, plain_over_this=1.9)
    slow = ops_file(tmp_path, "slow.json", 11.2, plain_over_this=2.0)
    fast = ops_file(tmp_path, "fast.json", 5.0, plain_over_this=4.0)
    less = ops_file(tmp_path, "less.json", 10.0, plain_over_this=1.7)
    assert outcome(monkeypatch, base, near) == 0
    capsys.readouterr()
    assert outcome(monkeypatch, base, slow) == 1
    assert "gae, T=8192 length=128, gae: p50_ms 10 -> 11.2 (1.120) WORSE" in capsys.readouterr().out
    assert outcome(monkeypatch, base, slow, "--band", "0.15") == 0
    assert outcome(monkeypatch, base, fast) == 0
    assert outcome(monkeypatch, base, less) == 1  # higher is better


@pytest.mark.parametrize("name", ["ops_cpu.json", "step_cpu.json", "growth_cpu.json", "rollout_cpu.json"])
def test_no_committed_figure_is_worse_than_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences may be below 0."""
    file = ROOT / "benchmarks/results" / name
    assert outcome(monkeypatch, file, file, "--band", "0") == 0


def test_counted_figures_have_no_band(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, registers in (("base", 40), ("more", 41), ("fewer", 39)):
        row = {"kernel": "k", "configuration": "c", "chip": "sm_90", "registers": registers, "failed": []}
        write(tmp_path / f"{name}.json", "kernels_aot", {"triton": "3.9.0"}, [row])
    base, more, fewer = (tmp_path / f"{name}.json" for name in ("base", "more", "fewer"))
    assert outcome(monkeypatch, base, more, "--band", "0.5") == 1
    assert outcome(monkeypatch, base, fewer) == 0


def test_a_row_that_is_gone_or_was_not_timed_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ops_file(tmp_path, "base.json", 10.0)
    other = ops_file(tmp_path, "other.json", 10.0, variant="plain torch")
    assert outcome(monkeypatch, base, other) == 1
    assert "gone from HEAD" in capsys.readouterr().out
    wrong = {"case": "gae, T=8192 length=128", "variant": "gae", "why": "wrong: result 0 is off"}
    write(tmp_path / "wrong.json", "ops", MACHINE, [wrong])
    assert outcome(monkeypatch, base, tmp_path / "wrong.json") == 1
    assert "HEAD has no p50_ms: wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cores": "4"}, "times of two machines are not compared"),
        ({"clock": "cpu"}, "times of two machines are not compared"),
        ({"device": "cuda", "gpu": "NVIDIA H100"}, "times of two machines are not compared"),
    ],
)
def test_other_machines_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    message: str,
) -> None:
    base = ops_file(tmp_path, "base.json", 10.0)
    assert outcome(monkeypatch, base, ops_file(tmp_path, "new.json", 1.0, machine=MACHINE | {"commit": "d"})) == 0
    assert outcome(monkeypatch, base, ops_file(tmp_path, "head.json", 10.0, machine=MACHINE | change)) == 2
    assert message in capsys.readouterr().err


def test_other_benchmarks_and_schemas_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ops_file(tmp_path, "base.json", 10.0)
    write(tmp_path / "growth.json", "growth", MACHINE, [])
    assert outcome(monkeypatch, base, tmp_path / "growth.json") == 2
    assert "BASE holds ops, HEAD growth" in capsys.readouterr().err
    old = json.loads(base.read_text()) | {"schema": 1}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert outcome(monkeypatch, base, tmp_path / "old.json") == 2
    assert re.search(r'old.json: "schema" of ops is 1, this version reads 2', capsys.readouterr().err)
    assert outcome(monkeypatch, base, tmp_path / "none.json") == 2
    assert "No such file" in capsys.readouterr().err
    assert outcome(monkeypatch, base, base, "--band", "1.5") == 2


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", committed(), ids=lambda file: file.stem)
def test_committed_rows_are_whole(file: Path) -> None:
    """Rows can be told apart, belong to a machine, and every figure has a unit."""
    found = read(file)
    names = [tuple(row.get(part) for part in found.key) for row in found.rows]
    assert len(set(names)) == len(names) > 0
    for row in found.rows:
        assert row["machine"]
        figures = {name for name, value in row.items() if type(value) is float} - {"bound_ms", "mufu_per_element"}
        assert figures <= set(COLUMNS), row


def test_counts_are_what_the_kernels_do_now(tmp_path: Path) -> None:
    """`python -m benchmarks.counts` writes what is committed, so a change of traffic or FLOPs shows in the diff."""
    file = tmp_path / "counts.json"
    command = [sys.executable, "-m", "benchmarks.counts", "--output", str(file)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=900)
    new, old = json.loads(file.read_text())["rows"], json.loads((RESULTS / "counts.json").read_text())["rows"]
    assert new == old, "run python -m benchmarks.counts and commit what it writes"
    # F = 2 T V D, of which each operator's docstring says how many it takes
    units = {
        row["what"]: row["flops"] / (2 * 32 * 256 * 32)
        for row in old
        if "flops" in row and row["case"].startswith("float32")
    }
    assert units["linear_logprob, forward"] == 1
    assert units["linear_logprob, forward and backward"] == 4
    assert units["linear_policy_loss, forward and backward"] == 3
    # two chunks of 4,096 tokens: d_weight is written, read and written, read and cast; the weight is read for the
    # logits and for d_hidden, by linear_logprob once more
    gpu = {row["what"]: row for row in old if row["case"] == "bfloat16 T=8192 V=152064 D=3584"}
    elements = 152_064 * 3584
    for what, reads in (("linear_policy_loss", 4), ("linear_logprob", 5)):
        assert gpu[f"{what} on a GPU"]["gradient_of_the_weight_bytes"] == (4 + 8 + 4 + 2) * elements
        assert gpu[f"{what} on a GPU"]["weight_bytes"] == 2 * reads * elements


# --- make -------------------------------------------------------------------------------------------------------------


def test_every_target_has_one_recipe() -> None:
    """make warns, and takes the last: a folder of libraries then lacks those of the first."""
    found = subprocess.run(["make", "--dry-run", "help"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "overriding recipe" not in found.stderr


# --- growth -----------------------------------------------------------------------------------------------------------


def test_variants_of_a_group_do_the_same() -> None:
    prepared = {name: make() for name, make in growth.group_makers(2).items()}
    steps, wrong = ops.checked(growth.group_steps(prepared))
    assert not wrong
    assert float(steps[PLAIN]()[0]) > 0.01  # else there is nothing to agree on
    tokens = {
        name: len(
            pack(
                p.samples.rollouts.prompts,
                p.samples.rollouts.completions,
                torch.device("cpu"),
                share_prompts=p.config.shares_prompts,
            ).ids_T
        )
        for name, p in prepared.items()
    }
    assert tokens["carft_fast"] == 8 * (128 + 32)
    assert tokens["carft_fast, shared prompts"] == 4 * 128 + 8 * 32


@pytest.mark.long
def test_processes_take_the_same_step() -> None:
    """`ranks` fails where their losses differ."""
    rows = growth.ranks(sizes=(2,), sequences=4, rounds=1)
    assert [row["variant"] for row in rows] == ["DDP", "FSDP2"]
    assert all(row["p50_ms"] > 0 and row["machine"]["cores"] for row in rows)


def test_the_slowest_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Any]] = [
        {"seconds": [1.0, 5.0, 2.0], "peak_mb": 7.0, "loss": 0.5},
        {"seconds": [3.0, 4.0, 1.0], "peak_mb": 9.0, "loss": 0.5},
    ]

    def spawn(work: Any, arguments: tuple[Any, ...], nprocs: int) -> None:
        for rank in range(nprocs):
            Path(arguments[-1], f"{rank}.json").write_text(json.dumps(dict.fromkeys(growth.STRATEGIES, found[rank])))

    monkeypatch.setattr(growth.mp, "spawn", spawn)
    (ddp, _) = growth.ranks(sizes=(2,))
    assert (ddp["p50_ms"], ddp["peak_mb"]) == (3000, 9)
    found[1]["loss"] = 0.51
    with pytest.raises(RuntimeError, match=r"2 processes: losses from 0\.5 to 0\.51"):
        growth.ranks(sizes=(2,))


def test_only_a_part_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(against: str, value: float) -> Callable[[str], list[dict[str, Any]]]:
        row = {"operator": "x", "against": against, "size": 1, "variant": "y", "p50_ms": value, "peak_mb": value}
        return lambda clock: [row]

    monkeypatch.setattr(growth, "RESULTS", tmp_path)
    for value, words in ((1.0, []), (2.0, ["--only", "ranks"])):
        monkeypatch.setattr(growth, "PARTS", {name: rows(name, value) for name in ("operators", "ranks")})
        monkeypatch.setattr(sys, "argv", ["growth", *words])
        growth.main()
    found = read(tmp_path / "growth_cpu.json").rows
    assert {row["against"]: row["p50_ms"] for row in found} == {"operators": 1.0, "ranks": 2.0}


# --- long runs --------------------------------------------------------------------------------------------------------


def test_trend_is_that_after_the_warm_up() -> None:
    # 0 to 99 in the warm-up, then a line that rises by 0.5 every step
    values = [1e6] * 100 + [10 + 0.5 * i for i in range(900)]
    found = long_run.trend(values)
    assert found == pytest.approx((10 + 0.5 * 44.5, 10 + 0.5 * 854.5, 10 + 0.5 * 899, 500))
    seen = [dict.fromkeys(long_run.FIGURES, value) for value in values]
    rows = long_run.rows_of("hf", seen)
    assert [row["step"] for row in rows] == list(range(10, 1001, 10))
    of_rows = long_run.trend([row["resident_mb"] for row in rows], 10)
    assert (of_rows.first, of_rows.last, of_rows.slope) == pytest.approx((found.first, found.last, 500))


def test_processor_time_is_that_of_the_process() -> None:
    time.sleep(0.2)  # which counts for nothing
    before, own = long_run.cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() - own < 0.3:
        pass
    # a tick of the kernel is 10 ms
    assert long_run.cpu_seconds(os.getpid()) - before == pytest.approx(time.process_time() - own, abs=0.05)
