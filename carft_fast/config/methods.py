"""Methods as configuration: the fields that define each one, and nothing else.

What a method leaves open (learning rate, KL coefficient of PPO, batch, epochs) is the base config's.
"""

from collections.abc import Sequence
from typing import Any

from carft_fast.config.schema import Config
from carft_fast.config.toml import Overrides, load_config
from carft_fast.core import InputError

GROUP_SIZE = 4
"""Completions per question of the group methods where the base config has 1."""

_PPO = {"rl.estimator": "gae", "rl.loss_mean": "sequence", "rl.kl_loss_coef": 0.0}
_CARFT = _PPO | {"reward.partial": "embedding"}
_GROUP = {"rl.kl_coef": 0.0, "contrastive.mode": "none", "reward.partial": "constant"}

METHODS: dict[str, dict[str, Any]] = {
    # more SFT in place of RL, for as long as RL would run: see `continued_sft`
    "sft": {},
    "reft": _PPO | {"contrastive.mode": "none", "reward.partial": "constant"},
    # KL coefficient: Shao et al. 2024
    "grpo": _GROUP | {"rl.estimator": "grpo", "rl.loss_mean": "sequence", "rl.kl_loss_coef": 0.04},
    "dr_grpo": _GROUP | {"rl.estimator": "dr_grpo", "rl.loss_mean": "constant", "rl.kl_loss_coef": 0.0},
    "carft": _CARFT | {"contrastive.mode": "positive"},
    "carft_negative": _CARFT | {"contrastive.mode": "negative"},
    "carft_both": _CARFT | {"contrastive.mode": "both"},
}
"""Name -> dotted key -> value."""


def check_method(name: str, allowed: Sequence[str] = tuple(METHODS)) -> None:
    if name not in allowed:
        raise InputError(f'method "{name}": unknown; allowed: {", ".join(allowed)}')


def preset(name: str, base: Config) -> dict[str, Any]:
    """What method `name` sets on top of `base`: dotted key -> value."""
    check_method(name)
    if name == "sft":
        return continued_sft(base)
    values = dict(METHODS[name])
    if values["rl.estimator"] != "gae" and base.rollout.samples_per_prompt == 1:
        values["rollout.samples_per_prompt"] = GROUP_SIZE
    return values


def continued_sft(base: Config) -> dict[str, Any]:
    """SFT on as many annotated rows as RL with `base` would sample rollouts, in SFT's own batches. It begins after the
    rows that sft.max_steps has seen. It evaluates and saves after as many rows as RL does."""
    sft, rl = base.sft, base.rl

    def steps(rl_steps: int) -> int:
        return -(-rl_steps * rl.batch_size // sft.batch_size)

    return {
        "sft.max_steps": steps(rl.max_steps) if rl.max_steps else None,
        "sft.epochs": rl.epochs * base.rollout.samples_per_prompt,
        "sft.first_step": sft.first_step + (sft.max_steps or 0),
        "sft.eval_every": steps(rl.eval_every) if rl.eval_every else None,
        "sft.save_every": steps(rl.save_every) if rl.save_every else None,
    }


def load_method_config(path: str | None, overrides: Overrides, name: str | None) -> tuple[Config, dict[str, Any]]:
    """The config of --config, --method and --set, applied in that order, and what the method set."""
    if name is None:
        return load_config(path, overrides), {}
    check_method(name)
    # a --set may be valid with the method alone; continued SFT needs those that say how long RL runs
    base = load_config(path, overrides if name == "sft" else ())
    values = preset(name, base)
    return load_config(path, overrides, values), values


def method_name(config: Config) -> str:
    """The RL method with the config's estimator, contrastive signal and partial reward; "custom" if there is none.

    With a `reward.fn`, which leaves no partial reward, the first two decide.
    """
    found: dict[str, str] = {"rl.estimator": config.rl.estimator, "contrastive.mode": config.contrastive.mode}
    if not config.reward.fn:
        found["reward.partial"] = config.reward.partial
    return next((name for name, values in METHODS.items() if found.items() <= values.items()), "custom")
