"""Answers: taken out of a completion, compared with the target, scored. Pure; never raises on what a model wrote.

`grade` does all for "numeric" and "choice". "latex" and "program" need limits that pure code cannot keep: `Grader`
sets them around what is extracted here and `compare_latex`, which may never end. docs/rewards.md has examples.
"""

import math
import re
import unicodedata
from typing import Any, Literal, NamedTuple

from carft_fast.config import AnswerType

Answer = float | str
LatexVerdict = Literal["same", "different", "unreadable"]

REASONING_TRIGGER = "\nAnswer reasoning:\n"
ANSWER_TRIGGER = "\nTherefore, the answer is: "

_TRIGGER = re.compile(r"therefore, the answer is[ \t]*:?", re.IGNORECASE)
_BOXED = "\\boxed{"
_LONGEST_ANSWER = 200  # characters read of an answer; also bounds the patterns' work
_LONGEST_LATEX = 500
_LONGEST_PROGRAM = 65536

_INVISIBLE = "\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff"  # zero-width characters, marks of direction
_OPENING = rf"[\s{_INVISIBLE}\"'`*(<\[{{]*"
_SIGN = "[+\\-−–－﹣]"
_PLAIN = str.maketrans("−–－﹣⁻⁺⁰¹²³⁴⁵⁶⁷⁸⁹", "-----+0123456789")  # signs and superscripts
_FRACTION_CHARACTERS = str.maketrans(
    {c: " " + unicodedata.normalize("NFKC", c).replace("\u2044", "/") for c in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([0-9]{1,15})\}\{([0-9]{1,15})\}")
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}


def _power(name: str) -> str:
    """Pattern of an exponent after 10: ^5, **5, ^{5} or superscript digits."""
    return rf"\s*(?:(?:\^|\*\*)\s*\{{?(?P<{name}>{_SIGN}?[0-9]{{1,4}})\}}?|(?P<{name}_sup>[⁻⁺]?[⁰¹²³⁴-⁹]{{1,4}}))"


_NUMBER = re.compile(
    rf"""
    {_OPENING}
    (?P<sign>{_SIGN}?)\s*(?:(?:\\?\$|[€£¥₹]|US\$|(?:USD|EUR|GBP|INR|Rs\.?)(?=[\s0-9]))\s*(?P<late_sign>{_SIGN}?))?\s*
    (?!0[xX])
    (?>                                # atomic: what follows decides on the whole number, not on a piece of it
    (?:
      (?P<whole>[0-9]{{1,15}})\s+(?P<numerator>[0-9]{{1,15}})\s*/\s*(?P<denominator>[0-9]{{1,15}})
    | 10{_power("alone")}
    | (?P<digits>[0-9]{{1,3}}(?:,[0-9]{{3}})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)
      (?P<exponent>[eE]{_SIGN}?[0-9]{{1,4}})?
      (?:\s*/\s*(?P<divisor>[0-9]{{1,15}}(?:\.[0-9]{{1,15}})?))?
      (?:\s*(?:[x×*·]|\\times|\\cdot)\s*10{_power("times")})?
    )
    (?:\s*(?P<scale>hundred|thousand|million|billion|trillion)\b)?
    )
    # 1_000, "1 000", 1,2, 1.2.3, 12:30, 1/2/3 and 2^10 are not one number, written out
    (?!\s*[0-9_⁰¹²³⁴-⁹]|[,.:][0-9]|\s*/\s*{_SIGN}?[0-9.]|\s*(?:\^|\*\*\s*[0-9(]))
    """,
    re.VERBOSE,
)
_UNIT = re.compile(r"(?:\s|\\?%|[.)>\]}\"'`*$])*(?:[^\W\d_]+(?:/[^\W\d_]+)?[²³]?)?(?:\s|[.)>\]}\"'`*$])*")
_CHOICE = re.compile(
    rf"""
    {_OPENING}
    (?:(?:the|correct|right|best|answer|option|choice|is|\\text(?:bf)?|\\math(?:rm|bf))\b[\s:]*{_OPENING}){{0,8}}
    (?P<letter>[a-e])
    (?![A-Za-z0-9_]|'[A-Za-z])
    (?!(?<=a)\s+(?!(?:is|because|since|as)\b)[^\W\d_])   # "a nice day" begins with an article
    """,
    re.VERBOSE | re.IGNORECASE,
)
_LATEX_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|mbox|operatorname\*?)\s*\{[^{}]*\}|\\[A-Za-z]+")
_PROSE = re.compile(r"[A-Za-z]{4}|\b(?:inf|nan)\b", re.IGNORECASE)
_LATEX_NAMES = zip("×·÷π∞≤≥", ("times", "cdot", "div", "pi", "infty", "le", "ge"), strict=True)
_LATEX_SYMBOLS = str.maketrans({"−": "-"} | {symbol: f"\\{name} " for symbol, name in _LATEX_NAMES})


class Grade(NamedTuple):
    correct: bool
    extracted: Answer | None
    score: float | None = None
    """A user function's own score; None where the score follows from the other two."""

    @property
    def extractable(self) -> bool:
        return self.extracted is not None if self.score is None else self.score > 0


def extract_answer(text: str, *, answer_type: AnswerType) -> Answer | None:
    """The answer of a completion: what follows its last "Therefore, the answer is", else the last \\boxed, else the
    text itself if it is nothing but an answer. None when there is nothing to extract.

    `text` may hold the prompt too: what precedes the last "Answer reasoning:" is dropped. Numbers are read as a person
    would: commas between thousands, a currency sign, a unit, a percent sign, a fraction, brackets; after "=" when an
    equation was written. inf and nan are not answers. "latex" and "program" return source text, not yet understood.
    """
    text = text.rsplit(REASONING_TRIGGER, 1)[-1].strip()
    if answer_type == "program":
        return _program(text)
    longest = _LONGEST_LATEX if answer_type == "latex" else _LONGEST_ANSWER
    *before, answer = _TRIGGER.split(text)
    if before:
        answer = answer.lstrip()[:longest]
    boxed = _last_boxed(answer, longest)
    if answer_type == "latex":
        if boxed is None and not before:
            return None
        return _latex_source(answer if boxed is None else boxed)
    if boxed is None and not before:
        return _read(answer, answer_type, whole=True) if len(answer) <= longest else None
    answer = answer.split("\n", 1)[0] if boxed is None else boxed
    return _read(re.split("[=≈]", answer)[-1] if answer_type == "numeric" else answer, answer_type, whole=False)


def _last_boxed(text: str, longest: int) -> str | None:
    """What is inside the last \\boxed{...}; None without one that ends."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    start += len(_BOXED)
    depth = 1
    for end in range(start, min(len(text), start + longest)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def _program(text: str) -> str | None:
    """The last fenced block, or all of the text where nothing is fenced."""
    parts = text.rsplit("```", 2)
    if len(parts) == 3 and not parts[2].startswith("python"):
        text = parts[1]
    elif len(parts) > 1:  # a fence that was opened and not closed
        text = parts[-1]
    if len(parts) > 1 and re.match(r"[ \t]{0,9}(?:python3?|py)?[ \t]{0,9}\n", text):
        text = text.split("\n", 1)[1]
    text = text.strip()
    return text if text and len(text) <= _LONGEST_PROGRAM else None


def _latex_source(text: str) -> str | None:
    """The mathematics of an answer, without what delimits it."""
    for opening, closing in (("\\[", "\\]"), ("\\(", "\\)"), ("$$", "$$")):
        if text.startswith(opening) and closing in text[2:]:
            return text[2:].split(closing, 1)[0].strip() or None
    text = text.split("\n", 1)[0].replace("\\$", "")
    parts = text.split("$")
    if len(parts) >= 3:  # mathematics between dollars: the last of it
        text = parts[-2] if len(parts) % 2 else parts[-3]
    return text.replace("$", "").strip().removesuffix(".").strip(" *`") or None


def _read(text: str, answer_type: AnswerType, *, whole: bool, unit: bool = False) -> Answer | None:
    """`whole`: nothing but closing punctuation may follow the answer, and with `unit` one word."""
    if answer_type == "choice":
        match = _CHOICE.match(text)
        if match is None or (whole and text[match.end() :].strip(" .%)>]}\"'`*")):
            return None
        return match["letter"].lower()
    text = _LATEX_FRACTION.sub(r" \1/\2", text.translate(_FRACTION_CHARACTERS))
    match = _NUMBER.match(text)
    if match is None or (match["sign"] and match["late_sign"]):
        return None
    rest = text[match.end() :]
    if whole and not (_UNIT.fullmatch(rest) if unit else not rest.strip(" .%)>]}\"'`*$")):
        return None
    value = _value(match)
    if value is None or not math.isfinite(value):
        return None
    sign = (match["sign"] or match["late_sign"] or "+").translate(_PLAIN)
    return -value if sign == "-" else value


def _value(match: re.Match[str]) -> float | None:
    """Value of the number without its sign; None where it divides by zero."""
    scale = _SCALES.get(match["scale"] or "", 1.0)
    if match["whole"] is not None:
        denominator = int(match["denominator"])
        return (int(match["whole"]) + int(match["numerator"]) / denominator) * scale if denominator else None
    alone, times = (_exponent(match, name) for name in ("alone", "times"))
    if match["digits"] is None:
        return float(f"1e{alone}") * scale
    own = int((match["exponent"] or "e0")[1:].translate(_PLAIN))
    value = float(f"{match['digits'].replace(',', '')}e{own + times}") * scale
    if match["divisor"] is None:
        return value
    divisor = float(match["divisor"])
    return value / divisor if divisor else None


def _exponent(match: re.Match[str], name: str) -> int:
    return int((match[name] or match[f"{name}_sup"] or "0").translate(_PLAIN))


def read_number(text: str) -> float | None:
    """A text that is nothing but a number, perhaps with a unit of one word."""
    value = _read(text.strip(), "numeric", whole=True, unit=True) if len(text) <= _LONGEST_ANSWER else None
    return value if isinstance(value, float) else None  # always: for the type checker


def parse_target(answer: str, *, answer_type: AnswerType) -> Answer:
    """The target an answer is compared with. Raises ValueError for one that cannot be compared with anything."""
    if answer_type == "choice":
        letter = _read(answer.strip("()[]. \"'"), answer_type, whole=True) if len(answer) <= _LONGEST_ANSWER else None
        if letter is None:
            raise ValueError(f"answer {_shorten(answer)} is not a letter a to e")
        return letter
    if answer_type == "latex":
        source = _last_boxed(answer, _LONGEST_LATEX) or _latex_source(answer.strip()[:_LONGEST_LATEX])
        if source is None or len(answer) > _LONGEST_LATEX or not _read_latex(source):
            raise ValueError(f"answer {_shorten(answer)} is not LaTeX that can be compared")
        return source
    value = read_number(answer)
    if value is None:
        raise ValueError(f"answer {_shorten(answer)} is not a finite number")
    return value


def compare_latex(answer: str, target: str) -> LatexVerdict:
    """Are two LaTeX sources the same mathematics, as math-verify decides? Unbounded: 9^{9^{9^9}} does not end here."""
    from math_verify import verify

    read = _read_latex(answer)
    if not read:
        return "unreadable"
    return "same" if verify(_read_latex(target), read, timeout_seconds=None) else "different"


def _read_latex(source: str) -> list[Any]:
    """The expressions math-verify makes of a source; none for prose, in which it would multiply the letters."""
    from math_verify import LatexExtractionConfig, parse

    number = _read(source, "numeric", whole=True, unit=True)
    if "\\" not in source and number is not None and re.search(r"\d\s+\d|[¼-¾⅐-⅞]|[a-z]{4}", source):
        source = repr(number)  # mixed numbers and units, which it reads otherwise
    elif _PROSE.search(_LATEX_TEXT.sub(" ", source)):
        return []
    return parse(
        f"${source.translate(_LATEX_SYMBOLS)}$",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )


def grade(text: str, target: str, *, answer_type: AnswerType, tolerance: float = 1e-2) -> Grade:
    """Compare a completion's answer with the target: within `tolerance` (numeric) or the same letter (choice).

    Raises ValueError when the target cannot be parsed, never for the completion.
    """
    return compare(extract_answer(text, answer_type=answer_type), target, answer_type=answer_type, tolerance=tolerance)


def compare(found: Answer | None, target: str, *, answer_type: AnswerType, tolerance: float) -> Grade:
    """`grade` for an answer that was extracted already."""
    return Grade(same_answer(found, parse_target(target, answer_type=answer_type), tolerance), found)


def same_answer(a: Answer | None, b: Answer | None, tolerance: float) -> bool:
    """Whether two extracted answers are one: numbers within `tolerance`, anything else when equal."""
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= tolerance
    return a is not None and a == b


def base_score(result: Grade, partial_score: float = 0.1, correct_score: float = 1.0) -> float:
    """Terminal score: `correct_score`, `partial_score` wrong but extractable, 0 nothing extractable. Source: ReFT.

    A user function's score is taken as it is.
    """
    if result.score is not None:
        return result.score
    if result.correct:
        return correct_score
    return partial_score if result.extractable else 0.0


def embedding_partial_score(cosine: Any, base: float = 0.2, scale: float = 0.1) -> Any:
    """CARFT's partial score base + scale * cos(z_1, z_2), in [0.1, 0.3] by default; for a float or a tensor."""
    return base + scale * cosine


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
