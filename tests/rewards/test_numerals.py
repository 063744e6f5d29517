"""Numbers: a grammar of ways to write one, whose value is known by construction, and texts read by hand."""

import pickle
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carft_fast.rewards.answers import extract_answer, parse_target, same_answer
from carft_fast.rewards.numerals import Number, read_number

LEAD = "3 + 4 is not it.\nTherefore, the answer is: "
Written = tuple[str, Fraction]


def groups(digits: str, separator: str) -> str:
    return f"{int(digits):,}".replace(",", separator)


INTEGER = st.builds(
    lambda n, separator: (groups(str(n), separator), Fraction(n)),
    st.integers(0, 10**18),
    st.sampled_from(["", ",", "'", "’", "{,}", "\\,", ",\\!", "，", "\u2009", "\u202f", "~", "\\;"]),
)
DECIMAL = st.builds(
    lambda n, places, separator: (
        f"{groups(str(n), separator)}.{7:0{places}d}",
        n + Fraction(7, 10**places),
    ),
    st.integers(0, 10**9),
    st.integers(1, 12),
    st.sampled_from(["", ",", "'", "{,}", "\\,"]),
)
FRACTION = st.builds(
    lambda a, b, form: (form.format(a, b), Fraction(a, b)),
    st.integers(0, 10**6),
    st.integers(1, 10**6),
    st.sampled_from(["{}/{}", "{} / {}", "{}⁄{}", "{}∕{}", "\\frac{{{}}}{{{}}}", "\\dfrac{{ {} }}{{{}}}"]),
)
MIXED = st.builds(
    lambda n, part, form: (form.format(n, *part[:2]), n + Fraction(*part[2:])),
    st.integers(1, 9999),
    st.sampled_from([("1/2", "\\frac12", 1, 2), ("3⁄4", "\\tfrac{3}{4}", 3, 4), ("⅔", "\\frac{2}{3}", 2, 3)]),
    st.sampled_from(["{0} {1}", "{0} {2}", "{0}{2}"]),
)
POWER = st.builds(
    lambda n, k, form: (
        form.format(n, k, str(k).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))),
        n * 10 ** Fraction(k),
    ),
    st.integers(1, 9999),
    st.integers(-30, 30),
    st.sampled_from(
        [
            "{0}e{1}",
            "{0}E{1}",
            "{0} × 10^{{{1}}}",
            "{0} \\times 10^{{{1}}}",
            "{0} x 10^{1}",
            "{0} \\cdot 10{2}",
            "{0}*10^{1}",
        ]
    ),
)
SCALED = st.builds(
    lambda n, scale, write: (f"{n} {write(scale[0])}", n * Fraction(10) ** scale[1]),
    st.integers(1, 999),
    st.sampled_from(
        [("hundred", 2), ("thousand", 3), ("million", 6), ("billion", 9), ("hundred thousand", 5), ("trillions", 12)]
    ),
    st.sampled_from([str, str.title, str.upper]),
)
PLAIN: st.SearchStrategy[Written] = st.one_of(INTEGER, DECIMAL, FRACTION, MIXED, POWER, SCALED)
SIGNED: st.SearchStrategy[Written] = st.builds(
    lambda sign, number: (sign + number[0], -number[1] if sign in "-−–" and sign else number[1]),
    st.sampled_from(["", "", "-", "−", "–", "+"]),
    PLAIN,
)
AROUND = [
    "{}", "{}.", "{}\nSome 8 more", "{}. That is all", "({})", "[{}]", "<{}>", '"{}"', "“{}”", "**{}**", "`{}`.", "{}!",
    "${}$", "$${}$$", "\\({}\\)", "\\[\n{}\n\\]", "\\boxed{{{}}}", "$\\fbox{{{}}}$", "\\boxed {{{}}}.",
    "\\mathbf{{{}}}",
    "\\color{{blue}}{{{}}}", "\\textcolor{{red}}{{{}}}", "\\left({}\\right)", "\\displaystyle {}", "x = {}",
    "x \\approx {}",
    "about {}", "approximately ${}$", "${}", "€ {}", "US$ {}", "{} €", "{}%", "{} \\%", "{} percent", "{} apples",
    "{} kg.", "{}\\text{{ meters}}", "{} m^2", "{} km/h", "{} (apples)", "{} degrees", "{}^\\circ", "{}°", "{} each",
    "{} because it is so", "{} apples, since 1 + 1 = 2", "{} = y", "\u200b{}\u200b",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(SIGNED, st.sampled_from(AROUND))
def test_what_is_written_is_what_is_read(number: Written, around: str) -> None:
    """The exact value, whatever stands around it; and in a target as in an answer."""
    text, value = around.format(number[0]), number[1]
    for read in (
        extract_answer(LEAD + text, answer_type="numeric"),
        parse_target(text.split("\nSome")[0], answer_type="numeric"),
    ):
        assert isinstance(read, Number), text
        assert read.exact == value, text


@settings(max_examples=300, deadline=None)
@given(
    SIGNED,
    PLAIN,
    st.sampled_from(
        [
            "{} or {}",
            "{}, {}",
            "{} and {}",
            "{} to {}",
            "{}; {}",
            "{} - {}",
            "{} + {}",
            "{} × {}",
            "{} \\cdot {}",
            "{} ÷ {}",
            "{}\\sqrt{{{}}}",
            "{} apples or {} pears",
            "{} feet {} inches",
            "{} ± {}",
            "{}^{{{}}}",
            "{} vs {}",
            "${}$ or ${}$",
            "$ {} $, ${}$",
            "\\boxed{{{}}} or \\boxed{{{} + 1}}",
            "{}. Or {}",
            "x = {} or x = {}",
        ],
    ),
)
def test_a_number_that_goes_on_is_not_read(one: Written, other: Written, joined: str) -> None:
    assert extract_answer(LEAD + joined.format(one[0], other[0]), answer_type="numeric") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8 = 2 × 4", 8),
        ("54 - 6 = 48 apples", 48),
        ("2/3 ≈ 0.67", "0.67"),
        ("16.67 ≈ 17", 17),
        ("2/3 = 0.6", None),
        ("7 = 9", None),
        ("3! = 6", 6),
        ("n = 4, m = 5", None),
        ("n >= 4", None),
        ("\\le 4", None),
        ("1/4 = 25%", 25),
        ("6 because 2 + 3 = 5", 6),
        ("6 as well as 7", None),
        ("6 (which is 2 + 4)", 6),
        ("6 boxes (2 + 4)", 6),
        ("6 (or 7)", None),
        ("6 (7)", None),
        ("6 hours (360 minutes)", 6),
        ("6(n + 1)", None),
        ("6n", None),
        ("6π", None),
        ("6 times", 6),
        ("6x larger", 6),
        ("6 N", 6),
        ("6 μm", 6),
        ("6 squared", None),
        ("6 and a half", None),
        ("6 hundredths", None),
        ("6 dollars and twenty cents", None),
        ("$3.2B", 3200000000),
        ("$4m", 4000000),
        ("$4 M", 4000000),
        ("4 (m)", 4),
        ("4 ($)", 4),
        ("4 (n)", None),
        ("\\begin{aligned} n &= 4 \\end{aligned}", 4),
        ("\\textcolor[rgb]{0,1,0}{4}", 4),
        ("4 m", 4),
        ("2.5 mil", 2500000),
        ("7k", 7000),
        ("3-million", 3000000),
        ("7h45", None),
        ("7h45min", None),
        ("7ft2in", None),
        ("7x10", None),
        ("7cm2", 7),
        ("7 halves", None),
        ("7 thirds of it", None),
        ("1 third", None),
        ("7 third graders", 7),
        ("7 => 8", None),
        ("7 ==> 8", None),
        ("n = 7 m = 8", None),
        ("n_1 = 7, n_2 = 8", None),
        ("$n_{1}=7$ and $n_{2}=8$", None),
        ("n = 7,2m = 8", None),
        ("9 - 2 = 7 = 7.0", 7),
        ("1,000 m = 1000 m = 1000 m", 1000),
        ("7e", None),
        ("7·x", None),
        ("7⋅10^2", 700),
        ("7∙8", None),
        ("$7!$", None),
        ("$3! = 6$", 6),
        ("7 (but maybe 8)", None),
        ("\u20117", -7),
        ("R$7", 7),
        ("NZ$ 7", 7),
        ("\\Large{7}", 7),
        ("\\ensuremath{7}", 7),
        ("7\\text{ cm}^2", 7),
        ("7 \\mathrm{ m/s}^{2}", 7),
        ("<b>7</b>", 7),
        ("<answer>7</answer>", 7),
        ("7</s>", 7),
        ("7<sup>2</sup>", None),
        ("half a million", None),
        ("9 1/0", None),
        ("4 \\frac{10}{2}", None),
        ("\\frac{-3}{-4}", "0.75"),
        ("-\\$4", -4),
        ("-$-4", None),
        ("1,00,000", None),
        ("1,000'000", None),
        ("6'2\"", None),
        ("5１", None),
        ("8" * 300, None),
        ("1e" + "9" * 4, None),
        ("1e-" + "9" * 4, None),
    ],
)
def test_a_person_would_read(text: str, value: int | str | None) -> None:
    read = extract_answer(LEAD + text, answer_type="numeric")
    assert isinstance(read, Number | None)
    assert (read and read.exact) == (value and Fraction(value))


@pytest.mark.parametrize("write", [str, "{:,}".format, "{}.0".format])
def test_integers_are_exact_beyond_doubles(write: Callable[[int], str]) -> None:
    one, next_one = (read_number(write(n)) for n in (2**60, 2**60 + 1))
    assert one is not None
    assert next_one is not None
    assert float(one) == float(next_one)
    assert one != next_one
    assert not same_answer(one, next_one, 0.01)
    assert same_answer(one, next_one, 1)
    assert pickle.loads(pickle.dumps(next_one)) == next_one, "processes exchange grades"


@pytest.mark.parametrize("base", [0, 3, 4204, 10**9])
def test_the_border_of_the_tolerance_is_within(base: int) -> None:
    for sign in (1, -1):
        edge, beyond = (read_number(str(Decimal(base) + sign * Decimal(n))) for n in ("0.01", "0.010001"))
        assert same_answer(read_number(str(base)), edge, 0.01)
        assert not same_answer(read_number(str(base)), beyond, 0.01)
    assert same_answer(base + 0.01, float(base), 0.01), "a float is its shortest decimals"
