"""Config: documented to the last field, round-trips, defaults from the paper, schedules and intervals."""

import tomllib
from pathlib import Path

import pytest

from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config.toml import differences, load_config, replaced, to_toml, value_origins
from carft_fast.core.errors import InputError

RECIPES = [QUICKSTART_CONFIG, *sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.toml"))]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
@pytest.mark.parametrize("documented", [True, False])
def test_a_resolved_config_loads_back(path: Path, documented: bool, tmp_path: Path) -> None:
    overrides = ['data.fields={question="q", answer="a \\"b\\""}', "rl.lr=1.25e-7"]
    config = load_config(str(path), overrides)
    text = to_toml(config, origins=value_origins(str(path), overrides) if documented else None)
    (tmp_path / "x.toml").write_text(text)
    assert load_config(str(tmp_path / "x.toml")) == config
    assert documented == ("# Peak learning rate of AdamW. Source: paper" in text)
    assert documented == ("\nlr = 1.25e-07  # --set\n" in text)
    assert documented == (f"\nmax_length = {config.data.max_length}  # {path}\n" in text)
    assert documented == ("\nbeta1 = 0.9  # default\n" in text)


def test_overrides_win_over_the_file_and_keep_their_type() -> None:
    config = load_config(str(QUICKSTART_CONFIG), ["seed=7", "rl.whiten_advantages=false", "output.name=x-1", "rl.lr=1"])
    assert (config.seed, config.rl.whiten_advantages, config.output.name, config.rl.lr) == (7, False, "x-1", 1.0)
    assert differences(config, load_config(str(QUICKSTART_CONFIG))) == [
        "seed: 0 -> 7",
        "rl.lr: 0.0002 -> 1.0",
        "rl.whiten_advantages: True -> False",
        "output.name: 'quickstart' -> 'x-1'",
    ]


def test_a_value_used_as_a_section_is_named() -> None:
    config = load_config(str(QUICKSTART_CONFIG))
    with pytest.raises(InputError, match=r"^--set rl\.lr\.x=1: lr is a value, not a section$"):
        load_config(None, ["rl.lr=1e-3", "rl.lr.x=1"])
    with pytest.raises(InputError, match=r"^rl\.lr\.x: lr is a value, not a section$"):
        replaced(config, {"rl.lr.x": 1})


def test_configs_are_plain_toml() -> None:
    for path in RECIPES:
        tomllib.loads(path.read_text())
