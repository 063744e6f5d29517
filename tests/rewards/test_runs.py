"""Rewards in whole runs: an own function, programs, and what is refused before anything is written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from carft_fast.config.toml import load_config
from carft_fast.core.console import Console
from carft_fast.core.errors import InputError
from carft_fast.data.load import load_examples
from carft_fast.data.synthetic import build_model_config
from carft_fast.training.pipeline import evaluate_only, prepare

from ..training.runs import records, run_pipeline, tiny_config

FEW = ["sft.max_steps=1", "rl.max_steps=1", "data.eval_rows=4"]


def test_a_run_with_a_function(tmp_path: Path, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("length_reward.py").write_text(
        "def score(completions, examples):\n    return [len(text) / 8 for text in completions]\n"
    )
    config = tiny_config(
        tiny_run, *FEW, "reward.fn=length_reward:score", "reward.partial=constant", "output.samples_per_step=12"
    )
    run_pipeline(tmp_path / "run", config)
    rows = [json.loads(x) for x in (tmp_path / "run" / "samples" / "rl-000001.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows] == [round(len(row["completion"]) / 8, 4) for row in rows]
    (record,) = records(tmp_path / "run", "rl", "train")
    assert record["reward"] == pytest.approx(sum(row["reward"] for row in rows) / 12, rel=1e-3)
    sampled = tiny_config(tiny_run, *FEW, "reward.fn=length_reward:score", "reward.partial=constant", "eval.samples=2")
    prepared = prepare(sampled, tmp_path / "eval", Console(), stages=())
    figures = evaluate_only(prepared).metrics
    assert "pass@2" in figures
    assert not any(name.startswith("maj@") for name in figures), "scores say nothing of which answers are one"
    last = records(tmp_path / "run", "rl", "eval")[-1]
    evaluated = (tmp_path / "run" / "samples" / "rl-eval-000001.jsonl").read_text().splitlines()
    assert last["correct"] == sum(len(json.loads(x)["completion"]) >= 8 for x in evaluated)


@pytest.fixture
def byte_model(tmp_path: Path) -> Path:
    """An untrained Llama that reads and writes any text: one token a byte."""
    specials = ["<unk>", "<pad>", "<eos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*specials, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )
    config = build_model_config(len(fast))
    config.max_position_embeddings = 2048
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    fast.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_run_on_programs(
    tmp_path: Path, tiny_run: list[str], shared_data: Callable[[str], Path], byte_model: Path
) -> None:
    data = str(shared_data("svamp_python_sdp.json"))
    options = ["reward.answer_type=program", f"model.path={byte_model}", f"data.train={data}", f"data.eval={data}"]
    options += ["data.train_rows=24", "data.max_length=2048"]
    options += ["sft.micro_batch_tokens=4096", "rl.micro_batch_tokens=4096"]
    config = tiny_config(tiny_run, *FEW, *options)
    run = prepare(config, tmp_path / "look", Console(), stages=("sft", "rl"))
    taught = [run.prompt_format.decode(row.completion_ids) for row in run.train_rows]
    assert taught == [row.example.cots[0] for row in run.train_rows], "the program alone"
    with run.grader:
        assert all(grade.correct for grade in run.grader.grade(taught, [row.example for row in run.train_rows]))
    run_pipeline(tmp_path / "run", config)
    (record,) = records(tmp_path / "run", "rl", "train")
    assert 0 <= record["reward"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["reward.fn=os:getcwd"], 'needs partial = "constant"'),
        (["reward.fn=no_such_module:f", "reward.partial=constant"], "no module no_such_module"),
        (["reward.partial_base=0.05"], "partial_base = 0.05"),
        (["reward.partial_base=0.95"], "must be within 0 to correct_score = 1"),
        (["reward.correct_score=0.25"], "must be within 0 to correct_score = 0.25"),
        (["reward.correct_score=0.05", "reward.partial=constant"], "partial_constant = 0.1"),
        (["reward.correct_score=0.0"], "reward.correct_score = 0.0"),
        (["reward.answer_type=prose"], "reward.answer_type"),
        (["reward.program_workers=0"], "reward.program_workers = 0"),
    ],
)
def test_refused_before_anything_is_written(
    tmp_path: Path, tiny_run: list[str], options: list[str], message: str
) -> None:
    with pytest.raises(InputError) as error:
        prepare(tiny_config(tiny_run, *options), tmp_path / "run", Console(), stages=("sft", "rl"))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_function_takes_any_target(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"question": "q", "answer_cot": "c", "answer_value": "a long essay"}]))
    examples, _ = load_examples(str(path), answer_type=None, require_cot=True)
    assert examples[0].answer == "a long essay"
    own = ["reward.fn=a:b", "reward.partial=constant", "reward.correct_score=0.05"]
    assert load_config(None, own).reward.fn == "a:b", "constants that are not used bound nothing"
