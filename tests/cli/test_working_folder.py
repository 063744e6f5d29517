"""A command that is given in a folder of somebody else, such as a downloaded model, imports nothing from it."""

import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import carft_fast
from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.rewards.latex import LatexChecker

ROOT = Path(carft_fast.__file__).parents[1]
CONSOLE_SCRIPT = "from carft_fast.__main__ import main\nmain()\n"  # as pip writes it
REWARD = "import own_helper\n\ndef score(completions, examples):\n    return [own_helper.ONE] * len(completions)\n"


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A folder with a file for every module that Python or a package has. One that is imported says so in STOLEN."""
    folder = tmp_path / "model"
    folder.mkdir()
    names = {name for name in [*packages_distributions(), *sys.stdlib_module_names] if name.isidentifier()}
    assert {"carft_fast", "math_verify", "multiprocessing", "torch", "vllm"} <= names | {"carft_fast"}
    for name in sorted(names | {"carft_fast", "carft_kernels", "flash_attn", "ipywidgets"}):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'STOLEN')!r}, 'a').write({name!r} + ' ')\n")
    return folder


def stolen(folder: Path) -> str:
    found = folder / "STOLEN"
    return found.read_text() if found.exists() else ""


def run(folder: Path, launcher: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "VLLM_CACHE_ROOT": str(folder / "cache")
    }  # else an answer that is known from before counts
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *launcher, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_process_that_compares_latex(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(planted)
    checker = LatexChecker(10.0)
    try:
        assert checker.compare(r"\frac{1}{2}", "0.5") == "same"
    finally:
        checker.close()
    assert stolen(planted) == ""


@pytest.mark.long
def test_a_run_and_every_process_of_its_libraries(planted: Path, tmp_path: Path) -> None:
    """vLLM asks a process of its own about the model."""
    script = tmp_path / "carft-fast"
    script.write_text(CONSOLE_SCRIPT)
    options = ["data.eval_rows=4", "model.path=synthetic", "rollout.engine=vllm", "rollout.kv_cache_gib=0.25"]
    options += ["data.max_length=96", "eval.max_new_tokens=8"]
    words = [word for option in options for word in ("--set", option)]
    result = run(planted, [str(script)], "eval", "--config", str(QUICKSTART_CONFIG), *words)
    assert result.returncode == 0, result.stderr
    assert stolen(planted) == ""


def test_python_m(planted: Path) -> None:
    """Python itself looks there for what it needs before the first line of ours runs: packages are safe, not more."""
    for name in ("carft_fast", *sys.stdlib_module_names):
        (planted / f"{name}.py").unlink(missing_ok=True)
    result = run(planted, ["-m", "carft_fast"], "config")
    assert result.returncode == 0, result.stderr
    assert stolen(planted) == ""


def test_a_reward_of_the_working_folder_is_imported_because_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "own_reward.py").write_text(REWARD)
    (tmp_path / "own_helper.py").write_text("ONE = 1.0\n")
    words = ["data.eval_rows=4", "model.path=synthetic", "reward.fn=own_reward:score", "reward.partial=constant"]
    options = [word for option in words for word in ("--set", option)]
    result = run(tmp_path, ["-m", "carft_fast"], "eval", "--config", str(QUICKSTART_CONFIG), *options)
    assert result.returncode == 0, result.stderr
    assert "100.0%" in result.stdout
