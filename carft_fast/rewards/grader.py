"""Completions to grades, for every kind of reward: the processes and the user's function around answers.py."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from carft_fast.config import ANSWER, ANSWER_PHRASE, ANSWER_SLOT, RewardConfig
from carft_fast.core import Example, InputError
from carft_fast.rewards.answers import (
    Answer,
    Grade,
    base_score,
    compare,
    extract_answer,
    grade,
    outside_think,
    parse_target,
    same_answer,
)
from carft_fast.rewards.functions import RewardFunction, UserFunction
from carft_fast.rewards.latex import LatexChecker
from carft_fast.rewards.numerals import LONGEST, read_number
from carft_fast.rewards.programs import ProgramPool

_PROGRAM_SECONDS = 10.0
"""What a program may take at least that waits, or whose machine is busy."""


class Grader(AbstractContextManager["Grader"]):
    """Grades completions as `reward` says; a run has one. Processes start when they are first needed.

    Raises InputError at once for a `reward.fn` that cannot be imported, and a phrase whose answers could not be read.
    `given`: the functions that it names, or "answer"; they are not imported. Answers are those of `answer_phrase`
    (data.answer_phrase).
    """

    def __init__(
        self,
        config: RewardConfig,
        given: Sequence[RewardFunction | str] = (),
        answer_phrase: str = ANSWER_PHRASE,
    ) -> None:
        self._config = config
        self._phrase = answer_phrase
        names = config.functions
        if config.fn_weights and not names:  # a config may leave the functions to Python
            raise InputError(f"reward.fn_weights = {config.fn_weights}: reward.fn names no function")
        self._functions = [
            None if name == ANSWER and config.reads_answers else UserFunction(name, source)
            for name, source in zip(names, given or names, strict=True)
        ]
        self._latex = LatexChecker(config.latex_cpu_s)
        self._programs: ProgramPool | None = None
        if config.reads_answers:
            self._check_phrase()

    def _check_phrase(self) -> None:
        kind = self._config.answer_type
        probes = {"numeric": "72", "choice": "c", "latex": "\\frac{1}{2}"}
        if not self._phrase or kind not in probes:
            return
        text = "So.\n" + self._phrase.replace(ANSWER_SLOT, probes[kind])
        if extract_answer(text, answer_type=kind, phrase=self._phrase) != parse_target(probes[kind], answer_type=kind):
            raise InputError(
                f"data.answer_phrase = {self._phrase!r}: the answer of {text!r} cannot be read; allowed: words before "
                f"{ANSWER_SLOT}, such as {ANSWER_PHRASE!r}, or a box, '\\boxed{{{ANSWER_SLOT}}}'"
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
        answers = self._grade_answers(completions, examples) if rule.reads_answers else None
        if not self._functions:
            assert answers is not None
            return answers
        by_function = [
            [base_score(found, rule.partial_constant, rule.correct_score) for found in answers or ()]
            if function is None
            else function.scores(completions, examples)
            for function in self._functions
        ]
        weights = rule.fn_weights or [1.0] * len(by_function)
        labels = rule.function_labels if isinstance(rule.fn, list) else None
        grades = []
        for row, scores in enumerate(zip(*by_function, strict=True)):
            score = sum(weight * value for weight, value in zip(weights, scores, strict=True))
            parts = None if labels is None else dict(zip(labels, scores, strict=True))
            if answers is None:
                grades.append(Grade(score >= rule.correct_score, None, score, parts))
            else:
                grades.append(answers[row]._replace(score=score, parts=parts))
        return grades

    def check_columns(self, name: str, examples: Sequence[Example]) -> None:
        """Raises InputError where a function takes a column that no row of data.`name` has."""
        columns = dict.fromkeys(key for example in examples for key in example.extra)
        for function in self._functions:
            if function is not None:
                function.check_columns(name, columns)

    def _grade_answers(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Grade]:
        """By the rule of `answer_type`."""
        rule = self._config
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
        latex = self._config.answer_type == "latex" and self._config.reads_answers
        if latex and isinstance(a, str) and isinstance(b, str):
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
