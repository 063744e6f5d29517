"""Answers against the published code's own table, against a person's reading, and against hostile text."""

import json
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carft_fast.rewards.answers import (
    AnswerType,
    base_score,
    compare_latex,
    embedding_partial_score,
    extract_answer,
    grade,
    outside_think,
    parse_target,
)

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "visible" / "reward.json"
PROMPT = "Question:\nTom has 5746 apples, how many? v\nAnswer reasoning:\n"

BAD = "bad target"
_LEAD = "Some reasoning v.\nTherefore, the answer is: "

# Where our rule is meant to differ: (completion after the prompt, target) -> our score (published one in brackets).
NUMERIC_DIFFERENCES: dict[tuple[str, str], float | str] = {
    # read as a person would (published: 0)
    (_LEAD + "- 4204", "-4204"): 1.0,
    (_LEAD + "776,546", "776546"): 1.0,
    (_LEAD + "776,546", "776,546"): 1.0,
    (_LEAD + "$4204", "4204"): 1.0,
    (_LEAD + "4204 apples", "4204"): 1.0,
    (_LEAD + "4204\nMore text", "4204"): 1.0,
    (_LEAD + "\u200b12", "12"): 1.0,
    (_LEAD + "−12", "-12"): 1.0,
    (_LEAD + "(5)", "5"): 1.0,
    (_LEAD + "<5>", "5"): 1.0,
    (_LEAD + "5!", "5"): 1.0,
    (_LEAD + "1/2", "5"): 0.1,
    (_LEAD + "½", "5"): 0.1,
    (_LEAD + "50%", "5"): 0.1,
    # the trigger without its space, newline, colon or capital is still the trigger (published: 0)
    ("Some reasoning v.\nTherefore, the answer is:4204", "4204"): 1.0,
    ("Some reasoning v. Therefore, the answer is: 4204", "4204"): 1.0,
    ("Some reasoning v.\nTherefore, the answer is 4204", "4204"): 1.0,
    ("Some reasoning v.\ntherefore, the answer is: 4204", "4204"): 1.0,
    # not answers (published: 0.1, or 1 when float() makes the target of it)
    (_LEAD + "inf", "5"): 0.0,
    (_LEAD + "-inf", "5"): 0.0,
    (_LEAD + "Infinity", "5"): 0.0,
    (_LEAD + "nan", "5"): 0.0,
    (_LEAD + "NaN", "5"): 0.0,
    (_LEAD + "1e400", "7"): 0.0,
    (_LEAD + "1_000", "1000"): 0.0,
    (_LEAD + "１２", "12"): 0.0,
    (_LEAD + "٣٤", "34"): 0.0,
    # targets that say nothing are reported when the data is loaded (published: 0.1)
    (_LEAD + "inf", "inf"): BAD,
    (_LEAD + "nan", "nan"): BAD,
    (_LEAD + "5", "nan"): BAD,
    (_LEAD + "5", "inf"): BAD,
    (_LEAD + "3", "3_0"): BAD,
    # two numbers, in a target as in an answer (published: 12)
    (_LEAD + "12", "1,2"): BAD,
    (_LEAD + "6", "１６"): BAD,
    # 0.01 apart in decimals, a little more in doubles (published: 0.1)
    (_LEAD + "4204.010", "4204"): 1.0,
    (_LEAD + "1000000", "1000000.01"): 1.0,
    # a currency sign in the target (published: crashes)
    (_LEAD + "5", "$5"): 1.0,
}
# mathqa-numeric crashes on commas in a target as well
MATHQA_NUMERIC_DIFFERENCES = {
    **{case: score for case, score in NUMERIC_DIFFERENCES.items() if case != (_LEAD + "12", "1,2")},
    (_LEAD + "776546", "776,546"): 1.0,
    (_LEAD + "1234", "1,234"): 1.0,
}
CHOICE_DIFFERENCES: dict[tuple[str, str], float | str] = {
    # brackets and full stops around the letter (published: 0.1)
    (_LEAD + "a)", "a"): 1.0,
    (_LEAD + "(a)", "a"): 1.0,
    (_LEAD + "a .", "a"): 1.0,
    ("Some reasoning v.\nTherefore, the answer is:a", "a"): 1.0,
    # no letter, no answer (published: 0.1 for anything)
    (_LEAD, "a"): 0.0,
    (_LEAD + "{}", "a"): 0.0,
    ("Some reasoning v.", "a"): 0.0,
    ("", "a"): 0.0,
    ("x", "a"): 0.0,
    # targets that are no letter a to e (published: compares strings)
    (_LEAD + "é", "É"): BAD,
    (_LEAD + "ß", "SS"): BAD,
    (_LEAD + "İ", "i̇"): BAD,
    (_LEAD + "5", "5"): BAD,
    (_LEAD + "5.0", "5"): BAD,
    ("", ""): BAD,
}
TABLES = {
    "gsm8k": ("numeric", NUMERIC_DIFFERENCES),
    "svamp": ("numeric", NUMERIC_DIFFERENCES),
    "mathqa-numeric": ("numeric", MATHQA_NUMERIC_DIFFERENCES),
    "mathqa": ("choice", CHOICE_DIFFERENCES),
}


@pytest.mark.parametrize("name", TABLES)
def test_rewards_of_the_published_code(name: str) -> None:
    """Every row of the table scores as published, but for the differences listed above, each of which occurs."""
    if not GOLDEN.is_file():
        pytest.skip(f"reference table {GOLDEN} does not exist")
    answer_type, expected = TABLES[name]
    differences: dict[tuple[str, str], float | str] = {}
    for row in json.loads(GOLDEN.read_text())["sets"][name]:
        try:
            ours: float | str = base_score(grade(row["completion"], row["answer_value"], answer_type=answer_type))
        except ValueError:
            ours = BAD
        published = row.get("reward", BAD)  # without a reward the published code raises
        if ours != published:
            differences[row["completion"].rsplit("Answer reasoning:\n", 1)[-1], row["answer_value"]] = ours
    assert differences == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,234,567.5", 1234567.5),
        ("$1,000.", 1000.0),
        ("-$5", -5.0),
        ("5kg", 5.0),
        ("12 - 5 = 7", 7.0),
        ("£3.50 each", 3.5),
        ("3/0", None),
        ("1,2", None),
        ("1 000", None),
        ("0x10", None),
        ("--5", None),
        ("10x more", 10.0),
        ("1.5 2", None),
        ("5.5_0", None),
        ("1/2_0", None),
        ("1e99999", None),
        (" " * 300 + "42", 42.0),
        ("", None),
        ("none", None),
    ],
)
def test_a_person_would_read(text: str, expected: float | None) -> None:
    assert extract_answer(f"so.\nTherefore, the answer is: {text}", answer_type="numeric") == expected


def test_the_last_trigger_of_the_last_reasoning_counts() -> None:
    text = f"{PROMPT}a\nTherefore, the answer is <203>.\nTherefore, the answer is: 204.0"
    assert extract_answer(text, answer_type="numeric") == 204
    assert extract_answer(text + "\nAnswer reasoning:\nno", answer_type="numeric") is None
    assert extract_answer("42", answer_type="numeric") == 42
    assert extract_answer("42 of them, perhaps 43", answer_type="numeric") is None


@pytest.mark.parametrize(
    ("text", "expected"), [("b", "b"), ("(C)", "c"), ('"d"', "d"), ("E.", "e"), ("f", None), ("be", None)]
)
def test_choice_letters(text: str, expected: str | None) -> None:
    assert extract_answer(f"x\nTherefore, the answer is: {text}", answer_type="choice") == expected


@pytest.mark.parametrize(
    "around",
    [
        "{}",
        "({})",
        "${}$",
        "$\\text{{{}}}$",
        "\\textbf{{({})}}",
        "\\boxed{{\\text{{({})}}}}",
        "\\fbox{{{}}}",
        "**{}**",
        "$\\mathrm{{{}}}$.",
        "{}) 4 or 7",
        "Option {}.",
        "The answer is {}",
        "{} because A is wrong",
        "{}. Not D",
        "{}, ({})",
        "{}, a nice choice",
    ],
)
@pytest.mark.parametrize("letter", "BCE")
def test_a_letter_is_read_whatever_stands_around_it(letter: str, around: str) -> None:
    text = around.format(letter, letter)
    assert extract_answer(f"x\nTherefore, the answer is: {text}", answer_type="choice") == letter.lower()
    assert parse_target(text, answer_type="choice") == letter.lower()


@pytest.mark.parametrize(
    "text",
    [
        "{} or {}",
        "{}, {}",
        "{} and {}",
        "{}/{}",
        "({}), ({})",
        "{} & {}",
        "{} {}",
        "{} or maybe {}",
        "either {} or {}",
        "{} vs {}",
        "${}$ or ${}$",
        "\\boxed{{{}}} or \\boxed{{{}}}",
        "\\boxed{{{}, {}}}",
        "{}\nor {}",
        "{} - {}",
        "{}; {}",
        "{} and option {}",
        "{} versus {}",
        "{} through {}",
        "{}, alternatively {}",
        "{} as well as {}",
        "{} along with {}",
        "{}, or else {}",
        "{} but maybe {}",
        "{}、{}",
        "{} = {}",
        "{}) 12 or {}) 15",
        "({}) 12 and ({}) 15",
        "({}) 12, ({}) 15",
        "**{}.** 12 or **{}.** 15",
        "Option {} (12) or option {} (15)",
        "{}: 12 apples or {}",
        "\\textbf{{({})}} 12 \\text{{ or }} \\textbf{{({})}} 15",
    ],
)
@pytest.mark.parametrize("letters", ["CD", "AE", "BA"])
def test_of_several_letters_none_is_read(letters: str, text: str) -> None:
    text = text.format(*letters)
    assert extract_answer(f"x\nTherefore, the answer is: {text}", answer_type="choice") is None
    with pytest.raises(ValueError, match="not a letter"):
        parse_target(text.replace("\n", " "), answer_type="choice")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("We get \\fbox{27}.", 27),
        ("We get \\boxed 12.", 12),
        ("We get \\boxed{12} units, not 13.", 12),
        ("We get $\\boxed {12}$", 12),
        ("\\boxed\\frac{1}{2}", 0.5),
        ("\\boxed{\\boxed{12}}", 12),
        ("\\boxed{12}, that is \\boxed{12}", 12),
        ("First \\boxed{3}. Now mended: \\boxed{8}", 8),
        ("\\boxed{3} or \\boxed{8}", None),
        ("\\boxed{3}, \\boxed{8}", None),
        ("\\boxed{30 - 8}", None),
        ("\\boxed{3} and \\boxed{", None),
        ("\\boxed{}", None),
    ],
)
def test_boxes(text: str, expected: float | None) -> None:
    assert extract_answer(text, answer_type="numeric") == expected
    assert extract_answer(f"So.\nTherefore, the answer is: {text}", answer_type="numeric") == expected


def test_targets() -> None:
    assert parse_target("1,234.0", answer_type="numeric") == 1234
    assert parse_target(" B ", answer_type="choice") == "b"
    assert parse_target("2 + 1 = 3.\nTherefore, the answer is: 9", answer_type="numeric") == 9
    assert parse_target("Therefore, the answer is: (B)", answer_type="choice") == "b"
    assert parse_target("Therefore, the answer is: $y^2$", answer_type="latex") == "y^2"
    for bad in ("many", "", "inf", "nan", "1_000", "1e999"):
        with pytest.raises(ValueError, match="answer"):
            parse_target(bad, answer_type="numeric")
    for bad in ("f", "ab", ""):
        with pytest.raises(ValueError, match="letter"):
            parse_target(bad, answer_type="choice")


def test_scores() -> None:
    def score(text: str) -> float:
        return base_score(grade(f"\nTherefore, the answer is: {text}", "5", answer_type="numeric"))

    assert (score("5.01"), score("5.02"), score("what")) == (1.0, 0.1, 0.0)
    right = grade("\nTherefore, the answer is: 5", "5", answer_type="numeric")
    assert base_score(right, partial_score=0.5, correct_score=2.5) == 2.5
    assert embedding_partial_score(-1.0) == pytest.approx(0.1)
    assert embedding_partial_score(1.0) == pytest.approx(0.3)


TEXT = st.one_of(
    st.text(),
    st.text(st.characters(codec=None)),  # surrogates and null bytes as well
    st.text("0123456789.,/-−+eEx×^*⁵½ $%()={}\\\n\u200fabfrc"),
)


@settings(max_examples=400, deadline=None)
@given(
    TEXT,
    st.sampled_from(["", "\nTherefore, the answer is: ", "\nAnswer reasoning:\n", "\\boxed{", "```python\n"]),
    TEXT,
)
def test_never_raises(before: str, trigger: str, after: str) -> None:
    grade(before + trigger + after, "5", answer_type="numeric")
    grade(before + trigger + after, "a", answer_type="choice")
    for answer_type in ("latex", "program"):
        found = extract_answer(before + trigger + after, answer_type=answer_type)
        assert found is None or (isinstance(found, str) and found.strip())


WRITTEN: list[Callable[[float], str]] = [
    repr,
    lambda x: f"{x:,}",
    lambda x: f"{x:e}",
    lambda x: f"${x}",
    lambda x: f"{x} kg",
    lambda x: f"**{x}**.",
    lambda x: f"({x})",
    lambda x: f"y = {x}",
    lambda x: f"\\boxed{{{x}}}",
    lambda x: f"{x}".replace("-", "−"),
]


@settings(max_examples=200, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(WRITTEN))
def test_a_formatted_number_is_read_back(value: float, write: Callable[[float], str]) -> None:
    read = extract_answer(f"so\nTherefore, the answer is: {write(value)}", answer_type="numeric")
    assert read == pytest.approx(value, rel=1e-6, abs=0)


@settings(max_examples=200, deadline=None)
@given(st.decimals(-1000, 1000, places=3), st.decimals(-1000, 1000, places=3))
def test_numeric_equality_is_symmetric(one: Decimal, other: Decimal) -> None:
    def correct(answer: Decimal, target: Decimal) -> bool:
        text = f"\nTherefore, the answer is: {answer}"
        return grade(text, str(target), answer_type="numeric", tolerance=50).correct

    assert correct(one, other) == correct(other, one)
    assert correct(one, one)


@pytest.mark.parametrize("text", ["1/2", "-$5", "1,234.5", "50%", "3 1/2", "3e5", "3 x 10^5", "½", "−5", "5 kg"])
def test_target_and_answer_are_read_by_one_rule(text: str) -> None:
    read = extract_answer(f"\nTherefore, the answer is: {text}", answer_type="numeric")
    assert read is not None
    assert parse_target(text, answer_type="numeric") == read


@pytest.mark.parametrize(
    ("answer", "target", "verdict"),
    [
        ("0.5", r"\frac12", "same"),
        ("3 1/2", r"\frac{7}{2}", "same"),
        ("x^2 + 2x + 1", "(x+1)^2", "same"),
        (r"\sqrt{8}", r"2\sqrt{2}", "same"),
        ("5 apples", "5", "same"),
        ("[0,1)", "(0,1)", "different"),
        ("0.33", r"\frac13", "different"),
        ("I do not know", "3", "unreadable"),
        ("inf", "3", "unreadable"),
        ("\\", "3", "unreadable"),
        (r"\begin{pmatrix} 4 \\ 7 \end{pmatrix}", r"\begin{bmatrix} 4 \\ 7 \end{bmatrix}", "same"),
        (r"\begin{pmatrix} 4 \\ 7 \end{pmatrix}", r"\begin{pmatrix} 7 \\ 4 \end{pmatrix}", "different"),
        (r"\begin{array}{cccc} 1 & 2 & 3 & 4 \end{array}", r"\begin{pmatrix} 1 & 2 & 3 & 4 \end{pmatrix}", "same"),
        (r"\begin{cases} a \\ b \end{cases}", r"\begin{cases} a\\b \end{cases}", "same"),
        (r"\textcolor{green}{\frac{1}{8}}", "0.125", "same"),
        (r"\color{green}{9}", "9", "same"),
        (r"\mathbf{23}", "23", "same"),
        (r"\text{23}", "23", "same"),
        (r"23\textsf{ miles}", "23", "same"),
        ("23", "23 (miles)", "same"),
        (r"\frac{-3}{4}", r"-\frac{3}{4}", "same"),
        ("9:45", "9:45", "same"),
        ("9:45", "9:50", "different"),
        (r"\frac{4}{0}", r"\frac{4}{0}", "same"),
        (r"\frac{4}{0}", "4", "different"),
        ("35 percent", r"35\%", "same"),
        ("35.0", r"35\%", "same"),
        ("60°", r"60^\circ", "same"),
        ("60", r"60^{\circ}", "same"),
        ("3√5", r"3\sqrt{5}", "same"),
        ("√(y + 1)", r"\sqrt{y+1}", "same"),
        ("y² − 1", "(y-1)(y+1)", "same"),
        ("7²", "49", "same"),
        ("5e-4", "0.0005", "same"),
        (r"1.2 \times 10^{22}", "1.2e22", "same"),
        (r"75\,000", "75000", "same"),
        ("75{,}001", "75000", "different"),
        ("9007199254740995", "9007199254740994", "different"),
        ("2⅓", r"\frac{7}{3}", "same"),
        ("y=4", r"$y=4$ or $y=-4$", "different"),
        (r"$y=-4$ or $y=4$", r"y=4 \text{ or } y=-4", "same"),
        ("4, 5, 6", "$4$ and $5$ and $6$", "same"),
        ("6", "$4$ and $5$ and $6$", "different"),
        ("2:3", "AB:CD = 2:3", "same"),
        ("3:2", "AB:CD = 2:3", "different"),
        ("7k", "7000", "different"),
        (r"\frac{1}{4}x", "0.25", "different"),
        ("\\begin{aligned}\n y &= 6\n\\end{aligned}", "6", "same"),
        (r"\begin{equation}\label{eq:result} y = 6 \end{equation}", "y = 6", "same"),
        ("\\begin{pmatrix}\n1\n\\\\\n2\n\\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}", "same"),
        (r"\textcolor[rgb]{0,1,0}{6} \tag{2}", "6", "same"),
        (r"10^{2}x", "100", "different"),
        ("4", r"4\text{ feet and }3\text{ inches}", "different"),
        (r"4\text{ feet and }3\text{ inches}", r"4\text{ feet and } 3\text{ inches}", "same"),
        ("|-7|", "7", "same"),
        (r"x \approx 1.5", "1.5", "same"),
        ("7 = 8", "8", "unreadable"),
        (r"3/4 = 75\%", "0.75", "same"),
        (r"121_3", r"121_4", "different"),
        (r"121_3", r"121_{3}", "same"),
        (r"0.\overline{4}", r"\frac{4}{9}", "same"),
        (r"\frac{7}{12}", r"0.58\overline{3}", "same"),
        (r"0.\overline{4}", "0.4", "different"),
        (r"\mathbb Z", r"\mathbb{Z}", "same"),
        (r"9 \text{ or more}", "9", "unreadable"),
        ("3⋅7", "21", "same"),
    ],
)
def test_latex_is_compared_as_mathematics(answer: str, target: str, verdict: str) -> None:
    assert compare_latex(answer, str(parse_target(target, answer_type="latex"))) == verdict


@pytest.mark.parametrize(
    ("text", "source"),
    [
        (r"so \boxed{\frac{1}{2}} is it.", r"\frac{1}{2}"),
        ("Therefore, the answer is: $x^2$.", "x^2"),
        ("Therefore, the answer is: the number $n$ is $3$", "3"),
        ("Therefore, the answer is: \\[\n x \n\\]", "x"),
        (r"\boxed{1} no. Therefore, the answer is: \boxed{2}", "2"),
        ("nothing", None),
        (r"\boxed{1", None),
        ("Therefore, the answer is: roughly \\[7\\]", "7"),
        ("Therefore, the answer is: $a$ and $b$ are $2$ and $3$", r"2 \text{ or } 3"),
        ("Therefore, the answer is: $2$ but maybe $3$", None),
        ("Therefore, the answer is: $2$ or 3", None),
        ("Therefore, the answer is: -$2$", "-2"),
        ("Therefore, the answer is: 2$x$", "2x"),
        ("Therefore, the answer is: \\begin{cases}\na\n\\end{cases}\nfor $b$", "\\begin{cases}\na\n\\end{cases}"),
        (r"\boxed{2} or \boxed{3}", r"2 \text{ or } 3"),
        (r"\boxed{\{2\}}", r"\{2\}"),
        ("Therefore, the answer is: at least $2$", None),
        ("Therefore, the answer is: more than $2$", None),
        ("Therefore, the answer is: not $2$", None),
    ],
)
def test_latex_source(text: str, source: str | None) -> None:
    assert extract_answer(text, answer_type="latex") == source


@pytest.mark.parametrize(
    "text",
    ["$a=2$, where $b>0$", "I do not know", "", "inf", "x" * 501],
)
def test_latex_targets_that_are_refused(text: str) -> None:
    """Nothing of a target is cut off without a word."""
    with pytest.raises(ValueError, match="not LaTeX that can be compared"):
        parse_target(text, answer_type="latex")


PROGRAMS = [
    "def solution():\n    return 5",
    'def solution():\n    """Not a fence:\n\n```\n5\n```\n    """\n    return 5',
    "def solution():\n    text = '~~~ or ```'\n    return 5  # ``` no more",
    "import math\n\n\ndef solution():\n    if 'it''s':\n        return math.floor(5.5)",
]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "around",
    [
        "{}",
        "```python\n{}\n```",
        "So:\n```\n{}\n```\nDone.",
        "a\nAnswer reasoning:\n{}",
        "```Python\n{}\n```",
        "``` PY3 \n{}\n```",
        "~~~\n{}\n~~~",
        "````python\n{}\n````",
        "```{{.python #a}}\n{}\n```",
        '```python title="a.py"\n{}\n```',
        "```python\n{}\n```\nIt prints:\n```\n5\n```",
        "{}\n```\n5\n```",
        "{}\n```",
        "Run it:\n```sh\npython a.py\n```\nThe code:\n```python\n{}\n```",
        "It's this: ```python\n{}\n```",
        "```python\n{}",
        "```python\ndef solution():\n    return 4\n```\nNo:\n```python\n{}\n```",
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_program_source(around: str, program: str, newline: str) -> None:
    text = around.format(program).replace("\n", newline)
    text = text.replace(f"Answer reasoning:{newline}", "Answer reasoning:\n").replace("a\r\nA", "a\nA")
    assert extract_answer(text, answer_type="program") == program


def test_a_byte_order_mark_before_a_program() -> None:
    """Python takes none in a text."""
    program = extract_answer("\ufeffdef solution():\n    return 7", answer_type="program")
    found: dict[str, object] = {}
    exec(str(program) + "\nresult = solution()", found)
    assert found["result"] == 7


def test_an_indented_fence() -> None:
    text = "1. This:\n\n   ```python\n   def solution():\n       return 5\n   ```\n2. Done."
    assert extract_answer(text, answer_type="program") == PROGRAMS[0]


@pytest.mark.parametrize(
    "unit", ["1", "9,", "(", " ", "Therefore, the answer is: ", "1/", "= ", "therefore, the answer is"]
)
def test_a_megabyte_reads_as_its_beginning_does(unit: str) -> None:
    """Only so much is read after the trigger; a quadratic reader would take hours over this."""

    def read(size: int) -> tuple[object, ...]:
        text, trigger = unit * (size // len(unit)), "\nTherefore, the answer is: "
        return tuple(extract_answer(x, answer_type="numeric") for x in (trigger + text, f"{text}{trigger}7"))

    assert read(1_000_000) == read(10_000)
    assert read(1_000_000)[1] == 7


@pytest.mark.parametrize(
    "unit", ["```", "``` \t", " ", "\\boxed{", "{", "}", "$", "the ", "\\text{", "Answer reasoning:\n"]
)
@pytest.mark.parametrize("answer_type", ["numeric", "choice", "latex", "program"])
def test_a_megabyte_of_any_type(answer_type: AnswerType, unit: str) -> None:
    """A quadratic reader would need 10^12 operations."""
    long = unit * (1_000_000 // len(unit))
    for text in (long, f"```{long}x", f"\nTherefore, the answer is: {long}x", f"\\boxed{{{long}"):
        found = extract_answer(text, answer_type=answer_type)
        assert found is None or len(str(found)) <= 65536


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("<think>Therefore, the answer is: 4</think>Therefore, the answer is: 5", 5.0),
        ("<think>\nso 4\n</think>\n\n7", 7.0),
        ("Therefore, the answer is: 5\n<think>or 6? Therefore, the answer is: 6</think>", 5.0),
        ("<think>a</think> so <think>b</think> \\boxed{8}", 8.0),
        ("it opened in the prompt: 3</think>9", 9.0),
        ("<think>one <think>two</think> 3</think> 9", 9.0),
        ("Therefore, the answer is: <think>4?</think> 5", 5.0),
        ("Therefore, the answer is: 5 <think>and then it was cut", None),
        ("<think>5", None),
        ("<think>Therefore, the answer is: 5</think>", None),
        ("Therefore, the answer is: 5", 5.0),
    ],
)
def test_what_is_thought_is_no_answer(text: str, number: float | None) -> None:
    assert extract_answer(outside_think(text), answer_type="numeric") == number


@pytest.mark.parametrize("unit", ["<think>", "</think>", "<think></think>", "<think>a</think>5 "])
def test_a_megabyte_of_thoughts(unit: str) -> None:
    """A quadratic reader would need minutes."""
    start = time.process_time()
    outside_think(unit * (1_000_000 // len(unit)))
    assert time.process_time() - start < 2
