"""Config: documented to the last field, round-trips, defaults from the paper, schedules and intervals."""

import tomllib
from pathlib import Path

import pytest

from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config.toml import differences, fingerprint, load_config, replaced, to_toml, value_origins
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


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 10_000,
        "x = " + "{a=" * 10_000,
        "[" + ".".join(["a"] * 100_000) + "]",
        "seed = " + "9" * 5_000,
        "[rl]\nlr = " + "[" * 300 + "]" * 300,
        "[rl]\nlr = '" + "x" * 10**6 + "'",
        "seed = 0x" + "f" * 10_000,
        "seed = 1e999",
        "[sft]\nlr = inf",
        "seed = -0x1",
        "rl = 3",
        "seed = 1979-05-27",
    ],
    ids=lambda text: text[:20],
)
def test_toml_that_breaks_readers_is_a_short_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_config(str(path))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "override",
    [
        "rl.lr=1e-3\nseed=5",
        "rl.lr=1e-3\n[rl]\nlr=2",
        "rl.lr=1\n\n[value]\nx=1",
        "seed=" + "9" * 5_000,
        "seed=" + "[" * 10_000,
        "seed=[[[" + "0x" + "f" * 9_000 + "]]]",
        "rl.lr=" + "[" * 300 + "]" * 300,
        "a" + ".a" * 100_000 + "=1",
        "\n.\n=1",
        "rl.lr=\x00",
    ],
    ids=lambda override: override[:20],
)
def test_overrides_of_several_lines_or_without_bounds_are_refused(override: str) -> None:
    with pytest.raises(InputError) as error:
        load_config(str(QUICKSTART_CONFIG), [override])
    assert len(str(error.value)) < 1000


def test_a_fingerprint_is_of_what_resume_compares() -> None:
    base = load_config(str(QUICKSTART_CONFIG))
    assert fingerprint(base) == fingerprint(load_config(str(QUICKSTART_CONFIG), ["distributed.timeout_s=77"]))
    longer = load_config(str(QUICKSTART_CONFIG), ["rl.max_steps=999", "sft.epochs=7", "rl.save_every=3"])
    assert not differences(longer, base)
    assert fingerprint(longer) == fingerprint(base)
    for change in ("seed=1", "rl.lr=1e-3", "data.fields={question='q'}", "output.keep_last=3"):
        changed = load_config(str(QUICKSTART_CONFIG), [change])
        assert differences(changed, base)
        assert fingerprint(changed) != fingerprint(base)
