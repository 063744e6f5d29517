"""The store alone: what is kept, what a failed or late write does, what is exported."""

import os
import threading
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import carft_fast.training.checkpoint as checkpoint_module
from carft_fast.config.schema import Config
from carft_fast.config.toml import load_config
from carft_fast.core.errors import InputError, TrainingError
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.load import load_model
from carft_fast.training.checkpoint import CheckpointStore, load_optimizer
from carft_fast.training.export import export_checkpoint
from carft_fast.training.optim import build_optimizer

from ..core.damage import flip_bit, no_file_larger_than

CPU = torch.device("cpu")


def config(*more: str) -> Config:
    return load_config(None, ['model.path="synthetic"', *more])


class Trained:
    """A model after one update, and a store for it; `told` is what the console was told."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.told: list[str] = []
        self.folder = folder
        self.store = CheckpointStore(folder, config(*overrides), self.told.append)
        self.model: CarftModel = load_model(config(), "synthetic", CPU, heads=True)
        self.optimizer = build_optimizer(self.model, config().rl)
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        self.optimizer.step()

    def save(self, step: int, stage: str = "rl", *, best: bool = False) -> Path:
        return self.store.save(
            stage, step, self.model, build_tokenizer(), self.optimizer, model_path="synthetic", seed=0, best=best
        )

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return Trained(tmp_path / "checkpoints")


def test_an_export_takes_a_tokenizers_folder_of_chat_templates_along(trained: Trained, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    checkpoint = trained.store.save(
        "rl", 1, trained.model, tokenizer, trained.optimizer, model_path="synthetic", seed=0
    )
    export_checkpoint(checkpoint, tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_with_lora_a_save_holds_no_frozen_weight(tmp_path: Path) -> None:
    adapted = load_model(config("lora.rank=2"), "synthetic", CPU, heads=True)
    store = CheckpointStore(tmp_path, config("lora.rank=2", "output.async_save=true"), print)
    copied: list[int] = []
    host_copy = checkpoint_module._host_copy

    def counted(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        copied.append(sum(tensor.numel() for tensor in tensors.values()))
        return host_copy(tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_module, "_host_copy", counted)
        optimizer = build_optimizer(adapted, config().rl)
        saved = store.save("rl", 1, adapted, build_tokenizer(), optimizer, model_path="synthetic", seed=0)
        store.close()
    assert sum(copied) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    again = load_model(config("lora.rank=2"), "synthetic", CPU, heads=True, trained=saved)
    assert all(map(torch.equal, again.parameters(), adapted.parameters()))


def test_rotation_goes_by_step_whatever_the_clock_says(trained: Trained) -> None:
    for step in (1, 2, 3, 10):
        path = trained.save(step, "sft" if step < 3 else "rl", best=step == 1)
        os.utime(path, (0, 4e9 - 1e8 * step))
    assert trained.names() == ["best", "rl-000003", "rl-000010", "sft-000001"]
    assert trained.store.latest("rl") == (trained.folder / "rl-000010", 10)


def test_rotation_keeps_one_that_is_good_for_certain(trained: Trained) -> None:
    trained.save(1)
    flip_bit(trained.save(2) / "optimizer.safetensors")
    trained.save(3)
    assert trained.names() == ["damaged-rl-000002", "rl-000001", "rl-000003"]
    assert "rl-000002 is damaged: optimizer.safetensors has SHA-256" in trained.told[0]
    flip_bit(trained.folder / "rl-000003" / "config.toml")
    assert trained.store.latest("rl") == (trained.folder / "rl-000001", 1)


def test_a_damaged_best_checkpoint_is_none(trained: Trained) -> None:
    trained.save(1, best=True)
    trained.save(2)
    assert trained.store.best("rl") == trained.folder / "rl-000001"
    assert trained.store.best("sft") is None
    (trained.folder / "rl-000001" / "model.safetensors").unlink()
    assert trained.store.best("rl") is None
    assert trained.names() == ["damaged-rl-000001", "rl-000002"]
    assert "model.safetensors is missing" in trained.told[0]
    assert "best evaluated checkpoint" in trained.told[1]
    trained.save(3, best=True)
    assert trained.store.best("rl") == trained.folder / "rl-000003"


def test_an_asynchronous_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    plain, late = Trained(tmp_path / "plain"), Trained(tmp_path / "late", "output.async_save=true")
    expected = plain.save(1)
    written = threading.Event()
    late.store._settle = lambda *_: written.wait(60)  # type: ignore[method-assign,assignment]  # it ends when we say
    path = late.save(1)
    with torch.no_grad():
        for parameter in late.model.parameters():
            parameter.zero_()
            late.optimizer.state[parameter]["exp_avg"].zero_()
    assert late.store._pending is not None
    assert not late.store._pending.done()
    late.store.check()
    written.set()
    late.store.close()
    for name in ("model.safetensors", "carft_heads.safetensors", "optimizer.safetensors"):
        assert (path / name).read_bytes() == (expected / name).read_bytes()
    load_optimizer(path, late.model, late.optimizer)
    for ours, other in zip(late.model.parameters(), plain.model.parameters(), strict=True):
        assert late.optimizer.state[ours]["exp_avg"].equal(plain.optimizer.state[other]["exp_avg"])


@pytest.mark.parametrize("noticed", ["check", "save", "wait", "close"])
def test_a_failed_asynchronous_write_is_raised_later(tmp_path: Path, noticed: str) -> None:
    trained = Trained(tmp_path / "checkpoints", "output.async_save=true")
    trained.save(1)
    trained.store.wait()
    with no_file_larger_than(100_000):
        trained.save(2)
        assert trained.store._pending is not None
        trained.store._pending.exception(timeout=60)
    with pytest.raises(TrainingError, match=r"rl-000002 cannot be written: File too large \(about [\d,]{7,} bytes"):
        trained.save(3) if noticed == "save" else getattr(trained.store, noticed)()
    assert trained.names() == ["rl-000001"]
    assert trained.store.latest("rl") == (trained.folder / "rl-000001", 1)
    trained.save(3)
    trained.store.close()
    assert trained.names() == ["rl-000001", "rl-000003"]


def test_export_refuses_what_it_cannot_read_or_would_overwrite(trained: Trained, tmp_path: Path) -> None:
    checkpoint, out = trained.save(1), tmp_path / "out"
    with pytest.raises(InputError, match="no such folder"):
        export_checkpoint(tmp_path / "nowhere", out)
    with pytest.raises(InputError, match=r"no checkpoint \(trainer_state.json is missing\)"):
        export_checkpoint(trained.folder, out)
    export_checkpoint(checkpoint, out)
    assert load_file(out / "model.safetensors").keys() == load_file(checkpoint / "model.safetensors").keys()
    with pytest.raises(InputError, match="this is an exported model"):
        export_checkpoint(out, tmp_path / "again")
    with pytest.raises(InputError, match="not empty"):
        export_checkpoint(checkpoint, out)
    with pytest.raises(InputError, match="is a file"):
        export_checkpoint(checkpoint, out / "config.json")
    flip_bit(checkpoint / "model.safetensors")
    with pytest.raises(InputError, match=r"damaged: model\.safetensors has SHA-256"):
        export_checkpoint(checkpoint, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "out"]
