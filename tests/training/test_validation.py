"""SFT's validation loss: against transformers in float64, a row at a time, and which checkpoint it makes the best."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from carft_fast.config.toml import load_config
from carft_fast.core.console import Console
from carft_fast.core.errors import InputError
from carft_fast.training.pipeline import prepare, train

from .runs import records, tiny_config

SHORT = ["data.eval_rows=12", "rollout.max_new_tokens=4", "sft.eval_loss=true", "sft.eval_every=2", "sft.max_steps=4"]


def test_it_is_the_mean_over_all_held_out_tokens(tmp_path: Path, tiny_run: list[str]) -> None:
    """Long and short annotations: a mean of the rows' means, or of the micro-batches', would be another number."""
    config = tiny_config(tiny_run, *SHORT, "sft.best_by=eval_loss", "sft.micro_batch_tokens=160")
    run = prepare(config, tmp_path / "run", Console(), stages=("sft",))
    summary = train(run, ("sft",), resume=False)
    folder = tmp_path / "run"
    found = {record["step"]: record["eval_loss"] for record in records(folder, "sft", "eval")}
    assert sorted(found) == [0, 2, 4]
    for step in (2, 4):
        lm = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / f"sft-{step:06d}", dtype=torch.float64)
        losses = []
        for row in run.held_out_rows:
            prompt, completion = row.prompt_ids, row.completions[0]
            with torch.no_grad():
                logits = lm(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="none"))
        assert found[step] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
        assert found[step] != pytest.approx(float(torch.stack([x.mean() for x in losses]).mean()), rel=1e-4)
    assert summary["sft_eval_loss"] == found[4]
    assert found[4] < found[2], "else the best by loss would be the best by accuracy"
    assert len({record["accuracy"] for record in records(folder, "sft", "eval")[1:]}) == 1
    assert os.readlink(folder / "checkpoints" / "best") == "sft-000004", "by accuracy it is the first of equals"
    assert "validation loss" in (folder / "report.md").read_text()


def test_it_changes_no_weight(tmp_path: Path, tiny_run: list[str]) -> None:
    for name, options in (("with", SHORT), ("without", [*SHORT, "sft.eval_loss=false"])):
        run = prepare(tiny_config(tiny_run, *options), tmp_path / name, Console(), stages=("sft",))
        train(run, ("sft",), resume=False)
    same = [(tmp_path / name / "sft" / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert same[0] == same[1]
    assert "eval_loss" not in (tmp_path / "without" / "metrics.jsonl").read_text()
    assert os.readlink(tmp_path / "with" / "checkpoints" / "best") == "sft-000002"


def test_rows_without_annotations_are_refused(tmp_path: Path, tiny_run: list[str]) -> None:
    rows = [{"question": f"{i} + 1?", "cot": f"{i} + 1 = {i + 1}", "answer": str(i + 1)} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "eval.jsonl").write_text("\n".join(json.dumps(row | {"cot": None}) for row in rows))
    options = [*SHORT, f"data.train={tmp_path / 'train.jsonl'}", f"data.eval={tmp_path / 'eval.jsonl'}"]
    with pytest.raises(InputError, match=r"none of the 8 rows of data\.eval has an annotated"):
        prepare(tiny_config(tiny_run, *options), tmp_path / "run", Console(), stages=("sft",))
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r'sft\.best_by = "eval_loss" needs eval_loss = true'):
        load_config(None, ["sft.best_by=eval_loss"])
