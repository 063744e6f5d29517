"""Rewards that a user writes: import a function, call it with the columns that it asks for, check its scores."""

import importlib
import inspect
import math
import numbers
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from carft_fast.core import Example, InputError, RewardError

RewardFunction = Callable[..., Sequence[float]]
"""(completions: list[str], examples: list[Example], **columns: list) -> one finite score each."""


_OTHERS = ("prompts", "prompt", "answer", "answers", "solution", "ground_truth", "question", "completion")
"""Names of a first or second parameter that belong to other trainers' rewards."""


class UserFunction:
    """A function under its name in `reward.fn`.

    Parameters behind the first two are columns of the data, passed by keyword: a list with the value of each
    completion's row, None where a row has none. `**columns` takes all columns. A parameter with a default is passed
    only where a row of the batch has such a column.
    """

    def __init__(self, name: str, source: RewardFunction | str) -> None:
        """`source`: the function, or what `load_function` takes. Raises InputError."""
        self._name = name
        self._function = load_function(source) if isinstance(source, str) else source
        first, columns, self._takes_all = _parameters(self._function)
        self._check_signature([p.name for p in first])
        self._reserved = {p.name for p in first}
        self._required = [p.name for p in columns if p.default is p.empty]
        self._optional = [p.name for p in columns if p.default is not p.empty]

    def _check_signature(self, first: list[str]) -> None:
        """Other trainers call a reward with prompts first, or with columns alone: that would be bound wrongly."""
        if inspect.iscoroutinefunction(self._function):
            raise InputError(f'reward.fn = "{self._name}" is a coroutine function: expected an ordinary one')
        wrong = first and (len(first) < 2 or first[0] in _OTHERS or first[1] in _OTHERS)
        if wrong:
            raise InputError(
                f'reward.fn = "{self._name}" takes ({", ".join(first)}): expected (completions, examples), then '
                "columns of the data by name; a row's answer is examples[i].answer, its question .question"
            )

    def check_columns(self, name: str, columns: Iterable[Any]) -> None:
        """Raises InputError where the function needs a column that is not among those of data.`name`."""
        have = list(columns)
        for wanted in self._required:
            if wanted not in have:
                there = f"they have {', '.join(map(str, have))}" if have else "they have none beside the usual fields"
                raise InputError(
                    f'reward.fn = "{self._name}" takes the column "{wanted}", which no row of data.{name} has; {there}'
                )

    def scores(self, completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """One for each completion. Raises RewardError for what are no finite scores; an exception of the function gets
        a note with its name."""
        there = dict.fromkeys(key for example in examples for key in example.extra if isinstance(key, str))
        optional = [key for key in there if key not in self._reserved] if self._takes_all else self._optional
        names = dict.fromkeys([*self._required, *(key for key in optional if key in there)])
        columns = {name: [example.extra.get(name) for example in examples] for name in names}
        try:
            found = self._function(list(completions), list(examples), **columns)
        except Exception as error:
            error.add_note(f'It was raised in reward.fn = "{self._name}"')
            raise
        return check_scores(found, len(completions), self._name, examples)


def _parameters(function: Any) -> tuple[list[inspect.Parameter], list[inspect.Parameter], bool]:
    """The first two, those behind them that can be given by keyword, and whether there is a `**columns`."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some functions written in C have none
        return [], [], False
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return [], [p for p in parameters if p.kind is p.KEYWORD_ONLY], any(p.kind is p.VAR_KEYWORD for p in parameters)
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    first = by_position[:2]
    columns = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p not in first]
    return first, columns, any(p.kind is p.VAR_KEYWORD for p in parameters)


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
