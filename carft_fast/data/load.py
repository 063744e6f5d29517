"""Questions with annotated reasoning, from files or the Hub. Rows that cannot be used are counted and shown."""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from carft_fast.config import SYNTHETIC, AnswerType, CalculatorMarks, Config, DataFormat
from carft_fast.core import Example, InputError, first_line
from carft_fast.data.synthetic import make_task
from carft_fast.rewards import Answer, parse_target

Source = str | Iterable[Any]
"""A file, a folder, a Hub id, or rows: dicts, `Example`s, or a `datasets.Dataset`."""
FIELDS = ("question", "cot", "answer", "item_id")
REFT_FIELDS = {"question": "question", "cot": "answer_cot", "answer": "answer_value", "item_id": "item_id"}
FORMAT_FIELDS = {"reft": REFT_FIELDS, "gsm8k": {"question": "question", "cot": "answer", "answer": "answer"}}

_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
_NO_SPACE = re.compile(r"[^ \t\r\n]")
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
        rows = make_task(config.seed)[0 if train else 1][:limit]
        return rows, LoadReport(SYNTHETIC, len(rows), len(rows))
    return load_examples(
        source,
        label=source if isinstance(source, str) else f"the rows given as {name}",
        format=data.format,
        fields=data.fields,
        split=data.train_split if train else data.eval_split,
        answer_type=config.reward.answer_type if config.reward.reads_answers else None,
        calculator_marks=data.calculator_marks,
        merge_questions=train and data.merge_questions,
        require_cot=train and not all_rows,
        limit=None if all_rows else limit,
    )


def load_examples(
    source: Source,
    *,
    label: str = "",
    format: DataFormat = "auto",
    fields: Mapping[str, str] | None = None,
    split: str = "train",
    answer_type: AnswerType | None = "numeric",
    calculator_marks: CalculatorMarks = "strip",
    merge_questions: bool = False,
    require_cot: bool,
    limit: int | None = None,
) -> tuple[list[Example], LoadReport]:
    """Read a source and keep the rows that can be used.

    Files hold a JSON list, or JSON objects one after the other (JSON Lines); which of the two is seen by their content.
    Formats: "reft" (item_id, question, answer_cot, answer_value), "gsm8k" (the answer is the reasoning, then `#### 72`;
    `calculator_marks` `<<...>>` are stripped or kept), "jsonl" and "hub" (`datasets`) with own `fields` or recognised
    ones, "auto" (a file like "jsonl", else "hub"). Rows given in Python are read like "jsonl". An
    annotation may be a list of texts. Columns that are no field become `Example.extra`. `merge_questions` makes one
    example of rows with the same question and answer, with the first one's extra. `limit` keeps that many usable
    examples from the top. `label` names the source. Answers must be targets of `answer_type`; None takes any text.

    Raises InputError for a source that cannot be read, or without one usable row.
    """
    label = label or str(source)
    rows, names = _open(source, label, format, dict(fields or {}), split, require_cot)
    report = LoadReport(label)
    examples: list[Example] = []
    for number, row in enumerate(rows, 1):
        if limit is not None and len(examples) == limit and not merge_questions:
            break
        report.rows_read += 1
        try:
            examples.append(_to_example(row, number, names, answer_type, calculator_marks, require_cot))
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
    groups: dict[tuple[str, Answer], list[Example]] = {}
    for example in examples:
        answer = example.answer if answer_type is None else parse_target(example.answer, answer_type=answer_type)
        groups.setdefault((example.question, answer), []).append(example)
    return [
        replace(group[0], cots=tuple(dict.fromkeys(cot for example in group for cot in example.cots)))
        for group in groups.values()
    ]


class _RowError(Exception):
    """Its arguments are those of `LoadReport.reject`."""


def _to_example(
    row: Any,
    number: int,
    names: Mapping[str, str],
    answer_type: AnswerType | None,
    calculator_marks: CalculatorMarks,
    require_cot: bool,
) -> Example:
    where = f"row {number}"
    if isinstance(row, Example):
        extra, names = row.extra, {name: name for name in FIELDS}
        found = {"question": row.question, "cot": row.cots, "answer": row.answer, "item_id": row.item_id or None}
    elif isinstance(row, dict):
        extra = {key: value for key, value in row.items() if key not in names.values()}
        found = {name: row.get(key) for name, key in names.items()}
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
    if names.get("cot") == names["answer"] or (not cots and "####" in answer):
        cot, _, answer = (part.strip() for part in answer.rpartition("####"))
        cots = [_CALCULATOR_MARK.sub("", cot) if calculator_marks == "strip" else cot] if cot else []
    if not question:
        raise _RowError(f'no question (field "{names["question"]}")', where)
    if not answer:
        raise _RowError(f'no answer (field "{names["answer"]}")', where, question)
    if require_cot and not cots:
        raise _RowError("no annotated reasoning", where, question)
    try:
        if answer_type is not None:
            parse_target(answer, answer_type=answer_type)
    except ValueError as error:
        raise _RowError("unparsable answer", where, str(error)) from None
    return Example(str(values.get("item_id", number)), question, tuple(dict.fromkeys(cots)), answer, extra)


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
    source: Source, label: str, format: str, fields: dict[str, str], split: str, require_cot: bool
) -> tuple[Iterable[Any], dict[str, str]]:
    """Rows of a source and the names of their fields."""
    if unknown := sorted(set(fields) - set(FIELDS)):
        raise InputError(f"data.fields: {unknown[0]!r} is not a field; allowed: {', '.join(FIELDS)}")
    if not isinstance(source, str):
        return _with_fields(source, label, fields, require_cot)
    if format == "auto":
        format = _guess(source)
    if format == "hub":
        return _with_fields(_read_hub(source, split), source, fields, require_cot)
    if not Path(source).is_file():
        raise InputError(f"{source}: no such file")
    rows = _read_json(source)
    if format in FORMAT_FIELDS:
        return rows, FORMAT_FIELDS[format] | fields
    return _with_fields(rows, source, fields, require_cot)


def _guess(path: str) -> str:
    file = Path(path)
    if file.is_dir() or not file.exists():
        looks_like_id = path.count("/") <= 1 and not path.startswith((".", "/", "~")) and not file.suffix
        if file.is_dir() or looks_like_id:
            return "hub"
        raise InputError(f"{path}: no such file (nor does it look like a Hub id)")
    return "jsonl"


def _read_json(path: str) -> list[Any]:
    """The rows of a JSON list, or of JSON values one after the other, whatever their lines."""
    text, decoder = _read_text(path), json.JSONDecoder()
    values, at = [], _NO_SPACE.search(text)
    while at is not None:
        try:
            value, end = decoder.raw_decode(text, at.start())
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:  # integers of thousands of digits, thousands of brackets
            line = text.count("\n", 0, at.start()) + 1
            raise InputError(f"{path}, line {line}: JSON that cannot be read: {first_line(error)}") from None
        values.append(value)
        at = _NO_SPACE.search(text, end)
    if len(values) != 1 or isinstance(values[0], dict):
        return values
    if not isinstance(values[0], list):
        raise InputError(
            f"{path}: a JSON list of rows, or rows one after another, are expected, this is {type(values[0]).__name__}"
        )
    return values[0]


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _with_fields(
    rows: Iterable[Any], source: str, fields: dict[str, str], require_cot: bool
) -> tuple[list[Any], dict[str, str]]:
    """Complete a field mapping from the keys of all rows: own names, else ReFT's, else plain ones.

    Raises InputError for a needed or named field that no row has. A `cot` mapping is held against a source only
    where reasoning is required, since one mapping serves the training set and a test set without any.
    """
    rows = list(rows)
    keys = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
    found = {name: key for name in FIELDS for key in (name, REFT_FIELDS[name]) if key in keys and name not in fields}
    names = fields | found
    needed = {"question", "answer"} | (set(fields) if require_cot else set(fields) - {"cot"})
    for name in FIELDS:
        if keys and name in needed and names.get(name) not in keys:
            raise InputError(
                f"{source}: field {names.get(name, name)!r} for the {name} is missing; the rows have "
                f"{', '.join(keys)} (name yours with data.fields)"
            )
    return rows, {"question": "question", "answer": "answer"} | names


def _read_hub(path: str, split: str) -> list[Any]:
    import datasets

    try:
        name = "main" if path == "openai/gsm8k" else None  # the one set among the defaults that has no default config
        rows = datasets.load_dataset(path, name, split=split)
    except Exception as error:  # datasets raises many kinds; all mean the same to the user
        message = str(error).strip().splitlines()
        raise InputError(f"{path}: the dataset could not be loaded: {message[0] if message else error!r}") from None
    return list(rows)
