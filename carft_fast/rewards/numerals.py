"""How people write a number, in text and in LaTeX, and its exact value. Pure; never raises on any text.

A text goes through two steps: `plain` takes off typography and LaTeX that change no value, then one pattern reads the
number, and what stands around it decides whether it is the whole answer or a piece of one.
"""

import math
import re
import unicodedata
from fractions import Fraction

LONGEST = 200  # characters read of a number and what stands around it; also bounds the patterns' work


class Number(float):
    """A number that was read: a float, with its exact value for comparing."""

    exact: Fraction

    def __new__(cls, exact: Fraction) -> "Number":
        number = super().__new__(cls, exact)
        number.exact = exact
        return number

    def __eq__(self, other: object) -> bool:
        return self.exact == other.exact if isinstance(other, Number) else super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = float.__hash__

    def __getnewargs__(self) -> tuple[Fraction]:  # type: ignore[override]
        return (self.exact,)


def decimal_places(value: Fraction) -> int | None:
    """How many decimals write a value out; None where none do."""
    return next((places for places in range(LONGEST) if 10**places % value.denominator == 0), None)


def exact(number: float) -> Fraction:
    """The value as written: of a float that nobody wrote, its shortest decimals (0.1 is one tenth)."""
    return number.exact if isinstance(number, Number) else Fraction(repr(float(number)))


_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\ufeff"))
_INVISIBLE |= dict.fromkeys(range(0x2066, 0x206A))
FRACTIONS = {c: unicodedata.normalize("NFKC", c).replace("\u2044", "/") for c in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–－﹣‐‑", "-"),
        **dict.fromkeys("⋅∙", "·"),
        **dict.fromkeys("\u2044∕／", "/"),
        **dict.fromkeys("\u2009\u202f\u00a0", "\u2009"),  # spaces that keep a number's groups together
        **dict.fromkeys("‘’ʼ", "'"),
        **dict.fromkeys("“”„«»", '"'),
        **dict.fromkeys("≃≅", "≈"),
        "，": ",",
        "．": ".",
        "：": ":",
        "％": "%",
        "＝": "=",
        "＋": "+",
        "（": "(",
        "）": ")",
        "＄": "$",
        **{c: f" {fraction}" for c, fraction in FRACTIONS.items()},
    }
)
_SUPERSCRIPTS = str.maketrans("⁻⁺⁰¹²³⁴⁵⁶⁷⁸⁹", "-+0123456789")
_SMALL_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉", "01234567890123456789")
_SMALL_FRACTION = re.compile(r"([⁰¹²³⁴-⁹]+)/([₀-₉]+)")

LATEX_ASIDE = r"\\(?:color|textcolor|colorbox|label|tag\*?)\s*(?:\[[^\[\]]*\])?\s*\{[^{}]*\}"
"""What changes nothing about a formula: its colour and its number."""
LATEX_WRAPPER = (
    r"(?s)\\begin\s*\{((?:equation|align|aligned|gather|gathered|split|displaymath|math)(\*?))\}(.*?)\\end\s*\{\1\}"
)
"""An environment that only sets its third group, a formula, on a line of its own."""
_NAMED_TEXT = re.compile(
    r"\\(?:text[a-z]*|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|ensuremath|operatorname\*?|boldsymbol|bm|emph|underline"
    r"|boxed|fbox)\s*\{([^{}]*)\}"
)
_LATEX = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\\(?:\[[^\]]*\])?", "\n"),
        (LATEX_ASIDE, ""),
        (LATEX_WRAPPER, r" \3 "),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?|\\(?:display|text|script)style(?![A-Za-z])", ""),
        (r"\\(?:bf|rm|it|sf|tiny|small|normalsize|[lL]arge|LARGE|[hH]uge)(?![A-Za-z])|\\!|\{\}", ""),
        (r"(?<=[0-9])!(?=\s*(?:\$|\\[)\]]))", " ×"),  # in a formula 5! is 120
        (r"<([A-Za-z]\w*)>(.*?)</\1>|</\w+>", r" \2 "),
        (r"\{\s*,\s*\}", ","),
        (r"\\[,;: ]|\{\\,\}|~|\\(?:thinspace|quad|qquad)(?![A-Za-z])", "\u2009"),
        (r"\\[()\[\]]", " "),
        (r"\\%", "%"),
        (r"\^\s*\{\s*([-+]?[0-9]+)\s*\}", r"^\1 "),
        (r"\s*(?:\^\s*\{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}?|\\degree(?![A-Za-z])|°)", " degrees "),
        (r"\\(?:approx|simeq|sim)(?![A-Za-z])", "≈"),
        (r"\\(?:times|cdot)(?![A-Za-z])", "×"),
        (r"\\(?:neq?|[lg]eq?)(?![A-Za-z])|[<>!]=|=+[<>]", "≠"),
        (r"\\\{", "("),
        (r"\\\}", ")"),
    )
]
_MATH = re.compile(r"(?<!\\)\$([^$]*)(?<!\\)\$")
_MONEY = re.compile(r"(?:\\?\$|[€£¥₹￥₩₽₪₫฿₺₴₦₱₨])\s*(?=[-+]?\s*[.0-9])")
_MONEY_SIGNS = re.compile(r"\\?\$|[€£¥₹￥₩₽₪₫฿₺₴₦₱₨]")
_ARGUMENT = r"\s*(?:\{\s*([-+]?)\s*([0-9][0-9,]*(?:\.[0-9]+)?)\s*\}|()([0-9]))"
_FRACTION = re.compile(rf"\\[dtc]?frac(?![A-Za-z]){_ARGUMENT}{_ARGUMENT}")
_ANGLES = re.compile(r"^([^\w<>]*)<([^<>]*)>")
_BRACES = re.compile(r"(?<![\^_])\{([^{}]*)\}")
_EMPHASIS = re.compile(r"(?<![\w)])(\*{1,3}|_{1,3}|`{1,3})(?=\S)([^*_`]+)(?<=\S)\1(?![\w(])")


def plain(text: str) -> str:
    """A text without what changes no value: LaTeX's fonts, colours, spaces and delimiters, emphasis, odd characters.

    A sign of money that stands before a number becomes ¤. Commands that mean something stay, with their backslash.
    """
    text = text.translate(_INVISIBLE).translate(_CHARACTERS)
    text = _SMALL_FRACTION.sub(lambda m: " " + m[0].translate(_SMALL_DIGITS), text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = _MATH.sub(r" \1 ", text)
    for _ in range(4):  # one within the other
        text = _EMPHASIS.sub(r"\2", _NAMED_TEXT.sub(_as_words, _FRACTION.sub(_as_slash, text)))
    text = _MONEY_SIGNS.sub(" ", _MONEY.sub("¤", text))
    for _ in range(4):
        text = _BRACES.sub(r" \1 ", text)
    return _ANGLES.sub(r"\1 \2 ", text)


def _as_words(match: re.Match[str]) -> str:
    """\\text{ cm} -> cm; a power stays with its unit."""
    return f" {match[1].rstrip() if match.string.startswith('^', match.end()) else match[1] + ' '}"


def _as_slash(match: re.Match[str]) -> str:
    """\\frac{-1}{2} -> -1/2"""
    signs = [match[i] or match[i + 2] or "" for i in (1, 5)]
    numerator, denominator = ((match[i] or match[i + 2]).replace(",", "") for i in (2, 6))
    return f" {'-' if (signs[0] == '-') != (signs[1] == '-') else ''}{numerator}/{denominator}"


_SCALES = {
    "hundred": 2,
    "thousand": 3,
    "million": 6,
    "billion": 9,
    "trillion": 12,
    "quadrillion": 15,
    "lakh": 5,
    "crore": 7,
}
_SHORT_SCALES = {"k": 3, "mil": 6, "mn": 6, "mln": 6, "m": 6, "bn": 9, "b": 9, "tn": 12, "t": 12}
_SIGN = "[-+]"


def _power(name: str) -> str:
    """Pattern of an exponent after 10: ^5, **5, ^{5} or superscript digits."""
    return rf"\s*(?:(?:\^|\*\*)\s*\{{?\s*(?P<{name}>{_SIGN}?[0-9]{{1,4}})\s*\}}?|(?P<{name}_sup>[⁻⁺]?[⁰¹²³⁴-⁹]{{1,4}}))"


_OPENING = r"[\s\"'`*(\[{#]*+"
_NUMBER = re.compile(
    rf"""
    {_OPENING}
    (?P<sign>{_SIGN}?)\s*+(?:(?P<money>(?:US|CA|AU|NZ|HK|NT|[ACRS])?\s*¤|(?:USD|EUR|GBP|INR|Rs\.?)(?=[\s0-9]))
        \s*+(?P<late_sign>{_SIGN}?))?\s*+
    (?!0[xXbBoO][0-9A-Fa-f])
    (?>                                # atomic: what follows decides on the whole number, not on a piece of it
    (?:
      (?P<whole>[0-9]{{1,15}})\s+(?P<numerator>[0-9]{{1,15}})\s*/\s*(?P<denominator>[0-9]{{1,15}})
    | 10{_power("alone")}
    | (?P<digits>
        [0-9]{{1,3}}(?P<comma>[,'\u2009])[0-9]{{3}}(?:(?P=comma)[0-9]{{3}})*(?:\.[0-9]+)?
      | [0-9]+(?:\.[0-9]+)?
      | \.[0-9]+
      )
      (?P<exponent>[eE]{_SIGN}?[0-9]{{1,4}})?
      (?:\s*/\s*(?P<divisor>[0-9]{{1,15}}(?:\.[0-9]{{1,15}})?))?
      (?:\s*[x×*·]\s*10{_power("times")})?
    )
    (?P<scales>(?:[\s-]*(?i:(?:{"|".join(_SCALES)})s?)\b)*)
    (?P<short>(?:[kKMB]|\s?(?i:mil|mn|mln|bn|tn))\b|(?(money)\s?[kKmMbBtT]\b|(?!)))?
    )
    # 1_000, "1 000", 1,2, 1.2.3, 12:30, 5'10, 1/2/3 and 2^10 are not one number, written out
    (?!\s*[\d_⁰¹²³⁴-⁹]|[,.:']\d|\s*/\s*{_SIGN}?[0-9.]|\s*(?:\^|\*\*\s*[0-9(]))
    """,
    re.VERBOSE,
)
_CLOSING = r"[\s.%)>\]}\"'`*]*"
_END = re.compile(_CLOSING)
_UNIT = re.compile(rf"{_CLOSING}\(?\s*(?:[^\W\d_]+(?:/[^\W\d_]+)?(?:[²³]|\^\{{?[23]\}}?)?)?{_CLOSING}")

_LEAD = re.compile(
    r"[\s*(]*(?:(?:(?:the\s+)?(?:final\s+)?answer(?:\s+is)?:?|about|approximately|approx\.?|around|roughly|exactly)\s+|≈)",
    re.IGNORECASE,
)
_EXPLANATION = re.compile(r"[\s,(]\s*(?:because|since|(?<!well\s)as(?!\s+well)|which|given)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?][\"')*]*\s+(?![-0-9=≈+*/×]|or\b|and\b)|\n", re.IGNORECASE)
_REMARK = re.compile(  # in brackets: after a word anything, after a number words or an equation
    r"""(?: (?:(?<=[^\W\d_]\s) | (?<=\s)(?=\([^()]*(?:[^\W\d_⁰¹²³⁴-⁹]{2}|=)))
            \((?!\s*(?:or|and|to|but|maybe|perhaps|possibly)\b)
          | (?<=\s)\(\s*[%a-zA-Z]?(?<![abijnqruvxyzXYZ])\s*(?=\))    # one letter, a unit
          | \((?=[^\W\d_]{2,}\)) ) [^()]*\)""",
    re.VERBOSE,
)
_EMPHASIS_END = re.compile(r"^[*_`]{1,3}(?=\s|$)")
_POWER_OF_UNIT = re.compile(r"(?<![^\W\d_])(?:[^\W\d_]{2,}|[mMsS])\^\{?\s*-?[0-9]\s*\}?")
_NUMBER_WORDS = (
    "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|"
    "(?:twen|thir|for|fif|six|seven|eigh|nine)ty|" + "|".join(_SCALES)
)
_PARTS = "(?:third|fourth|fifth|sixth|seventh|eighth|ninth)"
_GOES_ON = re.compile(
    rf"""
      (?<![^\W_]) (?<!\^) \d                                 # another number: 4 or 7, 36 - 9, 5 feet 3
    | \b(?:{_NUMBER_WORDS})s?\b
    | \band\s+(?:an?\s+|one\s+)?(?:half|third|quarter)\b     # 5 and a half
    | ^(?!(?:[cdkm]?m|ft|in|yd|mi)[23](?![^\W_]))[^\W\d_]+\d    # 5h30, 5x10; but 5cm2
    | ^[-\s]*(?:{_PARTS}s|hal(?:f|ves)|(?:{_PARTS}|quarter)(?=\W*\Z|\s+of\b))\b
    | ^[\s)\]}}]*·
    | [+×÷^√±≠<≤≥∞∑\\&] | (?-i:[\u0391-\u03a8\u03b1-\u03bb\u03bd-\u03c8]) | >\s*\w | \*\s*[\w(] | \(    # an expression
    | ^[\s,)]*(?:or|plus|minus|over|squared|cubed|divided|multiplied|pi|sqrt|sin|cos|tan|log|ln|mod)\b
    # variables: 4x, 3 - n; but "10x more" and "5 N"
    | ^[)\]}}]*[-/\s]*(?-i:[abeijnqruvxyzXYZ]|[xyz]{{2,}}|ab|ac|bc|abc|pq)\b(?!\s+[^\W\d_]{{2}})
    | ^[-\s]*(?:tenth|hundredth|thousandth|millionth|billionth)s?\b
    """,
    re.VERBOSE | re.IGNORECASE,
)
_EQUALS = re.compile(r"[=≈]")
# between two signs of equality: where one equation ends and the next begins
_NEXT_EQUATION = re.compile(r"[0-9]\s*(?:[,;](?![0-9]{3}\b)|\band\b)|[0-9]\s+[a-z](?<![cghklms])(?:_\S+)?\s*$")


def read_number(text: str) -> Number | None:
    """The number that an answer states, exactly; None where it states none, several, or an expression.

    Of an equation's sides those count that are numbers, and they must be the same one, rounding apart.
    """
    text = plain(text).strip()
    if len(text) > 2 * LONGEST:
        return None
    sentence = _until(_SENTENCE_END, text)
    sentence = _REMARK.sub(" ", sentence)
    if _NUMBER.match(_without_lead(sentence)):
        sentence = _until(_EXPLANATION, sentence)
    sides = _EQUALS.split(sentence)
    if len(sides) == 1:
        return _read(sentence)
    if re.search(r"\bor\b", sentence, re.IGNORECASE):
        return None
    if any(map(_NEXT_EQUATION.search, sides[1:-1])):
        return None
    found = [number for side in sides if not re.match(r"\s*[0-9]+\s*!", side) if (number := _read(side)) is not None]
    if not found or not all(_same(number, found[-1], "%" in sentence) for number in found):
        return None
    return found[-1]


def _without_lead(text: str) -> str:
    lead = _LEAD.match(text)
    return text[lead.end() :] if lead else text


def _until(pattern: re.Pattern[str], text: str) -> str:
    """What stands before the first match that is not at the beginning."""
    match = pattern.search(text, 1)
    return text[: match.start()] if match else text


def _same(one: Number, other: Number, percent: bool) -> bool:
    """Whether two sides of an equation are one number, rounded perhaps, or once in percent."""
    places = decimal_places(other.exact)
    step = Fraction(0) if places is None else Fraction(1, 10**places)
    near = [abs(factor * one.exact - other.exact) for factor in (1, 100, Fraction(1, 100))[: 3 if percent else 1]]
    return min(near) <= (step / 2 if one.exact.denominator > 1 else 0)


def _read(text: str) -> Number | None:
    """A number and words that belong to it."""
    text = _without_lead(text)
    match = _NUMBER.match(text)
    if match is None:
        return None
    rest = _EMPHASIS_END.sub("", text[match.end() :])
    if _GOES_ON.search(_POWER_OF_UNIT.sub("m", rest)):
        return None
    return _value(match)


def read_bare_number(text: str, *, unit: bool = False) -> Number | None:
    """A text that is nothing but a number and closing punctuation; with `unit` one word more, in brackets perhaps."""
    if len(text) > LONGEST:
        return None
    text = plain(text)
    match = _NUMBER.match(text)
    if match is None or not (_UNIT if unit else _END).fullmatch(text, match.end()):
        return None
    return _value(match)


def _value(match: re.Match[str]) -> Number | None:
    """None where it divides by zero, has two signs, or is beyond what a float can hold."""
    if match["sign"] and match["late_sign"]:
        return None
    alone, times = (int((match[n] or match[f"{n}_sup"] or "0").translate(_SUPERSCRIPTS)) for n in ("alone", "times"))
    scale = sum(_SCALES[word.rstrip("s")] for word in re.findall(r"[a-z]+", match["scales"].lower()))
    scale += _SHORT_SCALES[match["short"].strip().lower()] if match["short"] else 0
    if match["whole"] is not None:
        numerator, denominator = int(match["numerator"]), int(match["denominator"])
        if numerator >= denominator:  # 4 10/2 is no mixed number
            return None
        value = int(match["whole"]) + Fraction(numerator, denominator)
    elif match["digits"] is None:
        value = Fraction(1)
        times = alone
    else:
        value = Fraction(re.sub("[,'\u2009]", "", match["digits"]))
        times += int((match["exponent"] or "e0")[1:])
        if match["divisor"] is not None:
            divisor = Fraction(match["divisor"])
            if not divisor:
                return None
            value /= divisor
    if "-" in (match["sign"], match["late_sign"]):
        value = -value
    try:
        number = Number(value * Fraction(10) ** (times + scale))
    except OverflowError:
        return None
    return number if math.isfinite(number) and bool(number) == bool(number.exact) else None
