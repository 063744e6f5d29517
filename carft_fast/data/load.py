"""Questions with annotated reasoning, from files or the Hub. Rows that cannot be used are counted and shown."""

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from carft_fast.config import ANSWER_PHRASE, SYNTHETIC, AnswerType, CalculatorMarks, Config, DataFormat
from carft_fast.core import Example, InputError
from carft_fast.data.files import read_rows
from carft_fast.data.synthetic import make_task
from carft_fast.rewards import Answer, answer_text, extract_answer, parse_target

Source = str | Iterable[Any]
"""A file, a folder, a Hub id, or rows: dicts, `Example`s, or a `datasets.Dataset`."""
FIELDS = ("question", "cot", "answer", "item_id", "messages")
CONVERSATIONS = ("messages", "conversations")
"""Columns that are read as conversations where there is no question."""
REFT_FIELDS = {"question": "question", "cot": "answer_cot", "answer": "answer_value", "item_id": "item_id"}
FORMAT_FIELDS = {"reft": REFT_FIELDS, "gsm8k": {"question": "question", "cot": "answer", "answer": "answer"}}

_LIKELY = {
    "question": ("problem", "prompt", "instruction", "query", "input"),
    "cot": ("solution", "reasoning", "rationale", "explanation", "response", "output", "completion"),
    "answer": ("final_answer", "expected_answer", "ground_truth", "target", "label", "gold"),
}
"""What others call a column, for the error that one is missing."""
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
_LONGEST_INTEGER = 4000
"""Digits; Python makes no text of more than 4,300."""
_SHOWN = 3


@dataclass
class LoadReport:
    """What became of a source's rows."""

    source: str
    rows_read: int = 0
    rows_used: int = 0
    rows_merged: int = 0
    """Rows whose annotations went to an earlier row of the same question and answer."""
    annotations_left_out: int = 0
    """Annotations too long to be used, of rows that have others."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few of each reason."""

    def reject(self, reason: str, row: str, excerpt: str = "") -> None:
        """Count a row that cannot be used; `row` says which one."""
        self.rejected[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < _SHOWN:
            shown.append(f"{row}: {excerpt[:80]!r}" if excerpt else row)

    def summary(self) -> str:
        lines = [f"{self.source}: {self.rows_used} of {self.rows_read} rows used"]
        if self.rows_merged:
            lines.append(f"  {self.rows_merged} merged into an earlier row of the same question and answer")
        if self.annotations_left_out:
            lines.append(f"  {self.annotations_left_out} annotations too long; their rows have others")
        for reason, count in self.rejected.most_common():
            lines.append(f"  {count} left out: {reason}")
            lines += [f"    {example}" for example in self.examples[reason]]
        return "\n".join(lines)


def check_source(name: str, source: Any) -> None:
    """Raises InputError for what cannot be `Trainer(train=...)` or `Trainer(eval=...)`."""
    datasets = sys.modules.get("datasets")  # who has a Dataset has imported it
    known = (str, Path, list, tuple, *([datasets.Dataset] if datasets else []))
    if not isinstance(source, known):
        raise InputError(
            f"{name} is a {type(source).__name__}: expected a path or Hub id, a list of dicts or of Examples, or a "
            "datasets.Dataset"
        )


def load_set(
    config: Config, name: Literal["train", "eval"], source: Source, *, all_rows: bool = False
) -> tuple[list[Example], LoadReport]:
    """Read `source` as the config says that data.`name` is read.

    `all_rows`: whatever the config's limit on their number, and whether they are annotated or not.
    """
    data, train = config.data, name == "train"
    limit = data.train_rows if train else data.eval_rows
    if source == SYNTHETIC:
        rows = make_task(config.seed, data.synthetic_steps)[0 if train else 1][:limit]
        return rows, LoadReport(SYNTHETIC, len(rows), len(rows))
    return load_examples(
        source,
        label=source if isinstance(source, str) else f"the rows given as {name}",
        format=data.format,
        fields=data.fields if train or not data.eval_fields else data.eval_fields,
        setting="data.fields" if train else "data.eval_fields",
        split=data.train_split if train else data.eval_split,
        answer_type=config.reward.answer_type if config.reward.reads_answers else None,
        answer_phrase=data.answer_phrase,
        calculator_marks=data.calculator_marks,
        merge_questions=train and data.merge_questions,
        require_cot=train and not all_rows,
        taught=train,
        limit=None if all_rows else limit,
    )


def load_few_shot(config: Config) -> list[Example]:
    """The rows of data.few_shot. Raises InputError where one of them cannot be shown as a solved question."""
    data = config.data
    if not data.few_shot:
        return []
    examples, report = load_examples(
        data.few_shot,
        label=f"data.few_shot = {data.few_shot}",
        fields=data.fields,
        split=data.train_split,
        answer_type=None if config.reward.fn else config.reward.answer_type,
        answer_phrase=data.answer_phrase,
        calculator_marks=data.calculator_marks,
        require_cot=True,
    )
    if report.rejected:
        raise InputError(f"every row has to be usable: {report.summary()}")
    return examples


def load_examples(
    source: Source,
    *,
    label: str = "",
    format: DataFormat = "auto",
    fields: Mapping[str, str] | None = None,
    setting: str = "data.fields",
    split: str = "train",
    answer_type: AnswerType | None = "numeric",
    answer_phrase: str = ANSWER_PHRASE,
    calculator_marks: CalculatorMarks = "strip",
    merge_questions: bool = False,
    require_cot: bool,
    taught: bool = True,
    limit: int | None = None,
) -> tuple[list[Example], LoadReport]:
    """Read a source and keep the rows that can be used.

    JSON files hold a list, or objects one after the other (JSON Lines); which of the two is seen by their content.
    Formats: "reft" (item_id, question, answer_cot, answer_value), "gsm8k" (the answer is the reasoning, then `#### 72`;
    `calculator_marks` `<<...>>` are stripped or kept); with own `fields` or recognised ones "jsonl", "csv", "parquet",
    "arrow", "disk" (`save_to_disk`), "hub" (`datasets`); "auto" tells them by name and content. Rows given in Python
    are read like "jsonl". An annotation may be a list of texts. Of `messages` the last assistant turn is the
    annotation, the user's turn before it the question; without an answer's column the annotation's own answer is the
    target. Columns that are no field become `Example.extra`. `merge_questions` makes one example of rows with the same
    question and answer, with the first one's extra. `limit` keeps that many usable examples from the top. `label` names
    the source, `setting` what holds its `fields`. Answers must be targets of `answer_type`; None takes any text.
    `answer_phrase` is data.answer_phrase: where it is "" annotations have to state an answer.

    Raises InputError for a source that cannot be read, or without one usable row.
    """
    label = label or str(source)
    rows, names = _open(source, label, format, dict(fields or {}), split, require_cot, setting)
    rule = _Rule(answer_type, answer_phrase, calculator_marks, require_cot, taught)
    report = LoadReport(label)
    examples: list[Example] = []
    for number, row in enumerate(rows, 1):
        if limit is not None and len(examples) == limit and not merge_questions:
            break
        report.rows_read += 1
        try:
            examples.append(_to_example(row, number, names, rule))
        except _RowError as error:
            report.reject(*error.args)
    if merge_questions:
        merged = _merge(examples, answer_type)
        report.rows_merged = len(examples) - len(merged)
        examples = merged[:limit]
    report.rows_used = len(examples)
    if not examples:
        raise InputError(f"no usable row in {report.summary()}" if report.rows_read else f"{label}: no rows")
    return examples, report


def _merge(examples: Iterable[Example], answer_type: AnswerType | None) -> list[Example]:
    """One example a question and answer, where its first row was, with the distinct annotations of all."""
    groups: dict[tuple[Any, str, Answer], list[Example]] = {}
    for example in examples:
        answer = example.answer if answer_type is None else parse_target(example.answer, answer_type=answer_type)
        groups.setdefault((example.history, example.question, answer), []).append(example)
    return [
        replace(group[0], cots=tuple(dict.fromkeys(cot for example in group for cot in example.cots)))
        for group in groups.values()
    ]


class _RowError(Exception):
    """Its arguments are those of `LoadReport.reject`."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """What rows have to fulfil: arguments of `load_examples`."""

    answer_type: AnswerType | None
    answer_phrase: str
    calculator_marks: CalculatorMarks
    require_cot: bool
    taught: bool
    """Whether annotations are to be learnt from: without an answer phrase they have to state their answers."""

    def is_marked(self, text: str) -> bool:
        """Whether it ends like GSM8K's annotations, with `#### 72`; a heading of Markdown looks the same."""
        _, mark, answer = text.rpartition("####")
        if not mark or not answer.strip() or "\n" in answer.strip():
            return False
        try:
            return self.answer_type is None or parse_target(answer, answer_type=self.answer_type) is not None
        except ValueError:
            return False

    def stated_answer(self, cot: str) -> str | None:
        """The answer that an annotation states itself, where one can be read without running it."""
        if self.answer_type in (None, "program"):
            return None
        found = extract_answer(cot, answer_type=self.answer_type, phrase=self.answer_phrase)
        return None if found is None else answer_text(found)


def _to_example(row: Any, number: int, names: Mapping[str, str], rule: _Rule) -> Example:
    where = f"row {number}"
    history: tuple[tuple[str, str], ...] = ()
    if isinstance(row, Example):
        extra, names = row.extra, {name: name for name in FIELDS}
        turns = [{"role": m[0], "content": m[1]} if isinstance(m, tuple) and len(m) == 2 else m for m in row.history]
        history = _conversation([*turns, {"role": "user", "content": ""}], "history", where)[0]
        found = {"question": row.question, "cot": row.cots, "answer": row.answer, "item_id": row.item_id or None}
    elif isinstance(row, dict):
        extra = {key: value for key, value in row.items() if key not in names.values()}
        found = {name: row.get(key) for name, key in names.items()}
        if "messages" in names:
            history, found["question"], found["cot"] = _conversation(found.pop("messages"), names["messages"], where)
            names = {"question": names["messages"], "cot": names["messages"], "answer": "answer", **names}
    else:
        raise _RowError("not an object", where, _shown(row))
    values = {name: value for name, value in found.items() if value is not None}
    where += f" ({_shown(values['item_id'])})" if "item_id" in values else ""
    texts: dict[str, list[str]] = {name: [] for name in FIELDS}
    for name, value in values.items():
        parts = value if name == "cot" and isinstance(value, list | tuple) else [value]
        if not all(map(_is_text_or_number, parts)):
            raise _RowError(f'{name} is neither text nor number (field "{names[name]}")', where, _shown(value))
        texts[name] = [text for part in parts if (text := str(part).strip())]
        if not all(map(_is_text, texts[name])):
            raise _RowError(f'{name} is no Unicode text (field "{names[name]}")', where, ascii(value))
    question, answer = ("".join(texts[name]) for name in ("question", "answer"))
    cots = texts["cot"]
    from_annotation = isinstance(row, dict) and "messages" in names and not answer and cots
    if from_annotation and rule.is_marked(cots[0]):
        answer, cots = cots[0], []
    if names.get("cot") == names["answer"] or (not cots and "####" in answer):
        cot, _, answer = (part.strip() for part in answer.rpartition("####"))
        cots = [_CALCULATOR_MARK.sub("", cot) if rule.calculator_marks == "strip" else cot] if cot else []
    if not question:
        raise _RowError(f'no question (field "{names["question"]}")', where)
    if from_annotation and not answer:
        answer = rule.stated_answer(cots[0]) or ""
    if not answer:
        raise _RowError(f'no answer (field "{names["answer"]}")', where, question)
    if rule.require_cot and not cots:
        raise _RowError("no annotated reasoning", where, question)
    try:
        if rule.answer_type is not None:
            parse_target(answer, answer_type=rule.answer_type)
    except ValueError as error:
        raise _RowError("unparsable answer", where, str(error)) from None
    if rule.taught and cots and not rule.answer_phrase and rule.answer_type not in (None, "program"):
        cots = [cot for cot in cots if rule.stated_answer(cot) is not None]
        if not cots:
            raise _RowError(
                'annotated reasoning without an answer (data.answer_phrase = "" adds none)', where, question
            )
    return Example(str(values.get("item_id", number)), question, tuple(dict.fromkeys(cots)), answer, extra, history)


def _conversation(messages: Any, key: str, where: str) -> tuple[tuple[tuple[str, str], ...], str | None, str | None]:
    """What comes before the last question, that question, and the assistant's answer to it if there is one."""
    turns = list[tuple[str, str]]()
    for message in messages if isinstance(messages, list | tuple) else [messages]:
        if not isinstance(message, dict):
            raise _RowError(f'messages are no list of objects (field "{key}")', where, _shown(messages))
        role, content = (message.get(a, message.get(b)) for a, b in (("role", "from"), ("content", "value")))
        if not isinstance(role, str) or role not in _ROLES:
            raise _RowError(f'a message of another role than {", ".join(_ROLES)} (field "{key}")', where, _shown(role))
        if not isinstance(content, str) or not _is_text(content):
            raise _RowError(f'a message whose content is no text (field "{key}")', where, _shown(content))
        turns.append((_ROLES[role], content.strip()))
    cot = turns.pop()[1] if turns and turns[-1][0] == "assistant" else None
    if not turns or turns[-1][0] != "user":
        raise _RowError(f'messages without a question at their end (field "{key}")', where, _shown(messages))
    return tuple(turns[:-1]), turns[-1][1], cot


def _is_text_or_number(value: Any) -> bool:
    """JSON as Python reads it has values that str() makes a text of and that nobody wrote: true, NaN, Infinity."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 10**_LONGEST_INTEGER
    return isinstance(value, str) or (isinstance(value, float) and math.isfinite(value))


def _shown(value: Any) -> str:
    try:
        return str(value).encode(errors="backslashreplace").decode()
    except ValueError:  # thousands of digits
        return type(value).__name__


def _is_text(text: str) -> bool:
    """JSON can hold half of a surrogate pair, which no tokenizer takes and no file."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _open(
    source: Source, label: str, format: str, fields: dict[str, str], split: str, require_cot: bool, setting: str
) -> tuple[Iterable[Any], dict[str, str]]:
    """Rows of a source and the names of their fields."""
    if unknown := sorted(set(fields) - set(FIELDS)):
        raise InputError(f"{setting}: {unknown[0]!r} is not a field; allowed: {', '.join(FIELDS)}")
    if other := sorted({"question", "cot"} & set(fields)) if "messages" in fields else []:
        raise InputError(f"{setting}: messages hold the {other[0]}; give one of the two")
    if not isinstance(source, str):
        return _with_fields(source, label, fields, require_cot, setting)
    rows = read_rows(source, "json" if format in ("jsonl", *FORMAT_FIELDS) else format, split)
    if format in FORMAT_FIELDS:
        return rows, FORMAT_FIELDS[format] | fields
    return _with_fields(rows, label, fields, require_cot, setting)


def _with_fields(
    rows: Iterable[Any], source: str, fields: dict[str, str], require_cot: bool, setting: str
) -> tuple[list[Any], dict[str, str]]:
    """Complete a field mapping from the keys of all rows: own names, else ReFT's, else plain ones; without a question
    those of conversations.

    Raises InputError for a needed or named field that no row has. A `cot` mapping is held against a source only
    where reasoning is required, since one mapping serves the training set and a test set without any.
    """
    rows = list(rows)
    keys = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
    candidates = {name: (name, REFT_FIELDS[name]) for name in ("question", "cot", "answer", "item_id")}
    found = {name: key for name in candidates for key in candidates[name] if key in keys and name not in fields}
    if "question" not in fields | found and (key := next((key for key in CONVERSATIONS if key in keys), None)):
        found.setdefault("messages", key)
    names = found | fields
    if "messages" in names:
        names = {name: key for name, key in names.items() if name not in ("question", "cot")}
        needed = set(fields)
    else:
        needed = {"question", "answer"} | (set(fields) if require_cot else set(fields) - {"cot"})
    for name in FIELDS:
        if keys and name in needed and names.get(name) not in keys:
            free = [key for key in keys if key not in names.values()]
            likely = {
                other: next((key for key in free if str(key).lower() in _LIKELY.get(other, ())), None)
                for other in FIELDS
                if names.get(other) not in keys and (other != "cot" or require_cot)
            }
            likely[name] = likely.get(name) or next(iter(free), "...")
            example = ", ".join(f'{other} = "{key}"' for other, key in likely.items() if key)
            raise InputError(
                f"{source}: field {names.get(name, name)!r} for the {name} is missing; the rows have "
                f"{', '.join(map(str, keys))}: name yours with {setting}, such as {setting} = {{{example}}}"
            )
    return rows, names if "messages" in names else {"question": "question", "answer": "answer"} | names
