"""Which runs a comparison makes, and what it refuses before it makes one."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.compare.runs import expand, parse_methods, parse_seeds, parse_vary
from carft_fast.compare.study import load_study
from carft_fast.config import preset, replaced
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
        (lambda: parse_seeds("0,1,1"), "a seed appears twice"),
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


STUDY = """
config = "base.toml"
seeds = [0, 1]
references = ["plain"]
reach = 0.7
[arms.plain]
method = "reft"
[arms.published]
method = "carft"
set = {"contrastive.gradient" = "published"}
"""


def test_a_study_names_its_arms(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    study = load_study(tmp_path / "study.toml")
    assert [(v.label, v.method, v.values) for v in study.variants] == [
        ("plain", "reft", {}),
        ("published", "carft", {"contrastive.gradient": "published"}),
    ]
    assert study.variants[1].folder_name(1) == "published-seed1"


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "docs").glob("*.toml")), ids=lambda file: file.stem
)
def test_every_arm_of_the_studies_in_the_docs_has_a_config(file: Path) -> None:
    study = load_study(file)
    base = load_config(str(file.parent / study.config))
    for arm in study.variants:
        config = replaced(base, preset(arm.method, base) | arm.values)
        for key, value in arm.values.items():
            section, _, name = key.partition(".")
            assert getattr(getattr(config, section), name) == value, arm.label


@pytest.mark.parametrize(
    ("there", "instead", "message"),
    [
        ('config = "base.toml"', "", "config: Field required"),
        ("seeds = [0, 1]", "seeds = [0]", "seeds: List should have at least 2 items"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "a seed appears twice"),
        ("reach = 0.7", "reach = 70", "reach: Input should be less than 1"),
        ('["plain"]', '["reft"]', '"reft" is no arm; allowed: plain, published'),
        ('"carft"', '"ppo"', 'arms.published.method = "ppo": allowed: sft, reft'),
        ("contrastive.gradient", "data.train", "data.train is the same for all arms"),
        ("[arms.plain]", "[arms.plain", "cannot be read"),
        ("reach", "reached = 1\nreach", "reached: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_study_is_refused(tmp_path: Path, there: str, instead: str, message: str) -> None:
    file = tmp_path / "study.toml"
    file.write_text(STUDY.replace(there, instead))
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        load_study(file)
    assert str(file) in str(refused.value)
