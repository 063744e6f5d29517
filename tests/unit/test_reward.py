"""Answers against the published code's own table, against a person's reading, and against hostile text."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carft_fast.reward import base_score, embedding_partial_score, extract_answer, grade, parse_target

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
    (_LEAD + "6", "１６"): BAD,
    # a currency sign in the target (published: crashes)
    (_LEAD + "5", "$5"): 1.0,
}
# mathqa-numeric crashes on commas in a target as well
MATHQA_NUMERIC_DIFFERENCES = NUMERIC_DIFFERENCES | {
    (_LEAD + "776546", "776,546"): 1.0,
    (_LEAD + "1234", "1,234"): 1.0,
    (_LEAD + "12", "1,2"): 1.0,
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


def test_targets() -> None:
    assert parse_target("1,234.0", answer_type="numeric") == 1234
    assert parse_target(" B ", answer_type="choice") == "b"
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
    assert embedding_partial_score(-1.0) == pytest.approx(0.1)
    assert embedding_partial_score(1.0) == pytest.approx(0.3)


@settings(max_examples=300, deadline=None)
@given(st.text(), st.sampled_from(["", "\nTherefore, the answer is: ", "\nAnswer reasoning:\n"]), st.text())
def test_never_raises(before: str, trigger: str, after: str) -> None:
    for answer_type in ("numeric", "choice"):
        grade(before + trigger + after, "5" if answer_type == "numeric" else "a", answer_type=answer_type)


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
