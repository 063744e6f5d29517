"""Several reward functions with weights, and the columns of the data that reach them: sums worked out by hand."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carft_fast.config.sections import RewardConfig
from carft_fast.config.toml import load_config
from carft_fast.core.console import Console
from carft_fast.core.errors import InputError, RewardError
from carft_fast.core.example import Example
from carft_fast.rewards.answers import Grade
from carft_fast.rewards.functions import UserFunction
from carft_fast.rewards.grader import Grader
from carft_fast.trainer import Trainer
from carft_fast.training.pipeline import prepare

from ..training.runs import records, run_pipeline, tiny_config

FEW = ["sft.max_steps=1", "rl.max_steps=1", "data.eval_rows=4"]
LEAD = "so.\nTherefore, the answer is: "


def module(**functions: Callable[..., Any]) -> str:
    made = type(sys)("functions_under_test")
    for name, function in functions.items():
        setattr(made, name, function)
    sys.modules[made.__name__] = made
    return made.__name__


def graded(completions: list[str], examples: list[Example], **config: Any) -> list[Grade]:
    with Grader(RewardConfig(partial="constant", **config)) as grader:
        return grader.grade(completions, examples)


def rows(*extra: dict[str, Any]) -> list[Example]:
    return [Example(f"r{i}", "q", (), "5", columns) for i, columns in enumerate(extra)]


def test_a_list_is_a_weighted_sum_with_each_score_under_its_name() -> None:
    name = module(length=lambda texts, _: [len(t) for t in texts], x=lambda texts, _: [t.count("x") for t in texts])
    functions = [f"{name}:length", f"{name}:x"]
    first, second = graded(["axx", "a"], rows({}, {}), fn=functions, fn_weights=[0.5, -2.0])
    assert (first.score, first.correct, first.extractable) == (0.5 * 3 - 2 * 2, False, False)
    assert first.parts == {"length": 3.0, "x": 2.0}, "before the weights"
    assert (second.score, second.correct, second.extractable) == (0.5, False, True)
    assert [g.score for g in graded(["axx", "a"], rows({}, {}), fn=functions)] == [5.0, 1.0], "weights of 1"
    (alone,) = graded(["axx"], rows({}), fn=functions[0])
    assert (alone.score, alone.parts) == (3.0, None)


def test_the_answer_rule_is_one_of_the_functions() -> None:
    """What is right or can be read stays the answer's affair, whatever the sum is."""
    name = module(form=lambda texts, _: [0.25 * t.startswith("<think>") for t in texts])
    texts = [f"<think>{LEAD}5", f"{LEAD}5", f"<think>{LEAD}7", "<think>no"]
    found = graded(texts, rows({}, {}, {}, {}), fn=["answer", f"{name}:form"], fn_weights=[2.0, 1.0])
    assert [g.score for g in found] == [2.25, 2.0, 0.45, 0.25]
    assert [g.correct for g in found] == [True, True, False, False]
    assert [g.extractable for g in found] == [True, True, True, False]
    assert [g.parts for g in found][2] == {"answer": 0.1, "form": 0.25}


def test_columns_arrive_as_keyword_arguments() -> None:
    seen: dict[str, Any] = {}

    def needs(texts: list[str], examples: list[Example], tests: list[Any], *, hint: Any = "none") -> list[float]:
        seen.update(tests=tests, hint=hint)
        return [1.0] * len(texts)

    def takes_all(texts: list[str], /, examples: list[Example], **columns: Any) -> list[float]:
        seen["all"] = columns
        return [1.0] * len(texts)

    class Callee:
        def __call__(self, texts: list[str], examples: list[Example], tests: list[Any]) -> list[float]:
            seen["method"] = tests
            return [1.0] * len(texts)

    name = module(needs=needs, takes_all=takes_all, callee=Callee())
    data = rows({"tests": ["a"], "level": 3, "examples": "reserved"}, {"level": 4})
    graded(["x", "y"], data, fn=[f"{name}:needs", f"{name}:takes_all", f"{name}:callee"])
    assert seen["tests"] == seen["method"] == [["a"], None]
    assert seen["hint"] == "none", "no row has it: the function's own default"
    assert seen["all"] == {"tests": [["a"], None], "level": [3, 4]}


def test_errors_name_the_function() -> None:
    def broken(texts: list[str], examples: list[Example]) -> list[float]:
        return [1 / 0]

    name = module(fine=lambda texts, _: [0.0] * len(texts), broken=broken, short=lambda texts, _: [])
    with pytest.raises(ZeroDivisionError) as error:
        graded(["x"], rows({}), fn=[f"{name}:fine", f"{name}:broken"])
    assert error.value.__notes__ == ['It was raised in reward.fn = "functions_under_test:broken"']
    with pytest.raises(RewardError, match=r'"functions_under_test:short" returned 0 scores for 1 completions'):
        graded(["x"], rows({}), fn=[f"{name}:fine", f"{name}:short"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (['fn=["a:b"]'], 'fn = ["a:b"] needs partial = "constant"'),
        (['fn=["a:b", "a:b"]', "partial=constant"], "a function appears twice"),
        (['fn=["a:b", "a:c"]', "partial=constant", "fn_weights=[1.0]"], "1 weights; expected one for each function"),
        (["fn=a:b", "partial=constant", "fn_weights=[1.0]"], "1 weights; expected one for each function"),
        (['fn=["answer"]', "partial=constant", "partial_constant=2.0"], "partial_constant = 2 lets a wrong answer"),
    ],
)
def test_lists_that_cannot_be(options: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        load_config(None, [f"reward.{option}" for option in options])
    assert message in str(error.value)


def test_labels_are_unique() -> None:
    config = RewardConfig(fn=["a:f", "b:f", "b:g", "answer"], partial="constant")
    assert config.function_labels == ["a:f", "b:f", "g", "answer"]


def test_a_column_that_no_row_has_is_refused_before_the_model_is_loaded(tmp_path: Path, tiny_run: list[str]) -> None:
    name = module(needs=lambda texts, examples, tests: [0.0] * len(texts))
    config = tiny_config(tiny_run, *FEW, f'reward.fn=["{name}:needs"]', "reward.partial=constant")
    with pytest.raises(InputError, match=r'needs" takes the column "tests", which no row of data\.\w+ has'):
        prepare(config, tmp_path / "run", Console(), stages=("sft", "rl"))
    assert not (tmp_path / "run").exists()


async def later(completions: Any, examples: Any) -> list[float]:
    return []


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda prompts, completions, **columns: [], r"takes \(prompts, completions\): expected \(completions, exam"),
        (lambda completions, answer, **columns: [], r"takes \(completions, answer\): expected"),
        (lambda completions: [], r"takes \(completions\): expected"),
        (later, "is a coroutine function"),
    ],
)
def test_functions_of_other_trainers_are_refused(function: Any, said: str) -> None:
    """They would be given other things than their parameters say."""
    with pytest.raises(InputError, match=said):
        UserFunction("mine:f", function)
    assert UserFunction("mine:g", lambda *both: [1.0]).scores(["x"], [Example("1", "q", (), "a")]) == [1.0]


def test_a_run_records_every_function(tmp_path: Path, tiny_run: list[str]) -> None:
    name = module(long=lambda texts, _: [len(t) / 8 for t in texts])
    options = [f'reward.fn=["answer", "{name}:long"]', "reward.fn_weights=[1.0, 0.5]", "reward.partial=constant"]
    config = tiny_config(tiny_run, *FEW, *options, "output.samples_per_step=12")
    run_pipeline(tmp_path / "run", config)
    lines = (tmp_path / "run" / "samples" / "rl-000001.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [s["rewards"]["long"] for s in samples] == [len(s["completion"]) / 8 for s in samples]
    sums = [s["rewards"]["answer"] + 0.5 * s["rewards"]["long"] for s in samples]
    assert [s["reward"] for s in samples] == pytest.approx(sums, abs=1e-4)
    (record,) = records(tmp_path / "run", "rl", "train")
    mean = sum(s["rewards"]["long"] for s in samples) / len(samples)
    assert (record["reward/long"], record["reward"]) == pytest.approx((mean, sum(sums) / len(sums)), rel=1e-3)
    assert "reward/long" in (tmp_path / "run" / "report.html").read_text()


def test_functions_given_from_python() -> None:
    def first(texts: list[str], examples: list[Example]) -> list[float]:
        return [0.0] * len(texts)

    trainer = Trainer(load_config(None, ["model.path=synthetic"]), reward=[first, "answer"])
    assert trainer.config.reward.functions[1] == "answer"
    assert trainer.config.reward.function_labels[1] == "answer"
    weighed = load_config(None, ["model.path=synthetic", "reward.fn_weights=[1.0, 0.5]"])
    assert Trainer(weighed, reward=[first, "answer"]).config.reward.fn_weights == [1.0, 0.5]
    with pytest.raises(InputError, match="fn names no function"):
        Grader(weighed.reward)
    with pytest.raises(InputError, match="an entry of reward is a int"):
        Trainer(load_config(None), reward=[first, 3])  # type: ignore[list-item]
