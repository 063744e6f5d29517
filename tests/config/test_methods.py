"""The methods' presets are what they are called."""

import pytest

from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config.methods import METHODS, load_method_config, method_name
from carft_fast.config.toml import load_config
from carft_fast.core.errors import InputError


def test_presets_are_what_they_are_called() -> None:
    quickstart = str(QUICKSTART_CONFIG)
    for name in METHODS:
        if name == "sft":
            continue
        config, values = load_method_config(quickstart, [], name)
        assert method_name(config) == name
        assert config.rollout.samples_per_prompt == (4 if "grpo" in name else 1)
        overridden, _ = load_method_config(quickstart, ["contrastive.coef=0.5", "rl.lr=1e-3"], name)
        assert (overridden.contrastive.coef, overridden.rl.lr) == (0.5, 1e-3)
        assert set(values) >= {"rl.estimator", "contrastive.mode", "reward.partial"}
    with pytest.raises(InputError, match="allowed: sft, reft, grpo, dr_grpo, carft, carft_negative, carft_both"):
        load_method_config(quickstart, [], "dpo")


def test_a_part_of_a_method_is_not_called_by_its_name() -> None:
    def named(*options: str) -> str:
        return method_name(load_config(None, options))

    assert named() == "carft"
    assert named("reward.partial=constant") == "custom", "CARFT without its partial reward"
    assert named("contrastive.mode=none") == "custom", "the partial reward alone"
    assert named("contrastive.mode=none", "reward.partial=constant") == "reft"
    assert named("contrastive.mode=answer") == "custom"
    assert named("reward.partial=constant", "reward.fn=a:b") == "carft"


def test_continued_sft_sees_as_many_rows_as_rl_has_rollouts() -> None:
    config, _ = load_method_config(str(QUICKSTART_CONFIG), [], "sft")
    assert config.sft.max_steps is not None
    assert config.sft.max_steps * config.sft.batch_size == 40 * 128
    assert config.sft.first_step == 700, "behind the rows that SFT has seen"
    assert config.sft.eval_every == 40
