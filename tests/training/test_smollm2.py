"""A real small model on real rows: SmolLM2-135M-Instruct from the package index, SVAMP with annotated reasoning."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from carft_fast.data.prompts import PromptFormat, check_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def test_chat_template_of_a_real_tokenizer(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    check_tokenizer(tokenizer)
    prompt_format = PromptFormat(tokenizer, "chat")
    ids = prompt_format.prompt_ids("How many eggs?")
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nHow many eggs?<|im_end|>\n<|im_start|>assistant\n")
    assert prompt_format.completion_ids("Two.", "2")[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert (
        PromptFormat(tokenizer).decode(PromptFormat(tokenizer).prompt_ids("a")) == "Question:\na\nAnswer reasoning:\n"
    )


@pytest.mark.long
def test_two_sft_steps_and_one_rl_step_on_svamp(
    smollm2: Path, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    overrides = {
        "model.path": smollm2,
        "model.compute_dtype": "float32",  # bfloat16 takes minutes on a processor without AVX-512
        "data.train": shared_data("svamp_nl.json"),
        "data.eval": shared_data("svamp_test_set.json"),
        "data.eval_rows": 2,
        "sft.max_steps": 2,
        "sft.batch_size": 2,
        "sft.warmup_steps": 0,
        "sft.lr": 1e-4,
        "rl.max_steps": 1,
        "rl.batch_size": 2,
        "rl.mini_batch_size": 2,
        "rollout.max_new_tokens": 16,
    }
    command = [
        sys.executable,
        "-m",
        "carft_fast",
        "quickstart",
        "--config",
        str(ROOT / "configs" / "svamp_smollm2_cpu.toml"),
    ]
    command += [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
    result = subprocess.run([*command, "--output-dir", str(folder)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, second = (r for r in records if (r["stage"], r["kind"]) == ("sft", "train"))
    # a pretrained model that reads the text at all is far below the 10.8 nats of a uniform guess over 49,152 tokens
    assert 0.3 < first["loss"] < 4
    assert second["loss"] < 4
    (step,) = (r for r in records if (r["stage"], r["kind"]) == ("rl", "train"))
    assert step["first_ratio_error"] == 0.0
    assert step["sampler_diff_mean"] < 1e-3
    assert step["completion_tokens"] <= 2 * 16
    samples = (folder / "samples" / "rl-000001.jsonl").read_text().splitlines()
    questions = {row["question"] for row in json.loads(shared_data("svamp_nl.json").read_text())}
    assert all(json.loads(line)["question"] in questions for line in samples)
