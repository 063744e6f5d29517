"""One grader for every kind of reward, against answers worked out by hand; the guide's own tables and example."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from carft_fast.config.sections import RewardConfig
from carft_fast.core.errors import InputError, RewardError
from carft_fast.core.example import Example
from carft_fast.data.prompts import EncodedExample, PromptFormat
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.rewards import grader as grading
from carft_fast.rewards.answers import Grade, extract_answer
from carft_fast.rewards.grader import Grader
from carft_fast.rollout.base import Rollout
from carft_fast.training.evaluation import grade_rollouts, majority

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
LEAD = "so.\nTherefore, the answer is: "


def graded(completions: Sequence[str], answers: Sequence[str], **config: Any) -> list[Grade]:
    examples = [Example(f"r{i}", "q", "", answer) for i, answer in enumerate(answers)]
    with Grader(RewardConfig(**config)) as grader:
        return grader.grade(completions, examples)


def test_every_row_of_the_guide() -> None:
    rows = re.findall(r"^\| (numeric|choice|latex) \| `(.+)` \| (.+) \|$", GUIDE, re.MULTILINE)
    assert len(rows) > 20
    for answer_type, text, read in rows:
        found = extract_answer(LEAD + text, answer_type=answer_type)
        expected = None if read == "nothing" else float(read) if answer_type == "numeric" else read
        assert found == expected, text


def test_the_function_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    grades = graded(
        ["it is 5", "no", "x" * 200 + " 5"], ["5", "7", "5"], fn="my_rewards:short_and_right", partial="constant"
    )
    assert [(g.score, g.correct, g.extractable) for g in grades] == [
        (1.0, True, True),
        (0.0, False, False),
        (0.5, False, True),
    ]


@pytest.mark.parametrize(("correct_score", "correct"), [(0.5, [False, True, True]), (2.0, [False, False, False])])
def test_a_functions_score_is_correct_from_correct_score_on(correct_score: float, correct: list[bool]) -> None:
    grades = graded(["a", "b", "c"], ["1"] * 3, fn=fn([0.4, 0.5, 1.5]), partial="constant", correct_score=correct_score)
    assert [g.correct for g in grades] == correct
    assert [g.score for g in grades] == [0.4, 0.5, 1.5], "taken as they are"


def test_latex_survives_what_never_ends() -> None:
    """The second does not end; the third is graded after a restart."""
    answers = [r"\frac{1}{2}", "9^{9^{9^9}}", "x^2+2x+1", "I do not know", "7"]
    grades = graded(
        [f"so \\boxed{{{answer}}}" for answer in answers],
        ["0.5", "7", "(x+1)^2", "3", "8"],
        answer_type="latex",
        latex_cpu_s=1.0,
    )
    assert [g.correct for g in grades] == [True, False, True, False, False]
    assert [g.extractable for g in grades] == [True, False, True, False, True]


def test_a_programs_time_follows_its_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that may compute for long is not ended before."""
    monkeypatch.setattr(grading, "_PROGRAM_SECONDS", 0.2)
    program = "def solution():\n    for i in range(2 * 10**7):\n        pass\n    return i + 1"
    assert graded([program], [str(2 * 10**7)], answer_type="program", program_cpu_s=30.0)[0].correct


def test_programs() -> None:
    def returning(value: str) -> str:
        return f"def solution():\n    return {value}"

    programs = [returning("2 + 3"), f"```python\n{returning('6')}\n```", returning("'5'"), returning("True")]
    programs += [returning("None"), returning("1 / 0"), "no program", ""]
    grades = graded(programs, ["5"] * 8, answer_type="program")
    assert [g.correct for g in grades] == [True, False, True, False, False, False, False, False]
    assert [g.extracted for g in grades] == [5.0, 6.0, 5.0, None, None, None, None, None]


def test_numbers_of_programs_are_exact() -> None:
    """Beyond what a double holds, and at the tolerance's border; the value itself stays a float."""
    cases = [
        ("2**70 + 1", str(2**70 + 1), True),
        ("2**70 + 1", str(2**70), False),
        ("Fraction(2**70 + 1, 3) * 3", str(2**70 + 1), True),
        ("Decimal('18014398509481985.5')", "18014398509481985.5", True),
        ("Decimal('18014398509481985.5')", "18014398509481985", False),
        ("Fraction(1, 3)", "1/3", True),
        ("7.01", "7", True),
        ("'7 apples'", "7.01", True),
        ("'7 or 8'", "7", False),
        ("-(2**70)", str(-(2**70)), True),
    ]
    lead = "from __future__ import annotations\nfrom fractions import Fraction\nfrom decimal import Decimal\n\n"
    programs = [f"{lead}def solution() -> Undefined:\n    return {value}" for value, _, _ in cases]
    grades = graded(programs, [target for _, target, _ in cases], answer_type="program")
    assert [grade.correct for grade in grades] == [right for _, _, right in cases]
    assert all(grade.extracted is None or isinstance(grade.extracted, float) for grade in grades)


def test_a_majority_is_counted_by_the_graders_equality() -> None:
    """Three ways to write a quarter outvote two fives; as text they would not."""
    samples = [r"\frac{3}{12}", "8", "0.25", "8", r"\frac14", None]
    with Grader(RewardConfig(answer_type="latex")) as grader:
        assert majority(samples, 0.01, grader.same) == 0
        assert majority([*samples, "8.0"], 0.01, grader.same) == 0, "the first to reach its number"
        assert majority([*samples, "8.0", r"\sqrt{64}"], 0.01, grader.same) == 1
        assert not grader.same("unread able text", "8", 0.01)
    assert majority(samples, 0.01) == 1
    with Grader(RewardConfig()) as grader:
        assert majority([1.0, 2.0, 2.009], 0.01, grader.same) == 1


def fn(result: Any) -> str:
    module = type(sys)("rewards_under_test")
    module.f = lambda completions, examples: result  # type: ignore[attr-defined]
    module.constant = 5  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    return "rewards_under_test:f"


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "returned 1 scores for 2 completions"),
        ([1.0, float("nan")], r"score 1 \(item r1\) is nan"),
        ([float("inf"), 0], r"score 0 \(item r0\) is inf"),
        ([0.0, None], r"score 1 \(item r1\) is None"),
        (["a", 0.0], r"score 0 \(item r0\) is 'a'"),
        (None, "returned NoneType"),
        ("12", "returned str"),
    ],
)
def test_what_a_function_may_not_return(result: Any, message: str) -> None:
    with pytest.raises(RewardError, match=rf'reward.fn = "rewards_under_test:f".*{message}'):
        graded(["a", "b"], ["1", "2"], fn=fn(result), partial="constant")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_here:f", "no module no_such_module_here"),
        ("carft_fast.nothing:f", "no module carft_fast.nothing"),
        ("rewards_under_test:g", "has no g"),
        ("rewards_under_test:constant", "constant is int, not a function"),
        ("rewards_under_test", 'expected "package.module:function"'),
    ],
)
def test_functions_that_cannot_be_imported(name: str, message: str) -> None:
    fn(None)
    with pytest.raises(InputError, match=message):
        Grader(RewardConfig(fn=name, partial="constant"))


def test_what_is_thought_is_left_out_on_request() -> None:
    texts = ["<think>4</think>Therefore, the answer is: 5", "Therefore, the answer is: 5\n<think>", "5"]
    for ignore, extracted in ((True, [5.0, None, 5.0]), (False, [5.0, 5.0, 5.0])):
        assert [g.extracted for g in graded(texts, ["5"] * 3, ignore_think=ignore)] == extracted
    boxed = ["<think>\\boxed{1}</think> so \\boxed{x+1}"]
    assert graded(boxed, ["1+x"], answer_type="latex", ignore_think=True)[0].correct


def test_a_function_is_given_what_was_thought() -> None:
    with pytest.raises(ValueError, match=r'ignore_think = true needs fn = "" or a list with "answer", this is "a:b"'):
        RewardConfig(fn="a:b", partial="constant", ignore_think=True)


def test_a_prompt_may_begin_to_think() -> None:
    """As a chat template can: what comes before </think> is thinking, and without one there is no answer."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    prompt_format = PromptFormat(tokenizer, "carft")
    begun, plain = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("7 + 2\n<think>\n", "7 + 2\n"))
    completions = ["9", "5</think>9"]
    rollouts = [Rollout(tokenizer(t, add_special_tokens=False)["input_ids"], [], "stop", 0) for t in completions * 2]
    rows = [EncodedExample(Example("r", "q", "", "9"), ids, ()) for ids in (begun, begun, plain, plain)]
    with Grader(RewardConfig(ignore_think=True)) as grader:
        texts, grades = grade_rollouts(rollouts, rows, prompt_format, grader)
    assert texts == completions * 2, "samples show what was written"
    assert [g.extracted for g in grades] == [None, 9.0, 9.0, 9.0]
