"""What holds for the package as a whole: no file of it unpickles, evaluates or reads the clock, and nothing reports."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import carft_fast
from carft_fast.rewards import programs

PACKAGE = Path(carft_fast.__file__).parent
ROOT = PACKAGE.parent


def forbidden(tree: ast.AST) -> Iterator[str]:
    """Calls and imports that load or run what somebody else wrote."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (m for m in modules if m.split(".")[0] in ("pickle", "cPickle", "dill", "joblib", "yaml"))
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("torch.load", "eval", "exec", "os.system", "os.popen"):
                yield f"{name}, line {node.lineno}"
            for keyword in node.keywords:
                if keyword.arg in ("shell", "trust_remote_code") and ast.unparse(keyword.value) == "True":
                    yield f"{keyword.arg}=True, line {node.lineno}"


def test_the_search_finds_what_it_is_for() -> None:
    code = (
        "import pickle\nfrom yaml import load\ntorch.load(p)\neval(t)\nf(trust_remote_code=True)\n"
        "run('ls', shell=True)\nmodel.eval()\nf(trust_remote_code=config.trust_remote_code)\n"
    )
    assert len(list(forbidden(ast.parse(code)))) == 6


def test_the_packages_neither_unpickle_nor_evaluate() -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels" / "carft_kernels").rglob("*.py")]
    assert len(files) > 50
    found = {path.name: list(forbidden(ast.parse(path.read_text()))) for path in files}
    # the sandbox runs a model's program: in a process that can do nothing (docs/sandbox.md)
    allowed = {name: calls for name, calls in found.items() if calls}
    assert set(allowed) <= {"sandbox_server.py"}, allowed
    assert all(call.startswith("exec,") for calls in allowed.values() for call in calls), allowed


def test_nothing_reads_the_wall_clock_but_the_stamps_of_log_lines() -> None:
    package = Path(carft_fast.__file__).parent
    found = {
        (path.name, match)
        for path in package.rglob("*.py")
        for match in re.findall(r"time\.time\w*\(|datetime\.\w+\(|st_[amc]time|time\.strftime\(", path.read_text())
    }
    assert found == {("console.py", "time.strftime("), ("library_log.py", "time.strftime(")}


def python_commands(tree: ast.AST) -> Iterator[str]:
    """The lists that start a Python: [sys.executable, ...]."""
    for node in ast.walk(tree):
        if isinstance(node, ast.List) and node.elts and ast.unparse(node.elts[0]) == "sys.executable":
            yield ast.unparse(node)


def test_no_process_imports_from_the_working_folder() -> None:
    commands = [command for path in PACKAGE.rglob("*.py") for command in python_commands(ast.parse(path.read_text()))]
    assert len(commands) >= 5
    safe = ("[sys.executable, '-P', '-m', ", "[sys.executable, *_INTERPRETER_OPTIONS, ")
    assert [command for command in commands if not command.startswith(safe)] == []
    assert "-P" in programs._INTERPRETER_OPTIONS
    mentions = sum(path.read_text().count("sys.executable") for path in PACKAGE.rglob("*.py"))
    assert mentions == len(commands)  # none in another form


def locked(*files: str) -> dict[str, set[str]]:
    """Package -> versions, of requirements/; each with at least one hash."""
    found: dict[str, set[str]] = {}
    for file in files:
        text = (ROOT / "requirements" / f"{file}.txt").read_text()
        entries = re.findall(
            r"^([a-z0-9-]+)==([^ ]+)(?: ; .+)? \\\n((?:    --hash=sha256:[0-9a-f]{64}.*\n)+)", text, re.M
        )
        assert len(entries) == len(re.findall(r"^[^ #\n]", text, re.M))
        for name, version, _ in entries:
            found.setdefault(name, set()).add(version)
    return found


def test_every_package_is_installed_by_a_hash_and_in_the_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for torch in ("torch-cpu", "torch-cuda"):
        found = locked("build", torch, "dev", "sampler", "torchao")
        for line in (ROOT / "constraints.txt").read_text().splitlines():
            if not line.startswith("#"):
                pin = Requirement(line)
                assert all(v in pin.specifier for v in found[canonicalize_name(pin.name)]), line
        direct = [*project["dependencies"], *extras["train"], *extras["deepspeed"], *extras["dev"], *extras["vllm-cpu"]]
        needed = {canonicalize_name(Requirement(text).name) for text in direct} - {"carft-fast"}
        assert needed <= set(found)
        assert not set(found) & {"torchvision", "torchaudio", "torchcodec"}
    assert {name for name in locked("torch-cpu") if name.startswith("nvidia")} == set()
    assert {"mkdocs-material", "mkdocstrings-python"} <= set(locked("docs"))


def test_setup_installs_nothing_without_its_hash_but_the_project() -> None:
    for target in (".venv/ready", ".venv/sampler"):
        command = ["make", "--always-make", "--dry-run", target]
        recipe = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        installs = re.findall(r"pip install[^\n|;]*", recipe)
        assert len(installs) >= 5
        bare = [line for line in installs if "--require-hashes" not in line]
        assert [line.split()[-2:] for line in bare] == [["-e", "."]]
        assert all("--no-deps --no-build-isolation" in line for line in installs)
    command = ["make", "--always-make", "--dry-run", "build/docs/ready"]
    recipe = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"pip install.*(--require-hashes.*)", recipe) == ["--require-hashes -r requirements/docs.txt"]


def test_the_wheel_has_every_file_and_asks_for_torch_and_triton_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"  # setuptools leaves a folder of its own where it builds
    for folder in ("carft_fast", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("carft_fast-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith("METADATA"))
    folders = {"carft_fast": ROOT, "carft_kernels": ROOT / "kernels"}
    files = {p.relative_to(root) for top, root in folders.items() for p in (root / top).rglob("*") if p.is_file()}
    assert names == {str(file) for file in files if "__pycache__" not in file.parts}
    required = [Requirement(text) for text in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)]
    assert {r.name for r in required if r.marker is None} == {"torch", "triton"}
    code = "import sys, carft_kernels as ck; print(ck.__file__); print(*sys.modules)"
    clean = {**os.environ, "PYTHONPATH": str(wheel)}
    found = subprocess.run(
        [sys.executable, "-c", code], env=clean, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    origin, modules = found.stdout.splitlines()
    assert origin.startswith(str(wheel))
    assert not {"carft_fast", "transformers", "pydantic", "safetensors"} & set(modules.split())


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [version]
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"| carft_fast {version} |" in (ROOT / "README.md").read_text()


NAMES = ["HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "VLLM_NO_USAGE_STATS"]


def environment_of_a_trainer(**given: str) -> dict[str, str]:
    code = (
        "import carft_fast, json, os, huggingface_hub.constants as c\n"
        "print(json.dumps(dict(os.environ) | {'telemetry': str(not c.HF_HUB_DISABLE_TELEMETRY)}))"
    )
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    result = subprocess.run(
        [sys.executable, "-c", code], env=clean | given, capture_output=True, text=True, check=True, cwd=ROOT
    )
    return json.loads(result.stdout)


def test_no_library_reports_from_the_trainer() -> None:
    environment = environment_of_a_trainer()
    assert [environment[name] for name in NAMES] == ["1"] * 4
    assert environment["telemetry"] == "False"


def test_what_the_user_set_stays() -> None:
    given = {"HF_HUB_DISABLE_TELEMETRY": "0", "DO_NOT_TRACK": "0", "DISABLE_TELEMETRY": "0", "VLLM_NO_USAGE_STATS": "0"}
    environment = environment_of_a_trainer(**given)
    assert {name: environment[name] for name in given} == given
    assert environment["telemetry"] == "True"
