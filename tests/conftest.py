"""Shared fixtures: the reference material beside the repository, and a run small enough for a test."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# index ranges are checked on every device, a GPU's too
os.environ.setdefault("CARFT_KERNELS_CHECK_INDICES", "1")
# for the processes that tests start: those of a vLLM server are forks of its first
FORKS = str(Path(__file__).parent / "forks")
if FORKS not in sys.path:
    sys.path.append(FORKS)
    os.environ["PYTHONPATH"] = os.pathsep.join([FORKS, *filter(None, [os.environ.get("PYTHONPATH")])])
# Triton reads this when it is imported, which nothing above does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN = SHARED / "golden" / "visible"

# The quickstart's task and model, cut to seconds: every phase runs, with more than one mini- and micro-batch.
TINY_RUN = [
    "sft.max_steps=6",
    "sft.batch_size=16",
    "sft.micro_batch_tokens=400",
    "sft.warmup_steps=2",
    "sft.save_every=2",
    "rl.max_steps=4",
    "rl.batch_size=12",
    "rl.mini_batch_size=8",
    "rl.micro_batch_tokens=200",
    "rl.eval_every=2",
    "rl.save_every=1",
    "rollout.max_new_tokens=24",
    "data.train_rows=300",
    "data.eval_rows=20",
]
DRAWING = ("reports", "compare", "cli", "benchmarks", "page")
"""Folders of tests that look at what is drawn; single files of other folders are marked."""


def as_set_options(overrides: list[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def leave_out_drawing(patch: pytest.MonkeyPatch) -> None:
    """Figures are made and saved without their contents, which would be 40% of a tiny run."""

    def savefig(_figure: object, file: Any, **_options: object) -> None:
        if isinstance(file, str | os.PathLike):
            Path(file).write_bytes(b"")
        else:
            file.write('<svg width="1pt" height="1pt"></svg>')

    if find_spec("matplotlib"):  # the operators' tests run without it, too
        patch.setattr("matplotlib.figure.Figure.savefig", savefig)


@pytest.fixture(scope="module", autouse=True)
def drawing(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name not in DRAWING and not request.node.get_closest_marker("draws"):
            leave_out_drawing(patch)
        yield


@pytest.fixture(scope="session")
def tiny_run() -> list[str]:
    """--set options of a tiny quickstart."""
    return as_set_options(TINY_RUN)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The model folder, fetched and converted on first use."""
    root = Path(__file__).resolve().parents[1]
    folder = root / "models" / "smollm2"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.parent / ".smollm2.lock"):  # tests run in several processes
        subprocess.run([sys.executable, str(root / "scripts" / "fetch_smollm2.py"), str(folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake CUDA device of tests/gpu_path, compiled once."""
    from tests.gpu_path.test_gpu_path import compiled

    return compiled(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """A file of ../shared/data."""

    def find(name: str) -> Path:
        path = SHARED / "data" / name
        if not path.parent.is_dir():
            pytest.skip(f"reference data folder {path.parent} does not exist")
        return path

    return find


class Golden:
    """One topic: `cases()` yields (name, parameters, arrays)."""

    def __init__(self, topic: str) -> None:
        self._arrays = load_file(GOLDEN / f"{topic}.safetensors")
        self._cases = json.loads((GOLDEN / "manifest.json").read_text())["topics"][topic]["cases"]

    def cases(self, prefix: str = "") -> Iterator[tuple[str, dict[str, Any], dict[str, Tensor]]]:
        for name, case in self._cases.items():
            if name.startswith(prefix):
                arrays = {key: self._arrays[f"{name}/{key}"] for key in case["arrays"]}
                yield name, case["params"], arrays


@pytest.fixture(scope="session")
def golden() -> type[Golden]:
    """Inputs, outputs and gradients of the published code."""
    if not GOLDEN.is_dir():
        pytest.skip(f"reference vectors {GOLDEN} do not exist")
    return Golden


def assert_golden(actual: Tensor, expected: Tensor, *, loose: bool = False, name: str = "") -> None:
    """The tolerances of the manifest; `loose` is its float32 rule for gradients and low-temperature similarities."""
    if expected.dtype == torch.float64:
        rtol, atol = 1e-9, 1e-11
    else:
        rtol, atol = (1e-4 if loose else 1e-5), 1e-6
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")
