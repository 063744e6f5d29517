"""`carft-fast eval` with samples, through the hf engine: figures recomputed from the rows it writes."""

import itertools
import json
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest
import transformers
from typer.testing import CliRunner

from carft_fast.cli import QUICKSTART_CONFIG, app
from carft_fast.config.toml import load_config
from carft_fast.core.console import Console
from carft_fast.training.loop import picked_rows
from carft_fast.training.pipeline import prepare

SAMPLES = 4


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained a little (`run`), evaluated twice (`first`, `again`)."""
    folder = tmp_path_factory.mktemp("evaluation")
    values = ["sft.max_steps=120", "sft.warmup_steps=5", "data.eval_rows=24", "rollout.max_new_tokens=40"]
    words = ["--config", str(QUICKSTART_CONFIG), *(word for value in values for word in ("--set", value))]
    outcome = CliRunner().invoke(app, ["sft", *words, "--output-dir", str(folder / "run")])
    assert outcome.exit_code == 0, outcome.output
    values = [f"model.path={folder / 'run' / 'sft'}", f"eval.samples={SAMPLES}", "eval.k=[1,2,4]", "eval.maj_k=[3,4]"]
    words += [word for value in values for word in ("--set", value)]
    for name in ("first", "again"):
        outcome = CliRunner().invoke(app, ["eval", *words, "--output-dir", str(folder / name)])
        assert outcome.exit_code == 0, outcome.output
        assert "pass@4" in outcome.output
    return folder


def test_figures_follow_from_the_rows(results: Path) -> None:
    rows = [json.loads(line) for line in (results / "first" / "samples" / "eval.jsonl").read_text().splitlines()]
    figures = json.loads((results / "first" / "summary.json").read_text())
    assert len(rows) == figures["rows"] == 24
    assert figures["accuracy"] == mean(row["correct"] for row in rows)
    assert all(len(row["samples"]) == SAMPLES for row in rows)
    verdicts = [[sample["correct"] for sample in row["samples"]] for row in rows]
    assert any(any(row) and not all(row) for row in verdicts), "nothing to tell k apart"
    for k in (1, 2, 4):
        expected = mean(mean(map(any, itertools.combinations(row, k))) for row in verdicts)
        assert figures[f"pass@{k}"] == pytest.approx(expected)
        low, high = figures[f"pass@{k}_ci95"]
        assert low <= expected <= high
    for k in (3, 4):
        right = 0
        for row in rows:
            votes = Counter(s["extracted"] for s in row["samples"][:k] if s["extracted"] is not None)
            verdict = row[f"maj@{k}"]
            if not votes:
                assert verdict == {"extracted": None, "correct": False}
                continue
            assert votes[verdict["extracted"]] == max(votes.values())
            assert verdict["correct"] == (verdict["extracted"] == float(row["target"]))
            right += verdict["correct"]
        assert figures[f"maj@{k}"] == right / len(rows)
    assert all(row["prompt"] == f"Question:\n{row['question']}\nAnswer reasoning:\n" for row in rows)


def test_the_same_seed_draws_the_same_samples(results: Path) -> None:
    first, again = ((results / name / "samples" / "eval.jsonl").read_text() for name in ("first", "again"))
    assert first == again


def test_greedy_is_what_training_evaluates(results: Path) -> None:
    records = map(json.loads, (results / "run" / "metrics.jsonl").read_text().splitlines())
    last = [record for record in records if record["kind"] == "eval"][-1]
    assert json.loads((results / "first" / "summary.json").read_text())["accuracy"] == last["accuracy"]


def test_epochs_go_round_a_questions_annotations(results: Path, tmp_path: Path) -> None:
    """Rows of both stages, over steps that span epochs, from a file with one to three annotations a row."""
    rows = [
        {"item_id": str(i), "question": f"{i} ?", "answer_value": "1", "answer_cot": ["1", "2", "3"][: i % 3 + 1]}
        for i in range(7)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    model = results / "run" / "sft"
    config = load_config(str(QUICKSTART_CONFIG), [f"data.train={path}", f"data.eval={path}", f"model.path={model}"])
    run = prepare(config, tmp_path / "run", Console(), stages=("sft",))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for stage in ("sft", "rl"):
        drawn = [row for step in range(14) for row in picked_rows(run, stage, 3, step)]  # six epochs of seven rows
        for i in range(7):
            texts = [tokenizer.decode(row.completion_ids)[0] for row in drawn if row.example.item_id == str(i)]
            assert len(texts) == 6
            count = i % 3 + 1
            assert all(len(set(texts[epoch : epoch + count])) == count for epoch in range(7 - count)), texts
        again = picked_rows(run, stage, 3, 9)
        assert [row.completions for row in again] == [row.completions for row in drawn[27:30]]
