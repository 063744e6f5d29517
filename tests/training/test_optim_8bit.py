"""AdamW with its moments in 8 bits: against torch's own, to the bit through a checkpoint, and what is refused."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from carft_fast.config.schema import Config
from carft_fast.config.toml import load_config
from carft_fast.core.errors import InputError
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models.load import load_model
from carft_fast.training import optim
from carft_fast.training.checkpoint import CheckpointStore
from carft_fast.training.optim import check_optimizer
from carft_fast.training.parallel import Learner, build_learner

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """From where `make sampler` puts it."""
    monkeypatch.syspath_prepend(str(Path(sys.prefix) / "torchao"))


def config(*overrides: str) -> Config:
    options = ["rl.optimizer=adamw_8bit", "rl.lr=1e-3", "rl.weight_decay=0.1", "rl.max_grad_norm=1e9"]
    return load_config(None, ["model.path=synthetic", *options, *overrides])


def learner(settings: Config, trained: Path | None = None) -> Learner:
    model = load_model(settings, "synthetic", CPU, heads=True, trained=trained)
    made = build_learner(settings, model, settings.rl, CPU)
    if trained is not None:
        made.load(trained)
    return made


def step(made: Learner, number: int, *, loss: float = 1.0) -> float:
    """With gradients of a different size in every block; returns whether it was left out."""
    generator = torch.Generator().manual_seed(number)
    for parameter in made.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 10 ** (number % 3 - 2)
    return float(made.step(1e-3 / (number + 1), 1e9, torch.tensor(loss))[1])


def weights(made: Learner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


def moments(made: Learner) -> list[Any]:
    state = made.optimizer.state
    return [x for p in made.model.parameters() for x in optim.state_tensors(state[p]).values()]


def test_it_follows_adamw() -> None:
    """The first step's moments are not rounded yet; later ones are, to 8 bits of a block's largest."""
    eight, full = learner(config()), learner(config("rl.optimizer=adamw"))
    start = weights(full)
    for number in range(4):
        step(eight, number)
        step(full, number)
        found, expected = weights(eight), weights(full)
        for name, w in expected.items():
            moved = (w - start[name]).norm()
            assert float((found[name] - w).norm() / moved) < (1e-4 if number == 0 else 0.1), (number, name)
    assert any(x.dtype == torch.uint8 for x in moments(eight))


def test_a_checkpoint_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    straight = learner(config())
    for number in range(4):
        step(straight, number)
    first = learner(config())
    for number in range(2):
        step(first, number)
    store = CheckpointStore(tmp_path, config(), print)
    saved = store.save("rl", 2, first.model, build_tokenizer(), first.optimizer, model_path="synthetic", seed=0)
    again = learner(config(), saved)
    for number in (2, 3):
        step(again, number)
    for name, w in weights(straight).items():
        assert torch.equal(weights(again)[name], w), name
    assert all(torch.equal(a, b) for a, b in zip(moments(again), moments(straight), strict=True))


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    made = learner(config())
    assert step(made, 0) == 0
    before, held = weights(made), [x.clone() for x in moments(made)]
    assert step(made, 1, loss=float("nan")) == 1
    assert all(torch.equal(w, before[name]) for name, w in weights(made).items())
    assert all(torch.equal(a, b) for a, b in zip(moments(made), held, strict=True))


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
def test_divided_moments_are_refused(strategy: str) -> None:
    with pytest.raises(InputError, match=f'rl.optimizer = "adamw_8bit" is not possible with .*"{strategy}"'):
        check_optimizer(config(), "rl", strategy)
    check_optimizer(config(), "sft", strategy)


def test_without_torchao_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "find_spec", lambda name: None if name == "torchao" else importlib.util.find_spec(name))
    with pytest.raises(InputError, match=r'needs torchao: pip install "\.\[torchao\]"'):
        check_optimizer(config(), "rl", "ddp")
