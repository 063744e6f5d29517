"""Which runs a comparison makes, and what it refuses before it makes one."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.compare.runs import expand, parse_methods, parse_seeds, parse_vary
from carft_fast.config.toml import load_config
from carft_fast.core.errors import InputError


def test_varied_fields_go_to_the_methods_that_read_them() -> None:
    base = load_config(str(QUICKSTART_CONFIG))
    key, values = parse_vary("rl.kl_coef=0.0, 0.05")
    labels = [v.label for v in expand(["sft", "reft", "dr_grpo"], {key: values, "rl.lr": [1e-4]}, base)]
    assert labels == [
        "sft",
        "reft rl.kl_coef=0 rl.lr=0.0001",
        "reft rl.kl_coef=0.05 rl.lr=0.0001",
        "dr_grpo rl.lr=0.0001",  # its KL coefficient is part of the method
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_methods("reft,ppo"), 'method "ppo": unknown'),
        (lambda: parse_seeds("0,1,1"), "a seed is there twice"),
        (lambda: parse_seeds("a"), "expected whole numbers"),
        (lambda: parse_vary("lr=1"), "expected section.key=value"),
        (lambda: parse_vary("data.train=a,b"), "the same for all runs"),
    ],
)
def test_bad_words_are_named(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "ppo"], 'method "ppo": unknown'),
        (["--set", "rl.eval_every=0"], "rl.eval_every = 0"),
        (["--vary", "rl.lr=-1.0"], "rl.lr = -1.0"),
        (["--method", "carft"], "No such option"),
    ],
)
def test_refusals_come_first(tmp_path: Path, words: list[str], message: str) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "carft_fast", "compare", "--output-dir", str(tmp_path / "x"), *words],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 2
    assert message in re.sub(r"\s+", " ", found.stderr)
    assert not (tmp_path / "x").exists()
