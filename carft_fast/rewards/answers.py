"""Answers: taken out of a completion, compared with the target, scored. Pure; never raises on what a model wrote.

`grade` does all for "numeric" and "choice". "latex" and "program" need limits that pure code cannot keep: `Grader`
sets them around what is extracted here and `compare_latex`, which may never end. docs/rewards.md has examples.
"""

import itertools
import re
import textwrap
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from carft_fast.config import ANSWER, ANSWER_PHRASE, ANSWER_SLOT, AnswerType
from carft_fast.rewards.numerals import (
    FRACTIONS,
    LATEX_ASIDE,
    LATEX_WRAPPER,
    LONGEST,
    Number,
    decimal_places,
    exact,
    plain,
    read_bare_number,
    read_number,
)

Answer = float | str
LatexVerdict = Literal["same", "different", "unreadable"]

REASONING_TRIGGER = "\nAnswer reasoning:\n"

THINK, _THINK_END = "<think>", "</think>"

_TRIGGER = re.compile(r"therefore, the answer is[ \t]*:?", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE_BOX = re.compile(r"[^\s${]+?(?:\{[^{}]*\})*(?=[.,;:!?]?(?:[\s$]|\Z))")
_LONGEST_LATEX = 500
_LONGEST_PROGRAM = 65536

# Mathematics between delimiters, an environment, or the end of a line
_PIECE = re.compile(
    r"\\\[(.*?)\\\]|\\\((.*?)\\\)|\$\$(.*?)\$\$|(?<!\\)\$((?:\\\$|[^$\n])*)\$|\\begin\{(\w+\*?)\}.*?\\end\{\5\}"
    r"|\n(?!\s*(?:or|and)\b)",
    re.DOTALL | re.IGNORECASE,
)
_JOINED = re.compile(r"[\s,;$()\[\]\\]*(?:\b(?:and|or)\b)?[\s,;$()\[\]\\]*", re.IGNORECASE)
_LIMITED = re.compile(r"\b(?:and|or|not|than|at least|at most|up to)\s*$", re.IGNORECASE)
_STATES = re.compile(r"(?:\b(?:is|are|be|equals?|gives?|namely)|[:=])\s*$", re.IGNORECASE)

_LETTER = r"""(?P<{}>[a-e])(?![A-Za-z0-9_^+#]|'[A-Za-z])
    (?!(?<=a)\s+(?!(?:is|because|since|as|or|and)\b)[^\W\d_])   # "a nice day" begins with an article"""
_BETWEEN = (
    r"or|and|nor|but|maybe|perhaps|possibly|also|either|both|else|alternatively|as\s+well\s+as|"
    r"(?:(?:along|together)\s+)?with|plus|then|the|option|choice|answer|to|through|vs|versus"
)
_CHOICE = re.compile(
    rf"""
    [\s"'`*(<\[{{#]*
    (?:(?:the|correct|right|best|final|answer|option|choice|it|is)\b[\s:]*["'`*(<\[{{]*){{0,8}}
    {_LETTER.format("letter")}
    """,
    re.VERBOSE | re.IGNORECASE,
)
_OTHER_CHOICE = re.compile(
    rf"""
    [\s)>\]}}"'`*]*(?:\.(?=\s*(?:or|and)\b|\s*[a-e]\W*\Z))?
    (?:[\s,、/&|;=+("'`*\[\\-]|\b(?:{_BETWEEN})\b\.?)+
    {_LETTER.format("other")}
    """,
    re.VERBOSE | re.IGNORECASE,
)
_LABELLED_CHOICE = re.compile(  # after what the first one says: B) 12 or D) 15
    r"""(?:\b(?:or|and|nor)\b|[,;/])[\s"'`*]*
    (?:\(([a-eA-E])\) | (?:option|choice|answer)\s+([a-eA-E])\b | ([a-eA-E])[).:] | ([A-E])(?=["'`*)\]}.\s]*\Z))""",
    re.VERBOSE,
)
_EXPLAINED = re.compile(
    r"\b(?:because|since|as|which|not|neither|while|whereas)\b|[.!?]\s+(?!or\b|and\b)|\n", re.IGNORECASE
)

_FENCE = re.compile(r"(?P<indent>[ \t]*)(?P<marks>`{3,}|~{3,})(?P<info>.*)")
_LATE_FENCE = re.compile(r"(?P<indent>)[^`]*(?P<marks>```)(?P<info>[ \t]*(?:python3?|py)?[ \t]*)", re.IGNORECASE)
_CODE = re.compile(r"(?:def|class|import|from)[ \t]+\w")
_STRING = re.compile(r"\"\"\"|'''|\"(?:\\.|[^\"\\])*\"?|'(?:\\.|[^'\\])*'?|#.*")
_SOLUTION = re.compile(r"^[ \t]*(?:def[ \t]+solution\b|solution[ \t]*=)", re.MULTILINE)

_LATEX_NAMES = re.compile(
    LATEX_ASIDE + r"|\\begin\s*\{[^{}]*\}(?:\s*\{[clr|\s]*\})?|\\end\s*\{[^{}]*\}|_\s*\{[^{}]*\}"
    r"|\\(?:text[a-z]*|math[a-z]+|mbox|operatorname\*?)\s*\{[^{}]*\}|\\[A-Za-z]+"
)
_PROSE = re.compile(r"[A-Za-z]{4}|\b(?:inf|nan)\b", re.IGNORECASE)
_COMMANDS = {"×": "times", "·": "cdot", "÷": "div", "π": "pi", "∞": "infty", "≤": "le", "≥": "ge", "≠": "ne", "±": "pm"}
_COMMANDS |= {"∪": "cup", "∩": "cap", "∈": "in"}
_TO_LATEX = str.maketrans(
    {
        **dict.fromkeys("−–－﹣‐‑", "-"),
        **dict.fromkeys("⋅∙", "\\cdot "),
        **{symbol: f"\\{name} " for symbol, name in _COMMANDS.items()},
        **{c: "\\frac{{{}}}{{{}}}".format(*fraction.split("/")) for c, fraction in FRACTIONS.items()},
        "°": "^{\\circ}",
    }
)


def _repeating(whole: str, places: str, period: str) -> str:
    """A decimal that repeats: 0.1 and a period of 6 is 15/90."""
    value = int(whole + places + period) - int(whole + places or "0")
    return f"\\frac{{{value}}}{{{(10 ** len(period) - 1) * 10 ** len(places)}}}"


_REWRITTEN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|([0-9]+(?:\.[0-9]+)?|[A-Za-z]))", r"\\sqrt{\1\2\3}"),
        (r"[⁻⁺]?[⁰¹²³⁴-⁹]+", lambda m: f"^{{{unicodedata.normalize('NFKC', m[0]).replace('−', '-')}}}"),
        (r"[₀-₉]+", lambda m: f"_{{{unicodedata.normalize('NFKC', m[0])}}}"),
        (LATEX_ASIDE, ""),
        (LATEX_WRAPPER, lambda m: m[3].replace("&", "")),
        (r"^\s*(?:\\approx|\\sim|≈)", ""),
        (r"\\text(?:sf|tt|sc|md|up|normal)\s*\{", r"\\text{"),
        (r"(?<=[0-9])\\[,;:! ]\s*(?=[0-9]{3}(?![0-9]))", ""),
        (r"([0-9]*)\.([0-9]*)\\(?:overline|bar)\s*\{([0-9]+)\}", lambda m: _repeating(*m.groups())),
        (r"(\\mathbb)\s+([A-Z])(?![A-Za-z])", r"\1{\2}"),
    )
]
_COMPOUND = re.compile(
    r"\\(?:text[a-z]*|mbox|mathrm)\s*\{(?!\s*(?:and|or)\s*\})[^{}]*\}[\s,]*[0-9]"  # 6 h and 30 min
    r"|\\(?:text[a-z]*|mbox|mathrm)\s*\{\s*(?:or|and)\s+(?:more|less|fewer|greater|higher|lower|above|below|up|over)\b"
)
_BASE = re.compile(r"[0-9]\s*_\s*\{?\s*([0-9]+)")
_SHORT_NAME = re.compile(r"[0-9]\s*(?![eE][-+]?[0-9])[A-Za-z]{1,3}(?![A-Za-z0-9])")  # a unit, or a variable
_NAMED_SIDE = re.compile(r"\s*[A-Za-z](?:[A-Za-z\s:']|_(?:\{[^{}]*\}|\w))*=(.*)", re.DOTALL)


class Grade(NamedTuple):
    correct: bool
    extracted: Answer | None
    score: float | None = None
    """Of the user's functions; None where the score follows from the other two."""
    parts: Mapping[str, float] | None = None
    """The score of each of several functions by its label, before its weight."""

    @property
    def extractable(self) -> bool:
        reads_answer = self.score is None or ANSWER in (self.parts or {})
        return self.extracted is not None if reads_answer else (self.score or 0.0) > 0


def outside_think(text: str) -> str:
    """What a completion says outside <think>...</think>; nothing where a <think> has no end.

    What precedes a </think> that nothing opens is thinking too: the prompt opened it.
    """
    *closed, last = text.split(_THINK_END)
    if THINK in last:
        return ""
    kept: list[str] = []
    for part in closed:
        before, opened, _ = part.partition(THINK)
        if opened:
            kept.append(before)
        else:
            kept.clear()
    return "\n".join([*kept, last])


def extract_answer(text: str, *, answer_type: AnswerType, phrase: str = ANSWER_PHRASE) -> Answer | None:
    """The answer of a completion: what stands in its last `phrase` in place of {answer}, else in the last \\boxed, else
    the text itself if it is nothing but an answer. None when there is nothing to extract, or more than one answer.

    Case does not count in a phrase, nor does the colon in "Therefore, the answer is:", which is also read for "".
    `text` may hold the prompt too: what precedes the last "Answer reasoning:" is dropped. Numbers are read as a person
    would, whole or not at all, and carry their exact value. inf and nan are not answers. "latex" and "program" return
    source text, not yet understood.
    """
    text = text.rsplit(REASONING_TRIGGER, 1)[-1].strip()
    if answer_type == "program":
        return _program(text)
    longest = _LONGEST_LATEX if answer_type == "latex" else LONGEST
    trigger, end = _around_answer(phrase)
    *before, answer = trigger.split(text) if trigger else [text]
    if before:
        answer = answer.lstrip()
        if end:
            answer = answer.partition(end)[0]
        if len(answer) > longest:  # no word is read that is cut
            answer = re.sub(r"\S*\Z", "", answer[:longest])
    boxed = _boxed(answer, longest)
    if boxed is None and not before:
        bare = answer_type != "latex" and len(answer) <= longest
        return _read(answer, answer_type, whole=True) if bare else None
    return _read(_statement(answer) if boxed is None else boxed, answer_type)


@lru_cache(maxsize=8)
def _around_answer(phrase: str) -> tuple[re.Pattern[str] | None, str]:
    """What an answer stands after, None where that is a box alone; and what ends it, if that is more than a mark."""
    if phrase in ("", ANSWER_PHRASE):
        return _TRIGGER, ""
    before, _, after = phrase.partition(ANSWER_SLOT)
    box = _BOX.search(before)
    words = (before[: box.start()].rstrip(" $*(") if box else before).split()
    trigger = r"\s+".join(map(re.escape, words))
    if words and words[0][0].isalnum():
        trigger = rf"(?<!\w){trigger}"
    end = "" if box else after.strip()
    return re.compile(trigger, re.IGNORECASE) if words else None, end if len(end) > 1 else ""


def phrase_start(text: str, phrase: str) -> int | None:
    """Where the last `phrase` begins, as `extract_answer` finds it (characters); None without one."""
    trigger, _ = _around_answer(phrase)
    return max((match.start() for match in (trigger or _BOX).finditer(text)), default=None)


def _read(text: str, answer_type: AnswerType, *, whole: bool = False) -> Answer | None:
    """`whole`: nothing but closing punctuation may stand after the answer."""
    if answer_type == "latex":
        return _latex_source(text)
    if answer_type == "numeric":
        return read_bare_number(text) if whole else read_number(text)
    text = plain(text)
    match = _CHOICE.match(text)
    if match is None or (whole and text[match.end() :].strip(" .%)>]}\"'`*")):
        return None
    letter = match["letter"].lower()
    others = [_OTHER_CHOICE.match(text, match.end())]
    others += _LABELLED_CHOICE.finditer(_EXPLAINED.split(text[match.end() :].lstrip(" .)"), maxsplit=1)[0])
    found = {group.lower() for other in others if other for group in other.groups() if group}
    return letter if found <= {letter} else None


def _statement(text: str) -> str:
    """The first line; a formula or environment that goes on over lines is part of it."""
    return next((text[: m.start()] for m in _PIECE.finditer(text) if m[0] == "\n"), text)


def _boxed(text: str, longest: int) -> str | None:
    """What is inside the last \\boxed{...}, with those joined to it by "and", "or" or a comma; None without one."""
    last = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if last < 0:
        return None
    begin = max(0, last - longest)
    text = text[begin : last + longest + 10]
    last -= begin
    found: list[str] = []
    end = 0
    for match in _BOX.finditer(text):
        content = _group(text, match.end())
        if content is None:
            found = []
            continue
        if not (found and match.start() >= end and _JOINED.fullmatch(text[end : match.start()])):
            found = []
        found.append(text[slice(*content)].strip())
        end = content[1] + 1
        last = -1 if match.start() == last else last
    if last >= 0 or not found or any(len(content) > longest for content in found):
        return None
    return " \\text{ or } ".join(dict.fromkeys(found)) or None


def _group(text: str, start: int) -> tuple[int, int] | None:
    """Where the argument at `start` begins and ends: in braces, or else up to a space; None where it does not end."""
    if not text.startswith("{", start):
        match = _BARE_BOX.match(text, start)
        return match and match.span()
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return start + 1, start + brace.start()
    return None


def _program(text: str) -> str | None:
    """The last block between fences that defines solution(); without one the text before them, or the last block.

    A fence inside a triple-quoted string is part of the program.
    """
    blocks: list[list[str]] = []
    before: list[str] = []
    fence = quote = None
    code = False
    for line in re.split(r"\r\n|\r|\n", text):
        match = None if quote else _FENCE.fullmatch(line)
        if match is None and fence is None and not code:
            match = _LATE_FENCE.fullmatch(line)
        if match and match["marks"][0] not in match["info"]:
            same = fence is not None and fence["marks"][0] == match["marks"][0]
            if same and fence is not None and len(match["marks"]) >= len(fence["marks"]) and not match["info"].strip():
                fence = None
            else:
                fence = match
                blocks.append([match["info"]] if _SOLUTION.match(match["info"]) else [])
            code = fence is not None
        else:
            if fence is not None:
                blocks[-1].append(line.removeprefix(fence["indent"]))
            elif not blocks:
                before.append(line)
                code = code or _CODE.match(line) is not None
            quote = _open_string(line, quote) if code else None
    sources = ["\n".join(block) for block in blocks]
    if fence is not None:
        sources[-1] = sources[-1].rstrip().removesuffix(fence["marks"])
    source = next((source for source in reversed(sources) if _SOLUTION.search(source)), None)
    if source is None:
        unfenced = "\n".join(before)
        source = unfenced if not sources or _SOLUTION.search(unfenced) else sources[-1]
    source = textwrap.dedent(source.strip("\ufeff\n")).strip()
    return source if source and len(source) <= _LONGEST_PROGRAM else None


def _open_string(line: str, quote: str | None) -> str | None:
    """The triple quote that is open after a line of a program, as `quote` was before it."""
    at = 0
    while True:
        if quote is not None:
            end = line.find(quote, at)
            if end < 0:
                return quote
            at, quote = end + 3, None
        match = _STRING.search(line, at)
        if match is None:
            return None
        at = match.end()
        quote = match[0] if match[0] in ('"""', "'''") else None


def _latex_source(text: str) -> str | None:
    """The mathematics of an answer, without what delimits it; several formulas joined by "and" or "or" stay together.

    Of formulas with other words between them, the one that the words say it is: "the number $n$ is $3$".
    """
    text = _statement(text)
    pieces = [match for match in _PIECE.finditer(text) if match[5] is None]
    after = text[pieces[-1].end() :] if pieces else ""
    if not pieces or re.search(r"[\w^+-]$", text[: pieces[0].start()]) or re.match(r"[\w^]", after):
        return text.replace("\\$", "").replace("$", "").strip().removesuffix(".").strip(" *`") or None
    if _LIMITED.search(text[: pieces[0].start()]) or re.match(r"\W*\b(?:and|or)\b|.*[0-9]", after):
        return None
    first = 0
    for i, (piece, following) in enumerate(itertools.pairwise(pieces), 1):
        between = text[piece.end() : following.start()]
        if _STATES.search(between):
            first = i
        elif not _JOINED.fullmatch(between):
            return None
    contents = [next(group for group in piece.groups()[:4] if group is not None).strip() for piece in pieces[first:]]
    return " \\text{ or } ".join(filter(None, contents)) or None


def parse_target(answer: str, *, answer_type: AnswerType) -> Answer:
    """The target an answer is compared with, by the rule that reads answers; of a "program" its number.

    Raises ValueError for one that cannot be compared with anything.
    """
    kind: AnswerType = "numeric" if answer_type == "program" else answer_type
    text = _TRIGGER.split(answer)[-1].strip()
    text = re.sub(r"\s*[\r\n]\s*", " ", text)  # of an answer one line counts; all of a target does
    longest = _LONGEST_LATEX if kind == "latex" else LONGEST
    boxed = _boxed(text, longest)
    found = _read(text if boxed is None else boxed, kind) if len(text) <= longest else None
    if found is None or (kind == "latex" and _is_prose(str(found))):
        wanted = {"choice": "a letter a to e", "latex": "LaTeX that can be compared"}.get(kind, "a finite number")
        raise ValueError(f"answer {_shorten(answer)} is not {wanted}")
    return found


def answer_text(answer: Answer) -> str:
    """An extracted answer as a text that `parse_target` reads."""
    return _written(answer, decimal=True) if isinstance(answer, Number) else str(answer)


def compare_latex(answer: str, target: str) -> LatexVerdict:
    """Are two LaTeX sources the same mathematics, as math-verify decides? Unbounded: 9^{9^{9^9}} does not end here.

    Sources that are written the same are, whatever math-verify makes of them.
    """
    if _bare(answer) == _bare(target):
        return "same"
    bases = [set(_BASE.findall(source)) for source in (answer, target)]
    if all(bases) and bases[0] != bases[1]:
        return "different"  # 11_2 and 11_3, which are 11 to math-verify
    from math_verify import verify

    read = _read_latex(answer)
    if not read:
        return "unreadable"
    named = _NAMED_SIDE.fullmatch(target)  # S_{ABC} : S = 7:32, which has no single unknown
    wanted = _read_latex(target) + (_read_latex(named[1]) if named and "=" not in answer else [])
    return "same" if verify(wanted, read, timeout_seconds=None) else "different"


def _bare(source: str) -> str:
    """Without what is not seen: spaces, sizes."""
    return re.sub(r"\s|\\(?:left|right|displaystyle)(?![A-Za-z])", "", source).replace("\\dfrac", "\\frac")


def _is_prose(source: str) -> bool:
    """Text in which math-verify would multiply the letters."""
    return read_bare_number(source, unit=True) is None and _PROSE.search(_LATEX_NAMES.sub(" ", source)) is not None


def _read_latex(source: str) -> list[Any]:
    """The expressions math-verify makes of a source, one where it reads numbers as we do; none for prose."""
    from math_verify import LatexExtractionConfig, parse

    if _is_prose(source) or _COMPOUND.search(source):
        return []
    sides = [read_bare_number(side, unit=True) for side in source.split("=")]
    if len(sides) > 1 and None not in sides and read_number(source) is None:
        return []  # 5 = 6
    source = " ".join(source.split()).translate(_TO_LATEX)
    for pattern, replacement in _REWRITTEN:
        source = pattern.sub(replacement, source)
    number = None if _SHORT_NAME.search(plain(source)) else read_bare_number(source, unit=True)
    sources = [] if number is None else [_written(number, decimal="/" not in source and "frac" not in source)]
    if number is None or "%" in source:
        sources.append(source)
    config = [LatexExtractionConfig()]
    return [
        expression
        for text in sources
        for expression in parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None)
    ]


def _written(number: Number, *, decimal: bool) -> str:
    """A number as math-verify reads it."""
    numerator, denominator = number.exact.as_integer_ratio()
    places = decimal_places(number.exact)
    if decimal and places is not None:
        return f"{Decimal(f'{numerator * 10**places // denominator}e-{places}'):f}"
    return f"\\frac{{{numerator}}}{{{denominator}}}" if denominator > 1 else str(numerator)


def grade(
    text: str, target: str, *, answer_type: AnswerType, tolerance: float = 1e-2, phrase: str = ANSWER_PHRASE
) -> Grade:
    """Compare a completion's answer with the target: within `tolerance` (numeric) or the same letter (choice).

    Raises ValueError when the target cannot be parsed, never for the completion.
    """
    found = extract_answer(text, answer_type=answer_type, phrase=phrase)
    return compare(found, target, answer_type=answer_type, tolerance=tolerance)


def compare(found: Answer | None, target: str, *, answer_type: AnswerType, tolerance: float) -> Grade:
    """`grade` for an answer that was extracted already."""
    return Grade(same_answer(found, parse_target(target, answer_type=answer_type), tolerance), found)


def same_answer(a: Answer | None, b: Answer | None, tolerance: float) -> bool:
    """Whether two extracted answers are one: numbers within `tolerance`, to the last decimal; letters when equal.

    Of LaTeX this says only whether the sources are equal: `Grader.same` compares it.
    """
    if isinstance(a, float) and isinstance(b, float):
        return a == b or abs(exact(a) - exact(b)) <= exact(tolerance)
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
