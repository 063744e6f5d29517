"""Escape sequences of data, models and libraries on every way to a terminal."""

import json
import logging
import subprocess
import sys
import tomllib

import pytest

from carft_fast.config.toml import load_config, to_toml
from carft_fast.core.errors import EngineError, InputError, RewardError, TrainingError
from carft_fast.core.text import visible, visible_json

ATTACK = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e\x7f"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e\x7f"


@pytest.mark.parametrize("kind", [InputError, EngineError, RewardError, TrainingError])
def test_errors_show_what_they_quote(kind: type[Exception]) -> None:
    """Python prints the text of an error that nobody caught."""
    code = f"from carft_fast.core.errors import {kind.__name__} as E\nraise E('row ' + {ATTACK!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert f"row {SHOWN}" in result.stderr.decode()
    assert ATTACK.encode() not in result.stderr


@pytest.mark.parametrize("value", [ATTACK, "日本 👩\u200d🚀", "\ud800", "a\nb\t", {ATTACK: [ATTACK]}])
def test_json_and_toml_are_visible_and_mean_the_same(value: object) -> None:
    text = visible_json({"a": value})
    assert visible(text) == text
    assert json.loads(text) == {"a": value}
    if value == ATTACK:
        assert tomllib.loads(f"a = {visible_json(value)}") == {"a": value}


def test_a_config_with_controls_is_still_toml() -> None:
    config = load_config(None, {"model.path": ATTACK})
    text = to_toml(config)
    assert visible(text) == text
    assert tomllib.loads(text)["model"]["path"] == ATTACK


LIBRARY = """
import logging, warnings
from carft_fast.core.text import guard_library_output
guard_library_output()
attack, token = {attack!r}, "hf_" + "a" * 30
logging.getLogger("some.library").warning("model type %s, %s", attack, token)
warnings.warn(attack + token)
try:
    raise ValueError(attack + token)
except ValueError:
    logging.getLogger("some.library").exception("failed")
"""


def test_records_and_warnings_of_libraries() -> None:
    result = subprocess.run([sys.executable, "-c", LIBRARY.format(attack=ATTACK)], capture_output=True, check=True)
    said = result.stderr.decode()
    assert said.count(SHOWN) == 3, said
    assert ATTACK not in said
    assert visible(said) == said
    assert "hf_aaa" not in said


def test_a_record_that_is_no_text_still_formats() -> None:
    from carft_fast.core.text import _Record

    record = _Record("a", logging.INFO, "file", 1, {"b": 2}, (), None)
    assert record.getMessage() == "{'b': 2}"
