"""Every format, every reason to leave a row out, and the real files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carft_fast.data import LoadReport, load_examples
from carft_fast.errors import InputError
from carft_fast.prompts import PromptFormat, check_tokenizer, encode_examples
from carft_fast.synthetic import build_tokenizer
from carft_fast.types import Example

GOOD = {"item_id": "a1", "question": "How many?", "answer_cot": "one and one", "answer_value": "2"}


def write(path: Path, content: Any, lines: bool = False) -> str:
    text = "\n".join(json.dumps(row) for row in content) if lines else json.dumps(content)
    path.write_text(text)
    return str(path)


def test_reft_json(tmp_path: Path) -> None:
    examples, report = load_examples(write(tmp_path / "x.json", [GOOD]), require_cot=True)
    assert examples == [Example("a1", "How many?", "one and one", "2")]
    assert (report.rows_read, report.rows_used) == (1, 1)


def test_gsm8k_lines(tmp_path: Path) -> None:
    rows = [{"question": "Clips?", "answer": "48/2 = <<48/2=24>>24 in May.\n48+24 = <<48+24=72>>72.\n#### 1,072"}]
    for format in ("auto", "gsm8k"):
        examples, _ = load_examples(write(tmp_path / "x.jsonl", rows, lines=True), format=format, require_cot=True)
        assert examples == [Example("1", "Clips?", "48/2 = 24 in May.\n48+24 = 72.", "1,072")]


def test_own_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"q": "Why?", "why": "because", "a": 3, "id": 7}], lines=True)
    fields = {"question": "q", "cot": "why", "answer": "a", "item_id": "id"}
    examples, _ = load_examples(path, format="jsonl", fields=fields, require_cot=True)
    assert examples == [Example("7", "Why?", "because", "3")]
    with pytest.raises(InputError, match=r"'question'.*q, why, a, id"):
        load_examples(path, format="jsonl", require_cot=True)
    with pytest.raises(InputError, match="'colour' is not a field"):
        load_examples(path, format="jsonl", fields={"colour": "q"}, require_cot=True)


def test_hub_loader_on_a_local_dataset_folder(tmp_path: Path) -> None:
    """`datasets` takes a folder where a Hub id goes: the same code, without the network."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    write(folder / "train.jsonl", [{"question": "Clips?", "answer": "24 + 48 = <<24+48=72>>72\n#### 72"}], lines=True)
    write(folder / "test.jsonl", [{"question": "Eggs?", "answer": "#### 18"}], lines=True)
    train, _ = load_examples(str(folder), split="train", require_cot=True)
    assert train == [Example("1", "Clips?", "24 + 48 = 72", "72")]
    test, _ = load_examples(str(folder), format="hub", split="test", require_cot=False)
    assert test == [Example("1", "Eggs?", "", "18")]
    with pytest.raises(InputError, match="could not be loaded"):
        load_examples(str(folder), format="hub", split="nothing", require_cot=True)


def test_rows_left_out_are_counted_and_shown(tmp_path: Path) -> None:
    rows = [
        GOOD,
        "not a row",
        {**GOOD, "question": " "},
        {**GOOD, "answer_value": None},
        {**GOOD, "answer_cot": ""},
        *({**GOOD, "item_id": f"b{i}", "answer_value": "many"} for i in range(5)),
    ]
    examples, report = load_examples(write(tmp_path / "x.json", rows), require_cot=True)
    assert len(examples) == 1
    assert dict(report.rejected) == {
        "not an object": 1,
        'no question (field "question")': 1,
        'no answer (field "answer_value")': 1,
        "no annotated reasoning": 1,
        "unparsable answer": 5,
    }
    assert report.rows_read == 1 + sum(report.rejected.values())
    summary = report.summary()
    assert "1 of 10 rows used" in summary
    assert "row 6 (b0)" in summary
    assert "row 8 (b2)" in summary
    assert "row 9" not in summary, "only the first three are shown"
    assert load_examples(str(tmp_path / "x.json"), require_cot=False)[1].rejected["no annotated reasoning"] == 0


def test_limit_counts_usable_rows(tmp_path: Path) -> None:
    rows = [{**GOOD, "answer_value": "?"}, *({**GOOD, "item_id": str(i)} for i in range(5))]
    examples, report = load_examples(write(tmp_path / "x.json", rows), require_cot=True, limit=2)
    assert [example.item_id for example in examples] == ["0", "1"]
    assert report.rows_read == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"question": 1,}]', "line 1: not valid JSON"),
        ("[\n{}\n{}\n]", "line 3"),
        ('{"a": 1}', "list of rows is expected, this is dict"),
        ("[]", "no rows"),
        ("[1, 2]", "2 left out: not an object"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_examples(str(tmp_path / "x.json"), require_cot=True)


def test_broken_line_and_encoding(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n\n{"question"\n')
    with pytest.raises(InputError, match="line 3: not valid JSON"):
        load_examples(str(tmp_path / "x.jsonl"), require_cot=False)
    (tmp_path / "y.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8"):
        load_examples(str(tmp_path / "y.jsonl"), require_cot=False)
    with pytest.raises(InputError, match="no such file"):
        load_examples("./nothing.jsonl", require_cot=False)


@pytest.mark.parametrize(
    ("name", "rows", "require_cot", "answer_type"),
    [
        ("svamp_nl.json", 3076, True, "numeric"),
        ("svamp_test_set.json", 1000, False, "numeric"),
        ("gsm8k_train.jsonl", 7473, True, "numeric"),
        ("gsm8k_test_set.json", 1319, False, "numeric"),
        ("mathqa_test_set.json", 1605, False, "choice"),
        ("mathqa-numeric_test_set.json", 1605, False, "numeric"),
    ],
)
def test_real_files(
    shared_data: Callable[[str], Path], name: str, rows: int, require_cot: bool, answer_type: str
) -> None:
    examples, report = load_examples(str(shared_data(name)), require_cot=require_cot, answer_type=answer_type)
    assert report.rows_read == rows
    assert len(examples) + sum(report.rejected.values()) == rows
    assert not sum(report.rejected.values()), report.summary()
    assert all("<<" not in example.cot and "####" not in example.cot for example in examples)


class ChatTokenizer:
    """What a chat model's tokenizer adds: BOS in front, EOS behind, a template that writes its own markers."""

    chat_template, eos_token_id, pad_token_id, eos_token = "{{ ... }}", 2, None, "</s>"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [10 + ord(c) for c in text]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return f"<user>{messages[0]['content']}<bot>"


def test_prompts_and_special_tokens() -> None:
    tokenizer = ChatTokenizer()
    plain, chat = PromptFormat(tokenizer), PromptFormat(tokenizer, "chat")
    text = "Question:\nq\nAnswer reasoning:\n"
    assert plain.prompt_ids("q") == [1, *(10 + ord(c) for c in text)]
    assert chat.prompt_ids("q") == [10 + ord(c) for c in "<user>q<bot>"]
    expected = [*(10 + ord(c) for c in "c\nTherefore, the answer is: 5"), 2]
    assert plain.completion_ids("c", "5") == chat.completion_ids("c", "5") == expected
    check_tokenizer(tokenizer)
    assert tokenizer.pad_token == "</s>"


def test_rows_over_the_limits_are_reported() -> None:
    tokenizer = build_tokenizer()
    prompt_format = PromptFormat(tokenizer)
    short, long = Example("s", "Ada has 2 pens.", "2 = 2.", "2"), Example("l", "Ada has 2 pens. " * 9, "2 = 2.", "2")
    report = LoadReport("rows", 2, 2)
    lengths = [len(prompt_format.prompt_ids(e.question)) for e in (short, long)]
    rows = encode_examples(
        [short, long],
        prompt_format,
        max_length=lengths[1],
        max_prompt_length=lengths[1],
        report=report,
        require_cot=True,
    )
    assert [row.example.item_id for row in rows] == ["s"]
    assert rows[0].completion_ids[-1] == tokenizer.eos_token_id
    assert list(report.rejected) == [
        f"prompt and annotated completion longer than data.max_length = {lengths[1]} tokens"
    ]
    with pytest.raises(InputError, match=f"{lengths[0]} to {lengths[1]} tokens"):
        encode_examples(
            [short, long], prompt_format, max_length=99, max_prompt_length=3, report=report, require_cot=False
        )
