"""Checkpoints over real processes (gloo): any number of ranks reads what any number wrote, to the bit."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from carft_fast.config.schema import Config
from carft_fast.config.toml import load_config
from carft_fast.core.durable import find_damage
from carft_fast.core.errors import TrainingError
from carft_fast.core.processes import leave
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.load import load_model
from carft_fast.models.packing import pack
from carft_fast.training.checkpoint import CheckpointStore, has_sharded, load_sharded, load_trained
from carft_fast.training.export import export_checkpoint
from carft_fast.training.optim import build_optimizer
from tests.processes import spawn

CPU = torch.device("cpu")
SMALL = ['model.path="synthetic"', "model.embedding_dim=3"]  # the value head has fewer rows than there are ranks


def config(*more: str) -> Config:
    return load_config(None, [*SMALL, *more])


class Trainer:
    """A model and its AdamW, sharded where `sharded`; `step` is a real update, another for every rank and step."""

    def __init__(self, settings: Config, *, sharded: bool, trained: Path | None = None) -> None:
        self.settings = settings
        plain = trained if trained is not None and not has_sharded(trained) else None
        self.model = load_model(settings, "synthetic", CPU, heads=True, trained=plain)
        if sharded:
            for layer in self.model.lm.base_model.layers:
                fully_shard(layer)
            fully_shard(self.model)
        self.optimizer = build_optimizer(self.model, settings.rl)
        if trained is not None:
            load_trained(trained, self.model, self.optimizer)

    def step(self, number: int, part: int = 0) -> None:
        draw = torch.Generator().manual_seed(10 * number + part)
        sequences = [torch.randint(5, 40, (n,), generator=draw).tolist() for n in (6, 9)]
        batch = pack(sequences, [[], []], CPU)

        def loss_of(model: CarftModel) -> Tensor:
            hidden_TD = model.hidden_states(batch, need_logits=False).hidden_TD
            logits_TV = hidden_TD @ model.head_weight_VD.T
            return logits_TV.logsumexp(-1).mean() + model.value(hidden_TD).square().mean()

        self.model(loss_of).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path, number: int, store: CheckpointStore | None = None) -> Path:
        store = store or CheckpointStore(folder, self.settings, print)
        path = store.save("rl", number, self.model, build_tokenizer(), self.optimizer, model_path="synthetic", seed=0)
        store.close()
        return path

    def whole(self) -> dict[str, Tensor]:
        """Weights and moments, gathered."""
        found = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{name}.{key}"] = value
        return {name: getattr(value, "full_tensor", lambda v=value: v)().clone() for name, value in found.items()}


def _rank(rank: int, folder: Path) -> None:
    """Three processes make a group of two, then one of three, then one of two again."""

    @contextmanager
    def group(name: str, size: int) -> Iterator[bool]:
        if rank >= size:
            yield False
            return
        dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=size)
        yield True
        dist.destroy_process_group()

    def note(name: str, values: Any) -> None:
        torch.save(values, folder / f"{name}-{rank}.pt")

    with group("saves", 2) as in_group:
        if in_group:
            trainer = Trainer(config(), sharded=True)
            trainer.step(0, rank)
            trainer.step(1, rank)
            trainer.save(folder / "sharded", 2)
            note("at-2", trainer.whole())
            store = CheckpointStore(folder / "async", config("output.async_save=true"), print)
            path = store.save(
                "rl", 2, trainer.model, build_tokenizer(), trainer.optimizer, model_path="synthetic", seed=0
            )
            trainer.step(2, rank)  # while it is written
            store.close()
            assert path.is_dir()
            trainer.step(3, rank)
            note("at-4", trainer.whole())

            adapted = Trainer(config("lora.rank=2"), sharded=True)
            adapted.step(0, rank)
            adapted.step(1, rank)
            adapted.save(folder / "adapted", 2)
            note("adapted", adapted.whole())

            replica = Trainer(config(), sharded=False)
            replica.step(0)
            replica.step(1)
            replica.save(folder / "plain", 2)
            note("plain", replica.whole())
            (folder / "a file").touch()
            try:
                replica.save(folder / "a file" / "checkpoints", 2)
            except TrainingError as error:
                note("refused", str(error))

    with group("three", 3) as in_group:
        if in_group:
            note("three", Trainer(config(), sharded=True, trained=folder / "sharded" / "rl-000002").whole())
            note("three-plain", Trainer(config(), sharded=True, trained=folder / "plain" / "rl-000002").whole())
            adapted = Trainer(config("lora.rank=2"), sharded=True, trained=folder / "adapted" / "rl-000002")
            note("three-adapted", adapted.whole())

    with group("resumes", 2) as in_group:
        if in_group:
            resumed = Trainer(config(), sharded=True, trained=folder / "async" / "rl-000002")
            resumed.step(2, rank)
            resumed.step(3, rank)
            note("resumed", resumed.whole())
    leave()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    spawn(_rank, (folder,), 3)
    return folder


def noted(folder: Path, name: str, rank: int = 0) -> Any:
    return torch.load(folder / f"{name}-{rank}.pt")


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_three_ranks_and_one_process_read_what_two_wrote(done: Path) -> None:
    expected = noted(done, "at-2")
    assert sum(name.endswith(".exp_avg") for name in expected) > 20
    assert any(float(value.abs().max()) > 0 for name, value in expected.items() if name.endswith(".exp_avg"))
    for rank in range(3):
        assert_equal(noted(done, "three", rank), expected)
    for saved in ("sharded", "async"):
        alone = Trainer(config(), sharded=False, trained=done / saved / "rl-000002")
        assert_equal(alone.whole(), expected)


def test_each_rank_wrote_a_part_and_the_manifest_has_all(done: Path) -> None:
    folder = done / "sharded" / "rl-000002"
    parts = sorted((folder / "sharded").iterdir())
    assert len(parts) == 2
    assert find_damage(folder) is None
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert {f"sharded/{path.name}" for path in parts} < set(listed)
    name = "model.lm.model.embed_tokens.weight"
    rows = [load_file(path)[name].shape[0] for path in parts]
    assert all(rows)
    assert sum(rows) == noted(done, "at-2")[name].shape[0]
    whole = parts[1].read_bytes()
    parts[1].write_bytes(whole[:-1])
    assert f"sharded/{parts[1].name}" in (find_damage(folder) or "")
    parts[1].write_bytes(whole)


def test_a_resumed_run_on_as_many_ranks_has_the_bits_of_an_uninterrupted_one(done: Path) -> None:
    assert not torch.equal(
        noted(done, "at-4")["model.heads.proj.weight"], noted(done, "at-2")["model.heads.proj.weight"]
    )
    for rank in range(2):
        assert_equal(noted(done, "resumed", rank), noted(done, "at-4"))


def test_replicas_save_one_plain_checkpoint_which_sharded_ranks_read(done: Path) -> None:
    folder = done / "plain" / "rl-000002"
    assert not has_sharded(folder)
    expected = noted(done, "plain")
    assert_equal(Trainer(config(), sharded=False, trained=folder).whole(), expected)
    for rank in range(3):
        assert_equal(noted(done, "three-plain", rank), expected)


def test_what_rank_0_meets_while_saving_reaches_every_rank(done: Path) -> None:
    for rank in range(2):
        assert "a file" in noted(done, "refused", rank)


def test_with_lora_only_what_is_trained_is_saved(done: Path) -> None:
    folder = done / "adapted" / "rl-000002"
    saved = set().union(*(load_file(path) for path in (folder / "sharded").iterdir()))
    weights = {name for name in saved if name.startswith("model.")}
    assert weights
    assert all(".lora_" in name or name.startswith("model.heads.") for name in weights)
    for rank in range(3):
        assert_equal(noted(done, "three-adapted", rank), noted(done, "adapted"))


def test_exported_shards_are_the_gathered_weights(done: Path, tmp_path: Path) -> None:
    export_checkpoint(done / "sharded" / "rl-000002", tmp_path / "whole")
    expected = noted(done, "at-2")
    exported = load_file(tmp_path / "whole" / "model.safetensors")
    assert exported
    assert_equal(exported, {name: expected[f"model.lm.{name}"] for name in exported})
    heads = load_file(tmp_path / "whole" / "carft_heads.safetensors")
    assert_equal(heads, {name: expected[f"model.heads.{name}"] for name in heads})
    again = load_model(config(), str(tmp_path / "whole"), CPU, heads=True)
    assert_equal(
        {f"model.{name}": value for name, value in again.state_dict().items()},
        {name: value for name, value in expected.items() if name.startswith("model.")},
    )


def test_exported_adapters_are_merged(done: Path, tmp_path: Path) -> None:
    export_checkpoint(done / "adapted" / "rl-000002", tmp_path / "merged")
    exported = load_file(tmp_path / "merged" / "model.safetensors")
    expected = noted(done, "adapted")
    scale = config("lora.rank=2").lora.alpha / 2
    merged = 0
    for name, weight in exported.items():
        layer = f"model.lm.{name.removesuffix('.weight')}"
        if f"{layer}.base_layer.weight" in expected:
            a, b = (expected[f"{layer}.lora_{x}.default.weight"] for x in "AB")
            torch.testing.assert_close(weight, expected[f"{layer}.base_layer.weight"] + scale * b @ a)
            assert not torch.equal(weight, expected[f"{layer}.base_layer.weight"])
            merged += 1
    assert merged > 5


def test_a_checkpoint_of_another_model_is_refused(done: Path) -> None:
    other = load_model(config("lora.rank=2"), "synthetic", CPU, heads=True)
    with pytest.raises(ValueError, match="another model"):
        load_sharded(done / "sharded" / "rl-000002", other)
