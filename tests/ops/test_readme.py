"""The examples of kernels/README.md run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import carft_kernels

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "kernels" / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("example", EXAMPLES, ids=[re.findall(r"import (\w+)", e)[1] for e in EXAMPLES])
def test_example(example: str) -> None:
    exec(compile(example, "kernels/README.md", "exec"), {})


def test_every_operator_has_an_example() -> None:
    shown = " ".join(EXAMPLES)
    assert [n for n in carft_kernels.__all__ if n != "set_index_checks" and not re.search(rf"\b{n}\(", shown)] == []


def test_the_example_runs_under_torchrun(tmp_path: Path) -> None:
    (example,) = re.findall(r"```py\n(.*?)```", (ROOT / "kernels" / "README.md").read_text(), re.S)
    (tmp_path / "tensor_parallel.py").write_text(example)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "tensor_parallel.py"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
