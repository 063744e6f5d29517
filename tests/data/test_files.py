"""Files that other programs write, read back: CSV of csv.writer and pandas, Parquet and Arrow of pyarrow."""

import csv
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest

from carft_fast.core.errors import InputError
from carft_fast.core.example import Example
from carft_fast.data.load import load_examples

ROWS = [
    {
        "item_id": "007",
        "question": 'She said "two, or\nthree"?',
        "answer_cot": "NA, so\u2028 1 + 1 = 2.",
        "answer_value": "2.0",
    },
    {"item_id": "x", "question": "Was null enough?", "answer_cot": "None", "answer_value": "1,000"},
]
EXPECTED = [Example(r["item_id"], r["question"], (r["answer_cot"],), r["answer_value"]) for r in ROWS]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_csv(path: Path, rows: list[list[str]], **options: Any) -> str:
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **options).writerows(rows)
    return str(path)


def read(path: Path | str, **options: Any) -> list[Example]:
    return load_examples(str(path), require_cot=True, **options)[0]


def refusal(path: Path | str, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        read(path, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.csv", {}),
        ("A.CSV", {"encoding": "utf-8-sig"}),
        ("a.tsv", {"delimiter": "\t"}),
        ("b.csv", {"quoting": csv.QUOTE_ALL}),
    ],
)
def test_csv_cells_are_the_texts_they_are(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    path = write_csv(tmp_path / name, [list(ROWS[0]), *(list(row.values()) for row in ROWS)], **options)
    assert read(path) == EXPECTED
    (tmp_path / "odd name").write_bytes(Path(path).read_bytes())
    if not name.endswith(".tsv"):
        assert read(tmp_path / "odd name", format="csv") == EXPECTED


def test_csv_of_pandas(tmp_path: Path) -> None:
    pandas.DataFrame(ROWS).to_csv(tmp_path / "a.csv", index=False)
    assert read(tmp_path / "a.csv") == EXPECTED


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("question,cot,answer\nHow many, say?,So.,2\n", "line 2: 4 cells, the first line has 3"),
        ("question,cot,answer\nHm?,So.\n", "line 2: 2 cells, the first line has 3"),
        ("question,answer,answer\nHm?,2,2\n", "two columns are called 'answer'"),
        ('question,cot,answer\n"Hm?,So.,2\n', "line 2: not valid CSV"),
        (
            "question;cot;answer\nHm?;So.;2\n",
            "field 'question' for the question is missing; the rows have question;cot;answer",
        ),
        ("", "no rows"),
        ("question,cot,answer\n", "no rows"),
    ],
)
def test_csv_that_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    assert said in refusal(tmp_path / "a.csv")


def test_parquet_and_arrow(tmp_path: Path) -> None:
    """Also a name that is a pattern to `datasets`, and a file that has changed since it was read."""
    table = pa.Table.from_pylist([row | {"n": 1} for row in ROWS])
    pyarrow.parquet.write_table(table, tmp_path / "a[1].parquet")
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("a[1].parquet", "file.arrow", "stream.arrow"):
        found = read(tmp_path / name)
        assert found == [Example(e.item_id, e.question, e.cots, e.answer, {"n": 1}) for e in EXPECTED]
    pyarrow.parquet.write_table(table.slice(1), tmp_path / "a[1].parquet")
    assert [example.item_id for example in read(tmp_path / "a[1].parquet")] == ["x"]
    for name in ("bad.parquet", "bad.arrow"):
        (tmp_path / name).write_bytes(b"no such thing")
        message = refusal(tmp_path / name)
        assert f"{name}: the dataset could not be loaded: " in message
        assert "occurred while generating" not in message


def test_saved_datasets(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == EXPECTED
    datasets.DatasetDict(train=whole, held_out=whole.select([1])).save_to_disk(tmp_path / "several")
    assert read(tmp_path / "several", format="disk") == EXPECTED
    assert read(tmp_path / "several", split="held_out") == EXPECTED[1:]
    assert "no split 'test'; it has train, held_out" in refusal(tmp_path / "several", split="test")
    (tmp_path / "several" / "train" / "state.json").unlink()
    assert "the saved dataset could not be loaded" in refusal(tmp_path / "several")


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.arrow"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    assert f"{tmp_path / name}: no such file" in refusal(tmp_path / name)
    assert f"{tmp_path / name}: no such file" in refusal(tmp_path / name, format="parquet")
