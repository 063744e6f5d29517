"""One tiny quickstart through the command line, which runs through `Trainer` are compared with."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from carft_fast.cli import app

Records = list[dict[str, Any]]


def records(folder: Path, kind: str = "") -> Records:
    """The metrics without their wall-clock seconds and their shares."""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in r.items() if k not in ("seconds", "shares")} for r in found if kind in ("", r["kind"])]


def digests(folder: Path) -> dict[str, str]:
    names = [f"{model}/{name}.safetensors" for model in ("sft", "model") for name in ("model", "carft_heads")]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


@pytest.fixture(scope="session")
def by_command(tmp_path_factory: pytest.TempPathFactory, tiny_run: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("command") / "run"
    outcome = CliRunner().invoke(app, ["quickstart", *tiny_run, "--output-dir", str(folder)])
    assert outcome.exit_code == 0, outcome.output
    return folder
