"""Answers: taken out of a completion, compared with the target, scored. Pure; never raises on what a model wrote."""

import collections
import math
import re
from typing import Any, Literal, NamedTuple

AnswerType = Literal["numeric", "choice"]
Answer = float | str

REASONING_TRIGGER = "\nAnswer reasoning:\n"
ANSWER_TRIGGER = "\nTherefore, the answer is: "

_TRIGGER = re.compile(r"therefore, the answer is[ \t]*:?", re.IGNORECASE)
_LONGEST_ANSWER = 200  # characters read after the trigger; also bounds the patterns' work
_NUMBER = re.compile(
    r"""
    [\s\u200b"'`*(<\[{]*              # quotes, brackets, zero-width space
    (?P<sign>[+\u2212-]?)\s*[$€£¥]?\s*
    (?!0[xX])
    (?>                                # atomic: what follows decides on the whole number, not on a piece of it
    (?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)
    (?P<exponent>[eE][+-]?[0-9]{1,4})?
    (?:\s*/\s*(?P<divisor>[0-9]{1,15}))?
    )
    (?!\s*[0-9_]|,[0-9])               # 1_000, "1 000" and 1,2 are not numbers a person would write
    """,
    re.VERBOSE,
)
_CHOICE = re.compile(r"[\s\"'`*(<\[{]*(?P<letter>[A-Ea-e])(?![A-Za-z0-9_]|'[A-Za-z])")


class Grade(NamedTuple):
    correct: bool
    extracted: Answer | None

    @property
    def extractable(self) -> bool:
        return self.extracted is not None


def extract_answer(text: str, *, answer_type: AnswerType) -> Answer | None:
    """The answer a completion gives: what follows its last "Therefore, the answer is".

    Numbers are read as a person would: commas between thousands, a currency sign, a unit, a percent sign, a fraction,
    brackets; after "=" when an equation was written. inf and nan are not answers. Without the trigger the text itself
    counts if it is nothing but an answer. `text` may hold the prompt too: what precedes the last "Answer reasoning:"
    is dropped. Returns None when there is nothing to extract.
    """
    text = text.rsplit(REASONING_TRIGGER, 1)[-1].strip()
    triggers = collections.deque(_TRIGGER.finditer(text), maxlen=1)
    if not triggers:
        return _read(text, answer_type, whole=True) if len(text) <= _LONGEST_ANSWER else None
    start = triggers[0].end()
    answer = text[start:].lstrip()[:_LONGEST_ANSWER].split("\n", 1)[0]
    return _read(answer.rsplit("=", 1)[-1] if answer_type == "numeric" else answer, answer_type, whole=False)


def _read(text: str, answer_type: AnswerType, *, whole: bool) -> Answer | None:
    match = (_NUMBER if answer_type == "numeric" else _CHOICE).match(text)
    if match is None or (whole and text[match.end() :].strip(" .%)>]}\"'`*")):
        return None
    if answer_type == "choice":
        return match["letter"].lower()
    value = float(match["digits"].replace(",", "") + (match["exponent"] or ""))
    if match["divisor"] is not None:
        if int(match["divisor"]) == 0:
            return None
        value /= int(match["divisor"])
    if not math.isfinite(value):
        return None
    return -value if match["sign"] in ("-", "\u2212") else value


def parse_target(answer: str, *, answer_type: AnswerType) -> Answer:
    """The target an answer is compared with. Raises ValueError for one that cannot be compared with anything."""
    text = answer.strip()
    if answer_type == "choice":
        letter = text.strip("\"'()[]. ").lower()
        if len(letter) != 1 or not "a" <= letter <= "e":
            raise ValueError(f"answer {_shorten(answer)} is not a letter a to e")
        return letter
    digits = text.replace(",", "").strip("$% ")
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?", digits):
        raise ValueError(f"answer {_shorten(answer)} is not a number")
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"answer {_shorten(answer)} is not a finite number")
    return value


def grade(text: str, target: str, *, answer_type: AnswerType, tolerance: float = 1e-2) -> Grade:
    """Compare a completion's answer with the target: within `tolerance` (numeric) or the same letter (choice).

    Raises ValueError when the target cannot be parsed, never for the completion.
    """
    wanted = parse_target(target, answer_type=answer_type)
    found = extract_answer(text, answer_type=answer_type)
    if isinstance(found, float) and isinstance(wanted, float):
        return Grade(abs(found - wanted) <= tolerance, found)
    return Grade(found is not None and found == wanted, found)


def same_answer(a: Answer | None, b: Answer | None, tolerance: float) -> bool:
    """Whether two extracted answers are one: numbers within `tolerance`, anything else when equal."""
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= tolerance
    return a is not None and a == b


def base_score(result: Grade, partial_score: float = 0.1) -> float:
    """Terminal score: 1 correct, `partial_score` wrong but extractable, 0 nothing extractable. Source: ReFT."""
    if result.correct:
        return 1.0
    return partial_score if result.extractable else 0.0


def embedding_partial_score(cosine: Any) -> Any:
    """CARFT's partial score 0.2 + 0.1 cos(z_1, z_2), in [0.1, 0.3]; for a float or a tensor."""
    return 0.2 + 0.1 * cosine


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
