"""Config: documented to the last field, round-trips, defaults from the paper, schedules and intervals."""

import math
import tomllib
from pathlib import Path

import pytest

from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config.schema import Config, SftConfig
from carft_fast.config.toml import differences, iter_fields, load_config, replaced, to_toml, value_origins
from carft_fast.core.errors import InputError
from carft_fast.training.evaluate import wilson_interval
from carft_fast.training.optim import learning_rate

RECIPES = [QUICKSTART_CONFIG, *sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.toml"))]


def test_every_field_says_what_it_is() -> None:
    for key, field, _ in iter_fields(Config()):
        assert field.description, key
        assert len(field.description) > 15, key


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


def test_defaults_are_those_of_the_paper() -> None:
    config = Config()
    assert (config.sft.lr, config.sft.batch_size, config.data.max_length) == (1e-5, 64, 1024)
    rl = config.rl
    assert (rl.lr, rl.batch_size, rl.ppo_epochs, rl.kl_coef, rl.value_coef) == (3e-7, 64, 2, 0.05, 5.0)
    assert (rl.gamma, rl.lam, rl.clip_low, rl.clip_high, rl.value_clip) == (1.0, 0.95, 0.2, 0.2, 0.2)
    assert rl.whiten_eps == 1e-8
    reward = config.reward
    scores = (reward.correct_score, reward.partial_constant, reward.partial_base, reward.partial_scale)
    assert scores == (1.0, 0.1, 0.2, 0.1)
    contrastive = config.contrastive
    assert contrastive.negative_weight == 0.5
    assert (contrastive.temperature, contrastive.coef, contrastive.positive_clamp) == (0.2, 1e-3, 0.9)
    sampling = config.rollout
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)


def test_configs_are_plain_toml() -> None:
    for path in RECIPES:
        tomllib.loads(path.read_text())


def test_learning_rate() -> None:
    def curve(**values: object) -> list[float]:
        config = SftConfig.model_validate({"lr": 2.0, **values})
        return [learning_rate(step, 11, config) for step in range(11)]

    assert curve() == [2.0] * 11
    assert curve(warmup_steps=4)[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    linear = curve(lr_schedule="linear", lr_final_ratio=0.1)
    assert linear[0] == 2.0
    assert linear[5] == pytest.approx(1.1)
    assert linear[-1] == pytest.approx(0.2)
    cosine = curve(lr_schedule="cosine", warmup_steps=1)
    assert cosine[1] == 2.0
    assert cosine[-1] == pytest.approx(0.0)
    assert cosine[4] == pytest.approx(1 + math.cos(math.pi / 3))


def test_wilson_interval() -> None:
    """Against values of the textbook formula."""
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(400, 400) == pytest.approx((0.9905, 1.0), abs=1e-4)
