"""Every format, every reason to leave a row out, every way a source can be unreadable."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from carft_fast.core.errors import InputError
from carft_fast.core.example import Example
from carft_fast.data.load import LoadReport, load_examples

ROW = {"item_id": "r1", "question": "What is 1 + 1?", "answer_cot": "Add.", "answer_value": "2"}
GSM8K_ROW = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24.\n24+48 = $<<24+48=72>>72.\n#### 1,072"}


def write_json(path: Path, content: object) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def write_lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def refusal(path: str, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        load_examples(path, **{"require_cot": False, **options})
    return str(error.value)


@pytest.mark.parametrize("format", ["reft", "auto"])
def test_reft(tmp_path: Path, format: Any) -> None:
    path = write_json(tmp_path / "a.json", [ROW, {**ROW, "item_id": "r2", "answer_value": 3.5}])
    examples, report = load_examples(path, format=format, require_cot=True)
    assert examples == [
        Example("r1", "What is 1 + 1?", ("Add.",), "2"),
        Example("r2", "What is 1 + 1?", ("Add.",), "3.5"),
    ]
    assert (report.source, report.rows_read, report.rows_used, report.rejected) == (path, 2, 2, {})


@pytest.mark.parametrize("format", ["gsm8k", "auto"])
def test_gsm8k(tmp_path: Path, format: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", [GSM8K_ROW])
    examples, _ = load_examples(path, format=format, require_cot=True)
    assert examples == [Example("1", "How many?", ("48/2 = 24.\n24+48 = $72.",), "1,072")]


def test_own_jsonl_with_a_field_mapping(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"q": "Two?", "why": "Because.", "a": 2, "key": 17}])
    fields = {"question": "q", "cot": "why", "answer": "a", "item_id": "key"}
    examples, _ = load_examples(path, format="jsonl", fields=fields, require_cot=True)
    assert examples == [Example("17", "Two?", ("Because.",), "2")]
    del fields["item_id"]
    assert load_examples(path, fields=fields, require_cot=True)[0][0].item_id == "1"  # the row's number


@pytest.mark.parametrize("format", ["gsm8k", "auto"])
def test_calculator_marks_can_be_kept(tmp_path: Path, format: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", [GSM8K_ROW])
    examples, _ = load_examples(path, format=format, calculator_marks="keep", require_cot=True)
    assert examples[0].cots == ("48/2 = <<48/2=24>>24.\n24+48 = $<<24+48=72>>72.",)


def test_several_annotations_in_a_row(tmp_path: Path) -> None:
    several = {**ROW, "answer_cot": ["Add.", " ", "Count.", "Add. "]}
    bad = {**ROW, "answer_cot": ["Add.", {"text": "Count."}]}
    none = {**ROW, "answer_cot": ["", " "]}
    examples, report = load_examples(write_json(tmp_path / "a.json", [several, bad, none]), require_cot=True)
    assert examples == [Example("r1", "What is 1 + 1?", ("Add.", "Count."), "2")]
    assert report.rejected == {
        'cot is neither text nor number (field "answer_cot")': 1,
        "no annotated reasoning": 1,
    }


def test_rows_of_a_question_are_merged_where_asked(tmp_path: Path) -> None:
    rows = [
        ROW,
        {**ROW, "item_id": "r2", "question": "Other?"},
        {**ROW, "item_id": "r3", "answer_cot": "Count.", "answer_value": "2.0"},
        {**ROW, "item_id": "r4", "answer_value": "3"},
        {**ROW, "item_id": "r5"},
    ]
    path = write_json(tmp_path / "a.json", rows)
    assert len(load_examples(path, require_cot=True)[0]) == 5
    examples, report = load_examples(path, merge_questions=True, require_cot=True)
    assert examples == [
        Example("r1", "What is 1 + 1?", ("Add.", "Count."), "2"),
        Example("r2", "Other?", ("Add.",), "2"),
        Example("r4", "What is 1 + 1?", ("Add.",), "3"),
    ]
    assert (report.rows_read, report.rows_used, report.rows_merged) == (5, 3, 2)
    assert "2 merged into an earlier row" in report.summary()
    limited, _ = load_examples(path, merge_questions=True, require_cot=True, limit=1)
    assert limited == examples[:1], "the annotations of later rows belong to the rows that are kept"


def test_hub_reads_a_dataset_folder_offline(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_lines(folder / "train.jsonl", [GSM8K_ROW, GSM8K_ROW])
    write_lines(folder / "test.jsonl", [{**GSM8K_ROW, "question": "Held out?"}])
    for format in ("hub", "auto"):
        train, report = load_examples(str(folder), format=format, require_cot=True)
        assert train == [Example(number, "How many?", ("48/2 = 24.\n24+48 = $72.",), "1,072") for number in ("1", "2")]
        assert report.rows_read == 2
    test, _ = load_examples(str(folder), split="test", require_cot=True)
    assert [example.question for example in test] == ["Held out?"]
    assert "validation" in refusal(str(folder), split="validation")


def test_hub_with_a_field_mapping(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_lines(folder / "train.jsonl", [{"q": "Two?", "why": "Because.", "a": 2}])
    fields = {"question": "q", "cot": "why", "answer": "a"}
    examples, _ = load_examples(str(folder), fields=fields, require_cot=True)
    assert examples == [Example("1", "Two?", ("Because.",), "2")]


def test_hub_failure_keeps_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = refusal("someone/somewhere")
    assert message.startswith("someone/somewhere: ")
    assert "Couldn't reach the Hub" in message
    assert "\n" not in message


# reason -> (row, what the shown example must contain)
REJECTED: dict[str, tuple[Any, str]] = {
    "not an object": ([1, 2], "[1, 2]"),
    'no question (field "question")': ({**ROW, "question": "  "}, "r1"),
    'no answer (field "answer_value")': ({**ROW, "answer_value": None}, "What is 1 + 1?"),
    "no annotated reasoning": ({**ROW, "answer_cot": ""}, "What is 1 + 1?"),
    "unparsable answer": ({**ROW, "answer_value": "many"}, "many"),
    'question is neither text nor number (field "question")': ({**ROW, "question": ["Two?"]}, "Two?"),
    'cot is neither text nor number (field "answer_cot")': ({**ROW, "answer_cot": {"a": 1}}, "{'a': 1}"),
    'answer is neither text nor number (field "answer_value")': ({**ROW, "answer_value": True}, "True"),
    'item_id is neither text nor number (field "item_id")': ({**ROW, "item_id": math.nan}, "nan"),
}


@pytest.mark.parametrize("value", [True, False, math.nan, math.inf, -math.inf, [math.nan], ["a", True]])
@pytest.mark.parametrize("field", ["question", "answer_cot", "answer_value", "item_id"])
def test_json_values_that_are_no_text_do_not_become_one(tmp_path: Path, field: str, value: Any) -> None:
    rows = [ROW, {**ROW, field: value}]
    for content in (json.dumps(rows), "\n".join(map(json.dumps, rows))):
        (tmp_path / "a.json").write_text(content)
        examples, report = load_examples(str(tmp_path / "a.json"), require_cot=True)
        assert [example.item_id for example in examples] == ["r1"]
        assert sum(report.rejected.values()) == 1


def test_integers_too_long_for_a_text_are_counted() -> None:
    huge = 10**5000
    rows = [ROW, *({**ROW, name: huge} for name in ROW), {**ROW, "answer_cot": [huge]}, huge]
    found, report = load_examples(rows, label="rows", require_cot=True)
    assert len(found) == 1
    assert sum(report.rejected.values()) == 6
    assert report.rejected['answer is neither text nor number (field "answer_value")'] == 1


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("how", ["list", "indented list", "lines", "indented objects", "Windows lines"])
def test_a_file_is_known_by_its_content(tmp_path: Path, how: str, mark: str, name: str) -> None:
    rows = [{**ROW, "item_id": f"r{i}", "question": f"{i}\u2028?"} for i in range(3)]
    plain, indented = ([json.dumps(row, indent=n, ensure_ascii=False) for row in rows] for n in (None, 2))
    content = {
        "list": json.dumps(rows),
        "indented list": json.dumps(rows, indent=4),
        "lines": "\n".join(plain) + "\n\n",
        "indented objects": "\n".join(indented),
        "Windows lines": "\r\n".join(plain),
    }[how]
    (tmp_path / name).write_text(mark + content, encoding="utf-8")
    for format in ("auto", "reft", "jsonl"):
        examples, _ = load_examples(str(tmp_path / name), format=format, require_cot=True)
        assert [(e.item_id, e.question) for e in examples] == [(f"r{i}", f"{i}\u2028?") for i in range(3)]


@pytest.mark.parametrize("reason", REJECTED)
def test_unusable_rows_are_counted_and_shown(tmp_path: Path, reason: str) -> None:
    row, excerpt = REJECTED[reason]
    path = write_json(tmp_path / "a.json", [ROW, *[row] * 5])
    examples, report = load_examples(path, require_cot=True)
    assert len(examples) == 1
    assert (report.rows_read, report.rows_used, report.rejected) == (6, 1, {reason: 5})
    shown = report.examples[reason]
    assert [text.split(":")[0].split(" (")[0] for text in shown] == ["row 2", "row 3", "row 4"]
    assert excerpt in shown[0]
    lines = report.summary().splitlines()
    assert lines[0] == f"{path}: 1 of 6 rows used"
    assert lines[1].strip() == f"5 left out: {reason}"
    assert len(lines) == 5


@pytest.mark.parametrize("value", ["nan", "inf", "1_000", "5 or 6"])
def test_answers_nobody_could_match_are_unparsable(tmp_path: Path, value: object) -> None:
    path = write_json(tmp_path / "a.json", [ROW, {**ROW, "answer_value": value}])
    assert load_examples(path, require_cot=True)[1].rejected == {"unparsable answer": 1}


def test_answer_type_decides_what_is_parsable(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [{**ROW, "answer_value": "c"}, ROW])
    for answer_type, kept in (("choice", "c"), ("numeric", "2")):
        examples, report = load_examples(path, answer_type=answer_type, require_cot=True)
        assert [example.answer for example in examples] == [kept]
        assert report.rejected == {"unparsable answer": 1}


def test_reasoning_is_only_required_where_asked(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [{k: v for k, v in ROW.items() if k != "answer_cot"}])
    assert load_examples(path, require_cot=False)[0][0].cots == ()
    assert "1 left out: no annotated reasoning" in refusal(path, require_cot=True)


def test_no_usable_row_is_an_error_with_the_summary(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [{**ROW, "answer_value": "many"}, 5])
    message = refusal(path)
    for part in ("a.json", "0 of 2", "1 left out: unparsable answer", "1 left out: not an object", "row 1 (r1)"):
        assert part in message


def test_limit_counts_usable_rows(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [5, *({**ROW, "item_id": f"r{i}"} for i in range(9))])
    examples, report = load_examples(path, require_cot=True, limit=3)
    assert [example.item_id for example in examples] == ["r0", "r1", "r2"]
    assert (report.rows_read, report.rejected) == (4, {"not an object": 1})


def test_later_stages_add_their_reasons() -> None:
    report = LoadReport("source", 2, 2)
    report.reject("longer than max_length", "r1", "x" * 500)
    assert report.summary().splitlines()[1] == "  1 left out: longer than max_length"
    assert len(report.summary().splitlines()[2]) < 120


UNREADABLE: dict[str, tuple[str, str, list[str]]] = {
    "malformed list": ("a.json", '[\n{"question": "a"},\n{"question" "b"}\n]', ["a.json, line 3", "not valid JSON"]),
    "malformed line": ("a.jsonl", '{"question": "a", "answer": "1"}\n\n{"question": }\n', ["a.jsonl, line 3"]),
    "cut off": ("a.jsonl", '{"question": "a", "answer": "1"}\n{"question": "b"', ["a.jsonl, line 2"]),
    "empty": ("a.json", "", ["a.json", "no rows"]),
    "empty lines": ("a.jsonl", "\n\n", ["a.jsonl", "no rows"]),
    "empty list": ("a.json", "[]", ["a.json", "no rows"]),
    "object": ("a.json", '{"rows": []}', ["a.json", "'question'", "the rows have rows"]),
    "text": ("a.json", '"rows"', ["a.json", "JSON list", "str"]),
    "digits": ("a.jsonl", '{"question": "a"}\n{"answer": %s}' % ("9" * 5000), ["a.jsonl, line 2", "4300 digits"]),
    "brackets": ("a.json", "[" * 200_000, ["a.json, line 1", "cannot be read"]),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_content(tmp_path: Path, case: str) -> None:
    name, content, expected = UNREADABLE[case]
    (tmp_path / name).write_text(content, encoding="utf-8")
    message = refusal(str(tmp_path / name))
    for part in expected:
        assert part in message


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"question": "caf\xe9"}]')
    assert "not UTF-8" in refusal(str(tmp_path / "a.json"))


@pytest.mark.parametrize("format", ["auto", "reft", "gsm8k", "jsonl"])
def test_missing_file_is_named(tmp_path: Path, format: str) -> None:
    path = str(tmp_path / "none.json")
    assert f"{path}: no such file" in refusal(path, format=format)


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_json(tmp_path / "a.json", [ROW])

    def denied(*_: Any, **__: Any) -> str:
        raise PermissionError(13, os.strerror(13), path)

    monkeypatch.setattr(Path, "read_text", denied)
    assert f"{path}: cannot be read: Permission denied" in refusal(path)


@pytest.mark.parametrize("name", ["question", "cot", "answer", "item_id"])
def test_a_mapped_field_no_row_has_names_those_there_are(tmp_path: Path, name: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"question": "Two?", "why": "So.", "answer": "2"}])
    fields = {"cot": "why", name: "typo"}
    message = refusal(path, fields=fields, require_cot=True)
    for part in ("'typo'", name, "question, why, answer"):
        assert part in message


def test_a_mapped_reasoning_field_may_be_missing_from_a_test_set(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"question": "Two?", "answer": "2"}])
    examples, _ = load_examples(path, fields={"cot": "why"}, require_cot=False)
    assert examples == [Example("1", "Two?", (), "2")]


def test_unknown_name_in_the_mapping(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"question": "Two?", "answer": "2"}])
    message = refusal(path, fields={"prompt": "question"})
    assert "'prompt'" in message
    assert "question, cot, answer, item_id" in message


def test_a_first_row_without_a_field_does_not_speak_for_the_others(tmp_path: Path) -> None:
    full = {"question": "Two?", "answer": "2", "item_id": "x"}
    path = write_lines(tmp_path / "a.jsonl", [{"question": "One?"}, full])
    examples, report = load_examples(path, require_cot=False)
    assert examples == [Example("x", "Two?", (), "2")]
    assert report.rejected == {'no answer (field "answer")': 1}


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\u2029"])
def test_line_separators_inside_json_text_do_not_end_a_line(tmp_path: Path, separator: str) -> None:
    row = {"question": f"One{separator}two?", "answer": "2"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert load_examples(str(tmp_path / "a.jsonl"), require_cot=False)[0][0].question == row["question"]


@pytest.mark.parametrize(
    ("name", "rows", "answer_type", "require_cot"),
    [
        ("svamp_nl.json", 3076, "numeric", True),
        ("svamp_test_set.json", 1000, "numeric", False),
        ("gsm8k_train.jsonl", 7473, "numeric", True),
        ("gsm8k_test_set.json", 1319, "numeric", False),
        ("mathqa-numeric_test_set.json", 1605, "numeric", False),
        ("mathqa_test_set.json", 1605, "choice", False),
    ],
)
def test_real_sets_are_read_whole(
    shared_data: Callable[[str], Path], name: str, rows: int, answer_type: Any, require_cot: bool
) -> None:
    examples, report = load_examples(str(shared_data(name)), answer_type=answer_type, require_cot=require_cot)
    assert (len(examples), report.rows_read, report.rejected) == (rows, rows, {})
    assert not any("<<" in cot or "####" in cot for example in examples for cot in example.cots)
    assert all(len(example.cots) == require_cot for example in examples)


def test_first_gsm8k_row_in_full(shared_data: Callable[[str], Path]) -> None:
    example = load_examples(str(shared_data("gsm8k_train.jsonl")), require_cot=True, limit=1)[0][0]
    assert example.cots[0] == (
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May."
    )
    assert example.answer == "72"
