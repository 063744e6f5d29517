"""What the front door refuses, in one sentence; what importing it loads; what a notebook sees."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

import carft_fast
from carft_fast import InputError, Trainer, load_config
from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config import load_config as load_from_texts
from carft_fast.core.console import Console

ROOT = Path(__file__).resolve().parents[2]


class NoMethod:
    def on_stop(self) -> None: ...


class NoSync:
    version = 0

    def generate(self) -> None: ...


def score(completions: list[str], examples: list[Any]) -> list[float]:
    return [0.0 for _ in completions]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no config": ({"config": "run.toml"}, "config is a str: expected what load_config returns"),
    "rows of no kind": ({"train": 5}, "train is a int: expected a path or Hub id, a list of dicts or of Examples"),
    "a mapping of splits": ({"eval": {"test": []}}, "eval is a dict: expected a path"),
    "no function": ({"reward": "mod:fn"}, "reward is a str: expected a function"),
    "half an engine": ({"engine": NoSync()}, "is no RolloutEngine: it has no sync, close"),
    "no path": ({"output_dir": 5}, "output_dir = 5: expected a path"),
    "an empty path": ({"output_dir": ""}, "output_dir = '': expected a path"),
    "one callback": ({"callbacks": NoMethod()}, "callbacks is a NoMethod: expected a list"),
    "a callback for nothing": (
        {"callbacks": [NoMethod()]},
        "has none of the methods on_step, on_evaluate, on_checkpoint, on_end",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments(case: str) -> None:
    arguments, message = REFUSED[case]
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        Trainer(**{"config": load_config(), **arguments})
    assert len(str(refused.value).splitlines()) == 1


def test_an_own_reward_is_taken_as_it_is_whatever_the_method() -> None:
    config = load_config(method="carft")
    assert config.reward.partial == "embedding"
    reward = Trainer(config, reward=score).config.reward
    assert (reward.fn.rpartition(".")[2], reward.partial) == ("test_door:score", "constant")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": 5}, "path = 5: expected a path"),
        ({"overrides": 5}, "overrides = 5: expected a dict"),
        ({"overrides": [5]}, "overrides = [5]: expected a dict"),
        ({"overrides": "rl.lr=1"}, "overrides = 'rl.lr=1': expected a dict"),
    ],
)
def test_wrong_arguments_of_load_config(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_config(**arguments)


def test_wrong_stages_and_reasons(tmp_path: Path) -> None:
    trainer = Trainer(load_config(QUICKSTART_CONFIG), output_dir=tmp_path / "run")
    for stages in ((), ("rl", "sft"), "ppo", None, 5):
        with pytest.raises(InputError, match=r"allowed are \('sft',\), \('rl',\), \('sft', 'rl'\)"):
            trainer.train(stages)
    with pytest.raises(InputError, match="no training is under way"):
        trainer.stop("now")
    empty = Trainer(load_config(QUICKSTART_CONFIG), train=[], eval=[{"question": "1 + 1?", "answer": 2}])
    with pytest.raises(InputError, match="the rows given as train: no rows"):
        empty.plan()
    alone = Trainer(load_config(QUICKSTART_CONFIG), eval=[{"question": "1 + 1?", "answer": 2}])
    with pytest.raises(InputError, match=r"data\.train is not set"):
        alone.plan()


def test_overrides_are_texts_or_values() -> None:
    values = {"rl.lr": 1e-3, "rl.max_steps": None, "model.path": Path("a") / "b", "data.fields": {"cot": "why"}}
    texts = ["rl.lr=1e-3", "model.path=a/b", 'data.fields={cot="why"}']
    for method in (None, "grpo"):
        assert load_config(method=method, overrides=values) == load_config(method=method, overrides=texts)
    assert load_config(overrides=texts) == load_from_texts(None, texts)
    for wrong, message in (
        ({"rl.learning_rate": 1}, "rl.learning_rate: unknown key"),
        ({"seed": 1, "seed.x": 2}, "seed.x: seed is a value"),
        ({"rl.lr": "high"}, 'rl.lr = "high"'),
        ("rl.lr=1", "expected a dict"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            load_config(overrides=wrong)


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_front_door_loads_no_torch() -> None:
    code = """
import sys
from carft_fast import Example, InputError, Trainer, load_config
def score(completions, examples): ...
config = load_config(method="carft")
Trainer(config, train=[Example("1", "q", (), "2")], reward=score, callbacks=[type("C", (), {"on_step": print})()])
print(sorted({"torch", "transformers", "datasets", "matplotlib"} & set(sys.modules)))
"""
    assert python(code) == "[]"


def test_without_the_extra_the_package_imports_and_says_what_is_missing() -> None:
    code = """
import sys
sys.modules |= dict.fromkeys(("pydantic", "lazy_loader", "rich"))  # as if they were not installed
import carft_fast
try:
    carft_fast.Trainer
except ModuleNotFoundError as error:
    print(error)
"""
    assert 'is not installed: pip install ".[train]", in the checkout' in python(code)


def test_every_name_of_the_front_door_is_there() -> None:
    for name in carft_fast._ROOM_OF:
        assert getattr(carft_fast, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        carft_fast.Trainr  # noqa: B018


def test_a_notebook_without_widgets_gets_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ipywidgets.py").write_text("")
    for there in (False, True):
        if there:
            monkeypatch.syspath_prepend(str(tmp_path))
        assert Console(RichConsole(force_jupyter=True)).is_terminal is there
