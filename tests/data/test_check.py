"""The check of a source against files with known faults, and its command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from typer.testing import CliRunner

from carft_fast import trainer
from carft_fast.cli import app
from carft_fast.config.toml import load_config
from carft_fast.core.errors import InputError
from carft_fast.data.check import Lengths, check_data
from carft_fast.data.prompts import PromptFormat
from carft_fast.data.synthetic import build_tokenizer

COTS = ("Add.\n\nTherefore, the answer is <3>.", "Add.", "1 + 2. Therefore, the answer is 4.")


def row(number: int, question: str, cot: Any = COTS[0], answer: str = "3") -> dict[str, Any]:
    return {"item_id": f"r{number}", "question": question, "answer_cot": cot, "answer_value": answer}


ROWS = [
    row(0, "What is 1 + 2?"),
    row(1, "what  IS 1 + 2?", COTS[1], "3.0"),
    row(2, "What is 1 +\t2?", COTS[2], "5"),
    row(3, "How many?", list(COTS)),
    row(4, "Which one?", "", "3"),
    row(5, "", COTS[1]),
    row(6, "What else?", COTS[1], "many"),
]


def write(path: Path, rows: object) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def test_every_fault_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "train.json", ROWS)
    tested = write(tmp_path / "test.json", [row(0, "HOW many?"), row(1, "Unseen?")])
    check = check_data(path, load_config(None), None, tested)
    assert (check.rows_read, check.rows_used, check.annotations) == (7, 5, 6)
    assert {reason: found.count for reason, found in check.left_out.items()} == {
        'no question (field "question")': 1,
        "unparsable answer": 1,
    }
    assert (check.not_annotated.count, check.not_annotated.examples) == (1, ["r4: Which one?"])
    assert check.annotations_with_an_answer == 4, "one of r0 and r2, two of r3"
    assert check.annotations_with_another_answer.examples == [
        "r2: says 4.0, the target is 5.0",
        "r3: says 4.0, the target is 3.0",
    ]
    assert check.repeated_with_the_same_answer.examples == ["r1: what  IS 1 + 2?"]
    assert [text[:2] for text in check.repeated_with_another_answer.examples] == ["r2"]
    assert check.in_test_set is not None
    assert check.in_test_set.examples == ["r3: How many?"]


def test_lengths_and_limits_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    form = PromptFormat(tokenizer)
    rows = [row(i, "How many apples? " * (i + 1), "1 + 2 = 3. " * (i + 1)) for i in range(4)]
    prompts = [len(form.prompt_ids(r["question"].strip())) for r in rows]
    answers = [len(form.completion_ids(r["answer_cot"].strip(), "3")) for r in rows]
    longest = prompts[3] + answers[3]
    limits = [f"data.max_length={longest - 1}", f"rollout.max_new_tokens={answers[3] - 1}"]
    check = check_data(write(tmp_path / "a.json", rows), load_config(None, limits), tokenizer, None)
    assert check.lengths == {
        "prompt": Lengths(prompts[0], prompts[1], prompts[3], prompts[3]),
        "annotated completion": Lengths(answers[0], answers[1], answers[3], answers[3]),
        "prompt and completion": Lengths(prompts[0] + answers[0], prompts[1] + answers[1], longest, longest),
    }
    ((reason, found),) = check.too_long.items()
    assert f"data.max_length = {longest - 1}" in reason
    assert found.examples == [f"r3: {prompts[3]} + {answers[3]} tokens"]
    assert check.annotations_over_max_new_tokens is not None
    assert check.annotations_over_max_new_tokens.examples == [f"r3: {answers[3]} tokens"]


def test_quantiles_are_values_that_occur() -> None:
    assert Lengths.of(range(1, 101)) == Lengths(1, 50, 95, 100)
    assert Lengths.of([7]) == Lengths(7, 7, 7, 7)
    assert Lengths.of([]) is None


def test_command_prints_table_or_json(tmp_path: Path) -> None:
    path = write(tmp_path / "train.json", ROWS)
    words = ["data", "check", path, "--set", f"data.eval={path}"]
    table = CliRunner().invoke(app, words)
    assert table.exit_code == 0
    assert "5 of 7 rows" in " ".join(table.output.split())
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    assert (found["rows_used"], found["unit"]) == (5, "characters")
    assert found["in_test_set"] is None, "data.eval is the file itself"
    tokens = CliRunner().invoke(app, [*words, "--json", "--set", "model.path=synthetic", "--against", path])
    found = json.loads(tokens.output)
    assert (found["unit"], found["in_test_set"]["count"]) == ("tokens", 5)
    assert found["completion"].endswith("is: 3<eos>"), "special tokens are shown"
    own = [*words, "--json", "--set", "data.template=Q: {{ question }} A:", "--set", "data.answer_phrase=So {answer}!"]
    found = json.loads(CliRunner().invoke(app, own).output)
    assert (found["prompt"], found["completion"]) == ("Q: What is 1 + 2? A:", f"{COTS[0]}\nSo 3!")


def test_annotations_without_an_answer_are_left_out_as_in_training(tmp_path: Path) -> None:
    rows = [
        {"question": f"{n}?", "cot": cot, "answer": "1"} for n, cot in enumerate(["so 1 #### 1", "so \\boxed{1}", ""])
    ]
    path = write(tmp_path / "train.json", rows)
    config = load_config(None, ["data.answer_phrase="])
    assert check_data(path, config, None, None).rows_used == 2, "the second, and the one without annotation"


def test_one_data_set_with_two_splits_is_checked_against_itself(tmp_path: Path) -> None:
    def split(*numbers: int) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"question": f"{n}?", "cot": "So.", "answer": str(n)} for n in numbers])

    datasets.DatasetDict({"train": split(1, 2, 3), "test": split(3, 4)}).save_to_disk(tmp_path / "both")
    config = load_config(None, [f"data.eval={tmp_path / 'both'}"])
    found = trainer.check_data(str(tmp_path / "both"), config).in_test_set
    assert found is not None
    assert found.count == 1


def test_answers_of_any_text_are_usable_with_a_function(tmp_path: Path) -> None:
    """As in training; and half a surrogate pair, which JSON can hold, is no text with or without."""
    common = {"question": "which?", "answer_cot": "the first"}
    rows = [common | {"answer_value": text} for text in ("blue", "red", "\ud83d")]
    path = write(tmp_path / "train.json", rows)
    config = load_config(None, ["reward.fn=operator:eq", "reward.partial=constant"])
    check = check_data(path, config, None, None)
    assert (check.rows_read, check.rows_used) == (3, 2)
    assert 'answer is no Unicode text (field "answer_value")' in check.left_out
    assert check.repeated_with_another_answer.count == 1


def test_rows_that_no_console_takes_are_counted_and_shown(tmp_path: Path) -> None:
    """Half a surrogate pair in an id, or an escape sequence, is written out."""
    good = row(0, "One?", "So.")
    rows = [good, good | {"item_id": "a\ud83d"}, good | {"item_id": "b\x1b[2J", "answer_value": "c\x1b[2J"}]
    result = CliRunner().invoke(app, ["data", "check", write(tmp_path / "train.json", rows)])
    assert result.exit_code == 0, result.output
    assert "1 of 3 rows usable" in result.output
    assert "(a\\ud83d)" in result.output
    assert "\x1b" not in result.output


def test_annotations_and_repetitions_are_compared_as_the_reward_compares_them(tmp_path: Path) -> None:
    """Programs by what they return, LaTeX as mathematics; and a program's length is its own."""
    program = "def solution():\n    return {}"
    rows = [row(0, "One?", program.format("1 + 2")), row(1, "Two?", program.format("1 + 3")), row(2, "Bad?", "no code")]
    config = load_config(None, ["reward.answer_type=program"])
    check = check_data(write(tmp_path / "programs.json", [*rows, row(3, "one?", "no", "3.001")]), config, None, None)
    assert check.annotations_with_an_answer == 2
    assert check.annotations_with_another_answer.examples == ["r1: says 4.0, the target is 3.0"]
    assert check.repeated_with_the_same_answer.count == 1
    assert check.lengths["annotated completion"] is not None
    assert check.lengths["annotated completion"].max == len(program.format("1 + 2"))
    lead = "So.\nTherefore, the answer is: "
    rows = [
        row(0, "One?", lead + "$0.5$", r"\frac{1}{2}"),
        row(1, "one?", lead + r"$\frac{2}{4}$", "0.5"),
        row(2, "Two?", lead + "$x^2 - 1$", "(x-1)(x+2)"),
        row(3, "Three?", lead + "who knows", "9"),
    ]
    config = load_config(None, ["reward.answer_type=latex"])
    check = check_data(write(tmp_path / "latex.json", rows), config, None, None)
    assert (check.annotations_with_an_answer, check.repeated_with_the_same_answer.count) == (3, 1)
    assert [text[:2] for text in check.annotations_with_another_answer.examples] == ["r2"]
    assert check.repeated_with_another_answer.count == 0


def test_unreadable_input_is_bad_input(tmp_path: Path) -> None:
    for words in (["none.json"], [write(tmp_path / "a.json", ROWS), "--against", "none.json"]):
        outcome = CliRunner().invoke(app, ["data", "check", *words])
        assert isinstance(outcome.exception, InputError)
        assert "none.json: no such file" in str(outcome.exception)


def test_svamp_as_published(shared_data: Callable[[str], Path]) -> None:
    """Figures recorded once: a change in reading or grading shows here."""
    check = check_data(
        str(shared_data("svamp_nl.json")), load_config(None), None, str(shared_data("svamp_test_set.json"))
    )
    assert [text.split(":")[0] for text in check.annotations_with_another_answer.examples] == [
        "svamp_929",
        "svamp_2000",
    ]
    assert (check.rows_used, check.annotations_with_an_answer) == (3076, 3067)
    assert (check.repeated_with_the_same_answer.count, check.repeated_with_another_answer.count) == (11, 0)
    assert check.in_test_set is not None
    assert check.in_test_set.count == 0
