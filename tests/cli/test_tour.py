"""docs/tour.md: its files are written and its commands run, in its order."""

import json
import re
import shlex
from pathlib import Path

import pytest
import transformers

from carft_fast.cli import app

from ..conftest import TINY_RUN, as_set_options

TOUR = Path(__file__).resolve().parents[2] / "docs" / "tour.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`(\w[\w/]*\.(?:csv|toml|py|jinja))`")


def test_every_command_of_the_tour_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # a command has its working folder there for reward.fn
    tour, said, end = TOUR.read_text(encoding="utf-8"), dict[str, str](), 0
    for block in BLOCK.finditer(tour):
        kind, text = block.groups()
        if kind != "sh":
            path = Path(FILE.findall(tour[end : block.start()])[-1])  # the last one named before the block
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        else:
            for line in text.replace("\\\n", "").splitlines():
                *variables, program = shlex.split(line[: line.index("carft-fast") + len("carft-fast")])
                assert program == "carft-fast", line
                for variable in variables:
                    monkeypatch.setenv(*variable.split("="))
                words = shlex.split(line)[len(variables) + 1 :]
                smaller = as_set_options(TINY_RUN) if words[0] == "quickstart" else []
                app([*words, *smaller], standalone_mode=False)
                said[line] = capsys.readouterr().out
        end = block.end()
    named = {line.partition("carft-fast ")[2].split()[0] for line in said}
    shown = "\n".join(said.values())
    assert named == {"quickstart", "report", "data", "sft", "rl", "eval", "export", "compare"}
    assert re.search(r"train.csv\W.* 4 of 4 rows used", shown)
    assert "So \\boxed{7}." in shown
    assert (tmp_path / "runs" / "rl" / "checkpoints" / "rl-000004").is_dir()
    assert "pass@4" in shown
    finished = {path.parent.name for path in tmp_path.glob("runs/*/summary.json")}
    assert finished == {"first", "sft", "rl", "short", "lora"}
    samples = (tmp_path / "runs" / "short" / "samples" / "rl-000002.jsonl").read_text().splitlines()
    for row in map(json.loads, samples):
        rewards = row["rewards"]
        assert rewards["score"] == (len(row["completion"]) <= 60)
        assert row["reward"] == pytest.approx(rewards["answer"] + 0.2 * rewards["score"])
    assert list(tmp_path.glob("runs/short/wandb/**/*.wandb"))
    assert (tmp_path / "runs" / "lora" / "model" / "adapter" / "adapter_config.json").is_file()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert (tmp_path / "runs" / "compare" / "compare.html").is_file()
