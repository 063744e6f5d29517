"""Benchmarks on a GPU, as far as they go without one."""

import os
import re
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu
from benchmarks.ops.cases import PLAIN
from benchmarks.rows import read
from carft_fast.core.errors import InputError

from .rowcase import MACHINE, ROOT

NCU = """==PROF== Connected to process 1234
==PROF== Disconnected from process 1234
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","python","h","logprob_fwd_kernel","1","7","(512, 1, 1)","(8192, 1, 1)","0","9.0","Metrics",\
"dram__bytes.sum","Gbyte","2.49"
"0","1","python","h","logprob_fwd_kernel","1","7","(512, 1, 1)","(8192, 1, 1)","0","9.0","Metrics",\
"gpu__time_duration.sum","us","812.3"
"1","1","python","h","gae_kernel","1","7","(128, 1, 1)","(64, 1, 1)","0","9.0","Metrics",\
"gpu__time_duration.sum","us","4.1"
"""


def test_ncu_output_becomes_rows() -> None:
    assert gpu.ncu_rows(NCU) == [
        ("logprob_fwd_kernel", "memory moved 2.49 Gbyte, time 812.3 us"),
        ("gae_kernel", "time 4.1 us"),
    ]
    with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
        gpu.ncu_rows("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission")


def test_nvidia_smi_is_asked_about_the_gpu_that_torch_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    with pytest.raises(OSError, match="nvidia-smi is not on the PATH"):
        gpu.nvidia_smi(gpu.CHANGING)
    assert gpu.state() == "unknown: nvidia-smi is not on the PATH"
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$*" in *--id=GPU-1234) echo "1980 MHz, 2619 MHz, 41, 99.5 W";; esac\n')
    tool.chmod(0o755)
    assert gpu.state() == "1980 MHz SM, 2619 MHz memory, 41 C, 99.5 W"
    tool.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    assert gpu.state() == "unknown: nvidia-smi answered 'No devices were found'"
    assert gpu.slug("NVIDIA A100-SXM4-80GB") == "nvidia_a100_sxm4_80gb"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "right,opps"], "--parts right,opps: 'opps' is no part; allowed are right, ops, step, lora"),
        (["--minutes", "0"], "--minutes 0: has to be above 0 and at most 60"),
        (["--wheels", "nowhere"], "--wheels: nowhere holds no pydantic_core: make gpu-wheels fills build/gpu_wheels"),
    ],
)
def test_wrong_options_are_named(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", *words])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_packages_for_another_python_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PYTHONPATH", "PATH"):
        monkeypatch.setenv(variable, "before")
    monkeypatch.setattr(sys, "path", [*sys.path])
    compiled = tmp_path / "pydantic_core" / "_pydantic_core.cpython-38-x86_64-linux-gnu.so"
    compiled.parent.mkdir()
    compiled.touch()
    with pytest.raises(ValueError, match=r"cpython-38-x86_64-linux-gnu\.so is for another Python than this, 3\.1"):
        gpu.use_wheels(tmp_path)
    compiled.rename(compiled.with_name(f"_pydantic_core{EXTENSION_SUFFIXES[0]}"))
    gpu.use_wheels(tmp_path)
    assert os.environ["PYTHONPATH"] == f"{tmp_path}{os.pathsep}before"


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = [sys.executable, "-m", "benchmarks.gpu", "--results", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert found.returncode == 2
    assert re.fullmatch(r"error: no GPU: torch \S+ \(CUDA \S+\) sees no CUDA device, and .*\n", found.stderr)
    assert list(tmp_path.iterdir()) == []


def test_only_our_own_operator_fails_the_part() -> None:
    ours = {"case": "gae, T=8", "variant": "gae", "p50_ms": 1.5}
    plain = {"case": "gae, T=8", "variant": PLAIN, "p50_ms": 3.0}
    theirs = {"case": "gae, T=8", "variant": "liger", "why": "failed: OutOfMemoryError: of CUDA"}
    absent = {"case": "gae, T=8", "variant": "trl", "why": "not installed: trl"}
    fine = gpu.operator_result("gae", [ours, plain, theirs, absent])
    assert fine == "gae 1.5 ms; plain torch 3 ms; liger: failed: OutOfMemoryError: of CUDA"
    off = {"case": "gae, T=8", "variant": "gae", "why": "wrong: result 0 is off by 3"}
    assert gpu.operator_result("gae", [off, plain]) == "failed: plain torch 3 ms; gae: wrong: result 0 is off by 3"


PART = """
import json, os, pathlib, sys, time
part, folder = sys.argv[sys.argv.index("--part") + 1], sys.argv[sys.argv.index("--results") + 1]
file = pathlib.Path(folder, "gpu_x.json")
for case in range(5):
    data = json.loads(file.read_text())
    done = sum(row["part"] == part for row in data["rows"])
    if done > case:
        continue
    if part in ("right", "step") and case == 2:
        os.kill(os.getpid(), 9)
    if part == "lora":
        sys.exit(1)
    if part == "rollout" and case == 1:
        time.sleep(60)
    data["rows"].append({"part": part, "what": str(case), "result": "fine"})
    file.write_text(json.dumps(data))
"""


def test_a_part_that_is_killed_leaves_its_rows_and_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes. Operators go on after the one that killed theirs; a part without rows is tried once."""
    python = tmp_path / "python"
    (tmp_path / "part.py").write_text(PART)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I {tmp_path / "part.py"} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(gpu, "gpu_machine", lambda: MACHINE)
    monkeypatch.setattr(gpu, "result_file", lambda folder: folder / "gpu_x.json")
    monkeypatch.setattr(gpu, "state", lambda: "")
    parts = ("right", "step", "lora")
    rows = gpu.run_all(parts, tmp_path, 10.0)
    found = {part: [(row["what"], row["result"]) for row in rows if row["part"] == part] for part in parts}
    killed = ("process 3", "failed: exit code -9")
    assert found["right"] == [("0", "fine"), ("1", "fine"), killed, ("3", "fine"), ("4", "fine")]
    assert found["step"] == [("0", "fine"), ("1", "fine"), killed]
    assert found["lora"] == [("process 1", "failed: exit code 1")]
    assert gpu.summary(parts, rows) == [
        "done: nothing",
        "failed: right process 3 (exit code -9)",
        "failed: step process 3 (exit code -9)",
        "failed: lora process 1 (exit code 1)",
    ]
    # rows of other parts stay, with their machine
    late = gpu.run_all(("rollout",), tmp_path, 0.05)
    assert [row["what"] for row in late] == ["0", "out of time"]
    assert late[1]["result"] == "failed: after 3 s, 0.05 minutes in all"
    everything = read(tmp_path / "gpu_x.json").rows
    assert [row["part"] for row in everything].count("right") == 5
    assert all(row["machine"] == MACHINE for row in everything)


def test_operators_end_where_no_process_gets_to_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(gpu, "gpu_machine", lambda: MACHINE)
    monkeypatch.setattr(gpu, "result_file", lambda folder: folder / "gpu_x.json")
    monkeypatch.setattr(gpu, "state", lambda: "")
    rows = gpu.run_all(("right", "ops"), tmp_path, 10.0)
    assert [row["result"] for row in rows] == ["failed: exit code 1"] * 4


def test_unreadable_rows_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match=r"x\.json: is not JSON"):
        read(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"rows": []}')
    with pytest.raises(InputError, match=r'"benchmark" is None, has to be one of ops,'):
        read(tmp_path / "x.json")
