"""Rows of a source, as its columns hold them: JSON, CSV, Parquet and Arrow files, saved datasets, the Hub."""

import csv
import glob
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from carft_fast.core import InputError, first_line

_NO_SPACE = re.compile(r"[^ \t\r\n]")
_BY_SUFFIX = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_SAVED = ("dataset_dict.json", "state.json")
"""One of them is in a folder that `save_to_disk` wrote."""


def read_rows(source: str, format: str, split: str) -> list[Any]:
    """All rows of a file, a folder or a Hub id, dicts unless a JSON file has others. Raises InputError.

    "auto" goes by a folder's content and a file's name; whatever is no other format is JSON. `split` is of the Hub and
    of saved datasets that have several.
    """
    if format == "auto":
        format = _guess(source)
    if format == "hub":
        return _loaded(source, split=split)
    if format == "disk":
        return _read_saved(source, split)
    if not Path(source).is_file():
        raise InputError(f"{source}: no such file")
    if format == "csv":
        return _read_csv(source)
    if format in ("parquet", "arrow"):
        return _loaded(format, source, split="train")
    return _read_json(source)


def _guess(path: str) -> str:
    file = Path(path)
    if any((file / name).is_file() for name in _SAVED):
        return "disk"
    if file.is_dir() or not file.exists():
        looks_like_id = path.count("/") <= 1 and not path.startswith((".", "/", "~")) and not file.suffix
        if file.is_dir() or looks_like_id:
            return "hub"
        raise InputError(f"{path}: no such file (nor does it look like a Hub id)")
    return _BY_SUFFIX.get(file.suffix.lower(), "json")


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
            f"{path}: expected a JSON list of rows, or rows one after another, found {type(values[0]).__name__}"
        )
    return values[0]


def _read_csv(path: str) -> list[Any]:
    """Every cell as the text it is. pandas, and with it `datasets`, makes numbers of some, nothing of "NA", and shifts
    the columns of rows with a cell too many."""
    reader = csv.reader(
        io.StringIO(_read_text(path)), delimiter="\t" if path.lower().endswith(".tsv") else ",", strict=True
    )
    csv.field_size_limit(sys.maxsize)
    rows, header = [], list[str]()
    try:
        for cells in reader:
            if not header:
                header = cells
                if twice := next((name for name in header if header.count(name) > 1), None):
                    raise InputError(f"{path}: two columns are called {twice!r}")
            elif cells:
                if len(cells) != len(header):
                    raise InputError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells, the first line has {len(header)} "
                        '(a text with commas, quotes or line breaks needs "..." around it)'
                    )
                rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from None
    return rows


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _loaded(path: str, file: str | None = None, *, split: str) -> list[Any]:
    """What `datasets.load_dataset` makes of a Hub id, a folder, or a file of the format `path`."""
    import datasets

    # "main": the one set among the defaults that has no default config. Brackets in a file's name are no pattern.
    options = {"data_files": glob.escape(file)} if file else {"name": "main" if path == "openai/gsm8k" else None}
    try:
        return list(datasets.load_dataset(path, split=split, **options))
    except Exception as error:  # datasets raises many kinds; all mean the same to the user
        raise InputError(f"{file or path}: the dataset could not be loaded: {_cause(error)}") from None


def _read_saved(path: str, split: str) -> list[Any]:
    import datasets

    try:
        found = datasets.load_from_disk(path)
    except Exception as error:  # as above
        raise InputError(f"{path}: the saved dataset could not be loaded: {_cause(error)}") from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise InputError(
                f"{path}: no split {split!r}; it has {', '.join(found)} (name yours with data.train_split or "
                "data.eval_split)"
            )
        found = found[split]
    return list(found)


def _cause(error: BaseException) -> str:
    """Its first line; of "An error occurred while generating the dataset" that of the error."""
    from datasets.exceptions import DatasetGenerationError

    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    message = str(error).strip().splitlines()
    return message[0] if message else repr(error)
