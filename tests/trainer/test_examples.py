"""docs/python.md: its examples are the files of examples/, and they run. So does the one of README."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from .conftest import records

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text()
NAMES = ("own_rows", "own_engine", "stop_early")


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_and_is_on_the_page(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "examples" / f"{name}.py"
    assert f"```python\n{path.read_text()}```\n" in PAGE
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(path), run_name="__main__")
    folder = tmp_path / "runs" / name
    assert json.loads((folder / "summary.json").read_text()) == found["summary"]
    printed = capsys.readouterr().out
    if name == "own_rows":
        samples = [json.loads(x) for x in (folder / "samples" / "rl-000002.jsonl").read_text().splitlines()]
        checks = {row["question"]: row["checks"] for row in found["rows"]}
        for row in samples:
            assert row["reward"] == sum(check in row["completion"] for check in checks[row["question"]]) / 2
        assert (tmp_path / "runs" / "own_rows_model" / "model.safetensors").is_file()
    if name == "own_engine":
        assert "trainer and sampler agree" in printed
        assert f"weights 1 to {found['engine'].version}" in printed
    if name == "stop_early":
        (event,) = records(folder, "guard")
        steps = [r for r in records(folder, "train") if r["stage"] == "rl"]
        assert event["cause"] == "the token budget is spent"
        sampled = [r["completion_tokens"] for r in steps]
        assert sum(sampled) >= 200 > sum(sampled[:-1])
        assert f"whole on disk: {Path('runs') / name / 'checkpoints' / f'rl-{len(steps):06d}'}" in printed


def test_the_snippet_of_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(snippet, "README.md", "exec"), found)
    assert json.loads((tmp_path / "runs" / "mine" / "summary.json").read_text()) == found["summary"]
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_the_page_is_narrow_and_names_what_there_is() -> None:
    from carft_fast.trainer import EVENTS

    assert max(map(len, PAGE.splitlines())) <= 100
    assert set(re.findall(r"^\| `(on_\w+)", PAGE, re.MULTILINE)) == set(EVENTS)
