"""Rows that are conversations, columns of evaluation data, files mixed by shares; expectations by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from carft_fast.config.toml import load_config, to_toml
from carft_fast.core.errors import InputError
from carft_fast.core.example import Example
from carft_fast.data.load import LoadReport, load_examples, load_set
from carft_fast.data.mix import mix_rows


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def load(row: dict[str, Any], **options: Any) -> tuple[list[Example], LoadReport]:
    return load_examples([row], label="rows", **{"require_cot": True, **options})


ASKED = chat(("system", "Be brief."), ("user", "Hello."), ("assistant", "Hi."), ("user", "Two and two?"))
BEFORE = (("system", "Be brief."), ("user", "Hello."), ("assistant", "Hi."))


def test_the_last_assistant_turn_is_the_annotation() -> None:
    row = {"messages": [*ASKED, *chat(("assistant", " Add. "))], "answer": 4, "id": 7}
    expected = Example("1", "Two and two?", ("Add.",), "4", {"id": 7}, BEFORE)
    assert load(row)[0] == [expected]
    renamed = {"talk": row["messages"], "gold": "4", "question": "another", "id": 7}
    fields = {"messages": "talk", "answer": "gold", "item_id": "id"}
    assert load(renamed, fields=fields)[0] == [
        Example("7", "Two and two?", ("Add.",), "4", {"question": "another"}, BEFORE)
    ]
    shared = [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Add."}]
    assert load({"conversations": shared, "answer": "4"})[0] == [Example("1", "Two and two?", ("Add.",), "4")]


def test_a_question_column_goes_before_a_conversation_that_nobody_named() -> None:
    row = {"question": "Three?", "cot": "So.", "answer": "3", "messages": ASKED}
    assert load(row)[0] == [Example("1", "Three?", ("So.",), "3", {"messages": ASKED})]


@pytest.mark.parametrize(
    ("annotation", "options", "cot", "answer"),
    [
        ("Add.\nTherefore, the answer is: 4.", {}, None, "4"),
        (r"Add. \boxed{\frac{1}{3}}", {}, None, r"\frac{1}{3}"),
        (
            "So 12345678901234567891.5\nAnswer: 12345678901234567891.5",
            {"answer_phrase": "Answer: {answer}"},
            None,
            None,
        ),
        ("Add <<2+2=4>>.\n#### 4", {}, "Add .", "4"),
        ("#### Step 1\nAdd.\n#### Step 2\nTherefore, the answer is: 4", {}, None, "4"),
        ("4", {}, None, "4"),
        ("So. Therefore, the answer is (b).", {"answer_type": "choice"}, None, "b"),
        (r"So \boxed{x^2}", {"answer_type": "latex", "answer_phrase": ""}, None, "x^2"),
    ],
)
def test_without_a_column_the_answer_is_the_annotations(
    annotation: str, options: dict[str, Any], cot: str | None, answer: str | None
) -> None:
    [example], _ = load({"messages": [*ASKED, *chat(("assistant", annotation))]}, **options)
    assert example == Example("1", "Two and two?", (cot or annotation,), answer or "12345678901234567891.5", {}, BEFORE)


def test_a_conversation_to_evaluate_on_ends_with_the_question_or_its_answer() -> None:
    for messages in (ASKED, [*ASKED, *chat(("assistant", "Add."))]):
        [example], _ = load({"messages": messages, "answer": "4"}, require_cot=False)
        assert (example.question, example.history, example.answer) == ("Two and two?", BEFORE, "4")


LEFT_OUT: dict[str, tuple[Any, str]] = {
    "no list": ("Hello.", 'messages are no list of objects (field "messages")'),
    "texts": (["Hello."], 'messages are no list of objects (field "messages")'),
    "role": (chat(("tool", "3"), ("user", "?")), "a message of another role than system, user, human, assistant, gpt"),
    "content": ([{"role": "user", "content": [{"type": "image"}]}], "a message whose content is no text"),
    "empty": ([], "messages without a question at their end"),
    "two answers": (
        [*ASKED, *chat(("assistant", "4"), ("assistant", "5"))],
        "messages without a question at their end",
    ),
    "blank": (chat(("user", " "), ("assistant", "Add.")), 'no question (field "messages")'),
    "no answer": ([*ASKED, *chat(("assistant", "Add."))], 'no answer (field "answer")'),
    "no annotation": (ASKED, 'no answer (field "answer")'),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_conversations_that_cannot_be_used_are_counted(case: str) -> None:
    messages, reason = LEFT_OUT[case]
    good = {"messages": chat(("user", "Two?"), ("assistant", "Therefore, the answer is 2."))}
    _, report = load_examples([good, {"messages": messages}], label="rows", require_cot=True)
    assert [(text.startswith(reason), count) for text, count in report.rejected.items()] == [(True, 1)]


def test_with_an_empty_phrase_annotations_state_their_answers() -> None:
    """Nothing would teach an answer otherwise; GSM8K's is taken out of its annotations."""
    row = {"question": "Two?", "cot": ["So 2.", r"So \boxed{2}.", "Therefore, the answer is <2>."], "answer": "2"}
    [example], _ = load(row, answer_phrase="")
    assert example.cots == (r"So \boxed{2}.", "Therefore, the answer is <2>.")
    with pytest.raises(
        InputError, match=r'annotated reasoning without an answer \(data\.answer_phrase = "" adds none\)'
    ):
        load({"question": "Two?", "answer": "So.\n#### 2"}, answer_phrase="")
    assert load({"question": "Two?", "answer": "So.\n#### 2"})[0][0].cots == ("So.",)


def test_the_history_of_an_example_given_in_python_is_checked() -> None:
    good = Example("1", "Two?", ("So.",), "2", history=BEFORE)
    for history in ((("tool", "3"),), (("user", 3),), ("Hello.",)):
        examples, report = load_examples(
            [good, Example("2", "Two?", ("So.",), "2", history=history)],  # type: ignore[arg-type]
            label="rows",
            require_cot=True,
        )
        assert (examples, sum(report.rejected.values())) == ([good], 1)
    _, report = load_examples([good, Example("2", "Two?", (r"\boxed{2}",), "")], label="rows", require_cot=True)
    assert report.rejected == {'no answer (field "answer")': 1}


def test_conversations_are_merged_by_all_that_was_said() -> None:
    rows = [
        {"messages": [*before, *chat(("user", "Two?"), ("assistant", cot))], "answer": "2"}
        for before, cot in ((ASKED[:3], "a"), ([], "b"), (ASKED[:3], "c"))
    ]
    examples, _ = load_examples(rows, label="rows", require_cot=True, merge_questions=True)
    assert [example.cots for example in examples] == [("a", "c"), ("b",)]


@pytest.mark.parametrize(
    ("row", "fields", "said"),
    [
        (
            {"problem": "Two?", "solution": "So."},
            {},
            'rows have problem, solution: name yours with S, such as S = {question = "problem", cot = "solution"}',
        ),
        (
            {"question": "Two?", "ground_truth": "2"},
            {},
            "'answer' for the answer is missing; the rows have question, ground_truth",
        ),
        ({"question": "Two?", "ground_truth": "2"}, {}, 'such as S = {answer = "ground_truth"}'),
        ({"question": "Two?", "answer": "2"}, {"messages": "chat"}, "'chat' for the messages is missing"),
        ({"q": "Two?"}, {"messages": "chat", "question": "q"}, "S: messages hold the question; give one of the two"),
    ],
)
def test_a_missing_column_names_the_setting_that_maps_it(
    row: dict[str, Any], fields: dict[str, str], said: str
) -> None:
    with pytest.raises(InputError) as error:
        load(row, fields=fields, setting="data.fields")
    assert said.replace("S:", "data.fields:").replace("S,", "data.fields,").replace("S =", "data.fields =") in str(
        error.value
    )


def test_evaluation_data_has_names_of_its_own(tmp_path: Path) -> None:
    train, held_out = {"q": "Two?", "why": "So.", "a": "2"}, {"problem": "Three?", "gold": "3"}
    fields = 'data.fields={question="q", cot="why", answer="a"}'
    config = load_config(None, [fields, 'data.eval_fields={question="problem", answer="gold"}'])
    assert load_set(config, "train", [train])[0] == [Example("1", "Two?", ("So.",), "2")]
    assert load_set(config, "eval", [held_out])[0] == [Example("1", "Three?", (), "3")]
    assert load_set(load_config(None, [fields]), "eval", [train])[0][0].question == "Two?"
    with pytest.raises(
        InputError, match=r'data\.eval_fields, such as data\.eval_fields = \{question = "problem", answer = "gold"\}'
    ):
        load_set(load_config(None, [fields]), "eval", [held_out])


def test_shares_of_a_mix() -> None:
    files = {"a": [f"a{i}" for i in range(70)], "b": [f"b{i}" for i in range(60)], "c": [f"c{i}" for i in range(9)]}
    found = mix_rows(files, {"a": 0.7, "b": 0.3})
    assert found == [*files["a"], *files["b"][:30]], "a is all there"
    assert mix_rows(files, {"a": 7, "b": 3}) == found
    limited = mix_rows(files, {"a": 1, "b": 1, "c": 1}, 10)
    assert [len([x for x in limited if x[0] == name]) for name in "abc"] == [4, 3, 3]
    assert mix_rows(files, {"a": 1, "b": 1, "c": 1}) == [*files["a"][:9], *files["b"][:9], *files["c"]]
    with pytest.raises(
        InputError, match=r"data\.mix: with share 0\.001 of 1\.001 b would get none of 70 rows; usable are 70"
    ):
        mix_rows({"a": files["a"], "b": files["b"]}, {"a": 1, "b": 0.001})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["data.mix={a=1}", "data.train=b"], "data.mix and train = 'b': give one of the two"),
        (["data.mix={synthetic=1}"], '"synthetic" cannot be mixed'),
        (["data.mix={a=0}"], r"data\.mix\.a = 0: input should be greater than 0"),
        (["data.mix={a=nan}"], r"data\.mix\.a = NaN"),
    ],
)
def test_mixes_that_are_refused(options: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_config(None, options)


def test_a_run_is_prepared_on_a_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from carft_fast.trainer import Trainer
    from carft_fast.training.screens import first_screen

    rows = [{"question": f"Ada has {n} pens. How many?", "cot": "So.", "answer": str(n)} for n in range(1, 10)]
    long = {"question": "Ada has pens. " * 500, "cot": "So.", "answer": "1"}
    (tmp_path / "a.b.jsonl").write_text("\n".join(map(json.dumps, [long, *rows])))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    values: dict[str, Any] = {
        "model.path": "synthetic",
        "data.mix": {f"{tmp_path}/a.b.jsonl": 3, f"{tmp_path}/c.json": 1},
        "data.eval": f"{tmp_path}/c.json",
        "data.max_length": 200,
        "data.answer_phrase": "Therefore {answer}",
        "rollout.max_new_tokens": 50,
        "model.device": "cpu",
    }
    config = load_config(None, values)
    (tmp_path / "saved.toml").write_text(to_toml(config))
    assert load_config(str(tmp_path / "saved.toml")) == config
    trainer = Trainer(config, output_dir=tmp_path / "run")
    run = trainer._prepare(trainer.config, trainer.output_dir, ("sft",), dry_run=True)
    assert [row.example.answer for row in run.train_rows] == [*(str(n) for n in range(1, 10)), "1", "2", "3"]
    taught = run.tokenizer.decode(run.train_rows[0].completion_ids, skip_special_tokens=True)
    [grade] = run.grader.grade_alone([taught], [run.train_rows[0].example])
    assert (taught[-12:], grade.correct) == ("\nTherefore 1", True), "the phrase is taught, and graded by"
    assert [report.rows_used for report in run.reports] == [9, 9, 9], "what is too long has no share"
    named = [str(cell) for cell in first_screen(run, ("sft",), resume=True).columns[0].cells]
    assert named[1:4] == ["training data", "training data", "held-out data"]
    assert Trainer(config, train=rows[:2]).config.data.mix == {}
