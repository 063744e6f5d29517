"""Completions to grades, for every kind of reward: the processes and the user's function around answers.py."""

import importlib
import math
import numbers
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from carft_fast.config import ANSWER, ANSWER_PHRASE, RewardConfig
from carft_fast.core import Example, InputError, RewardError
from carft_fast.rewards.answers import (
    Answer,
    Grade,
    compare,
    extract_answer,
    grade,
    outside_think,
    parse_target,
    same_answer,
)
from carft_fast.rewards.latex import LatexChecker
from carft_fast.rewards.numerals import LONGEST, read_number
from carft_fast.rewards.programs import ProgramPool

RewardFunction = Callable[[list[str], list[Example]], Sequence[float]]
_PROGRAM_SECONDS = 10.0
"""What a program may take at least that waits, or whose machine is busy."""


class Grader(AbstractContextManager["Grader"]):
    """Grades completions as `reward` says; a run has one. Processes start when they are first needed.

    `function` is called in place of `reward.fn`. Answers are those of `answer_phrase` (data.answer_phrase). Raises
    InputError at once for a `reward.fn` that cannot be imported, and a phrase whose answers could not be read.
    """

    def __init__(
        self, config: RewardConfig, function: RewardFunction | None = None, answer_phrase: str = ANSWER_PHRASE
    ) -> None:
        self._config = config
        self._phrase = answer_phrase
        self._function = function or (load_function(config.fn) if config.fn else None)
        self._latex = LatexChecker(config.latex_cpu_s)
        self._programs: ProgramPool | None = None
        if self._function is None:
            self._check_phrase()

    def _check_phrase(self) -> None:
        kind = self._config.answer_type
        probes = {"numeric": "72", "choice": "c", "latex": "\\frac{1}{2}"}
        if not self._phrase or kind not in probes:
            return
        text = "So.\n" + self._phrase.replace(ANSWER, probes[kind])
        if extract_answer(text, answer_type=kind, phrase=self._phrase) != parse_target(probes[kind], answer_type=kind):
            raise InputError(
                f"data.answer_phrase = {self._phrase!r}: the answer of {text!r} cannot be read; allowed: words before "
                f"{ANSWER}, such as {ANSWER_PHRASE!r}, or a box, '\\boxed{{{ANSWER}}}'"
            )

    @property
    def ignores_think(self) -> bool:
        return self._config.ignore_think

    def grade(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Grade]:
        """One grade for each completion. Raises RewardError for a user function that does not return scores.

        Several processes are given the same and share the work; a `reward.fn` sees a process's share.
        """
        from carft_fast.core import each_rank, own_share  # they load torch

        own = own_share(len(completions))
        shares = each_rank(lambda: self.grade_alone(completions[own], examples[own]))
        return [grade for share in shares for grade in share]

    def grade_alone(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Grade]:
        """`grade` in this process, whatever others do."""
        rule = self._config
        if self._function is not None:
            found = self._function(list(completions), list(examples))
            scores = check_scores(found, len(completions), rule.fn, examples)
            return [Grade(score >= rule.correct_score, None, score) for score in scores]
        if rule.ignore_think:
            completions = [outside_think(text) for text in completions]
        pairs = list(zip(completions, (example.answer for example in examples), strict=True))
        if rule.answer_type == "latex":
            return self._grade_latex(pairs)
        if rule.answer_type == "program":
            return self._grade_programs(pairs)
        options: Any = {"answer_type": rule.answer_type, "tolerance": rule.tolerance, "phrase": self._phrase}
        return [grade(text, answer, **options) for text, answer in pairs]

    def _grade_latex(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        grades = []
        for text, answer in pairs:
            found = extract_answer(text, answer_type="latex", phrase=self._phrase)
            if found is None:
                grades.append(Grade(False, None))
                continue
            verdict = self._latex.compare(str(found), str(parse_target(answer, answer_type="latex")))
            grades.append(Grade(verdict == "same", None if verdict == "unreadable" else found))
        return grades

    def _grade_programs(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        rule = self._config
        if self._programs is None:
            self._programs = ProgramPool(
                rule.program_workers,
                cpu_seconds=rule.program_cpu_s,
                wall_seconds=max(_PROGRAM_SECONDS, 2 * rule.program_cpu_s),
                memory_mb=rule.program_memory_mb,
            )
        programs = [extract_answer(text, answer_type="program") for text, _ in pairs]
        outcomes = iter(self._programs.run([str(program) for program in programs if program is not None]))
        found = [None if program is None else _as_number(next(outcomes).value) for program in programs]
        return [
            compare(value, answer, answer_type="program", tolerance=rule.tolerance)
            for value, (_, answer) in zip(found, pairs, strict=True)
        ]

    def same(self, a: Answer | None, b: Answer | None, tolerance: float) -> bool:
        """Whether two extracted answers are one, by the rule that grades: LaTeX is compared as mathematics."""
        if self._config.answer_type == "latex" and self._function is None and isinstance(a, str) and isinstance(b, str):
            return a == b or self._latex.compare(a, b) == "same"
        return same_answer(a, b, tolerance)

    def close(self) -> None:
        """End the processes; the next `grade` would start them again."""
        self._latex.close()
        if self._programs is not None:
            self._programs.close()
            self._programs = None

    def __exit__(self, *error: object) -> None:
        self.close()


def _as_number(value: float | str | bool | None) -> float | None:
    """What a program returned; text counts if it is a number, True and False do not."""
    if isinstance(value, str):
        return read_number(value) if len(value) <= LONGEST else None
    return None if isinstance(value, bool) else value


def load_function(name: str) -> RewardFunction:
    """Import "pkg.mod:fn"; the working folder counts as a place for modules. Raises InputError."""
    module_name, separator, attribute = name.partition(":")
    if not (separator and module_name and attribute):
        raise InputError(f'reward.fn = "{name}": expected "package.module:function"')
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise InputError(
                f'reward.fn = "{name}": there is no module {error.name} (looked in the working folder and sys.path)'
            ) from None
        raise InputError(f'reward.fn = "{name}": importing {module_name} failed: {error}') from error
    except Exception as error:  # whatever a user's module does when imported
        raise InputError(f'reward.fn = "{name}": importing {module_name} failed: {error!r}') from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(f'reward.fn = "{name}": {module_name} has no {attribute}')
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f'reward.fn = "{name}": {attribute} is {type(found).__name__}, not a function')
    return found


def check_scores(scores: Any, expected: int, name: str, examples: Sequence[Example]) -> list[float]:
    """The scores as floats. Raises RewardError naming function, row and value."""
    if hasattr(scores, "tolist"):
        scores = scores.tolist()  # numpy and torch
    if not isinstance(scores, Sequence) or isinstance(scores, str):
        raise RewardError(f'reward.fn = "{name}" returned {type(scores).__name__}, not a list of scores')
    if len(scores) != expected:
        raise RewardError(f'reward.fn = "{name}" returned {len(scores)} scores for {expected} completions')
    checked = []
    for row, (score, example) in enumerate(zip(scores, examples, strict=True)):
        if not isinstance(score, numbers.Real) or not math.isfinite(score):
            raise RewardError(
                f'reward.fn = "{name}": score {row} (item {example.item_id}) is {score!r}, not a finite number'
            )
        checked.append(float(score))
    return checked
