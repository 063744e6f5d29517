"""Weights that processes are to divide (gloo): the main one alone reads them, and each ends with its share of the same
bits.
"""

import itertools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from carft_fast.config.schema import Config
from carft_fast.config.toml import load_config
from carft_fast.core.errors import InputError
from carft_fast.core.processes import leave
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models import load
from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.load import load_model
from carft_fast.models.sampler_weights import gathered
from carft_fast.training.parallel import build_learner, divide_frozen
from carft_fast.training.reference import Reference
from tests.processes import spawn

CPU = torch.device("cpu")
LARGE = transformers.LlamaConfig(
    vocab_size=4000,
    hidden_size=1024,
    num_hidden_layers=6,
    num_attention_heads=16,
    num_key_value_heads=8,
    intermediate_size=2816,
)
SMALL: dict[str, Any] = {
    "vocab_size": 301,  # odd: the processes' shares differ
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
MODELS: dict[str, Any] = {
    "tied": transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "scaled positions": transformers.Qwen2Config(**SMALL, rope_parameters=YARN),
    "experts": transformers.MixtralConfig(**SMALL, num_local_experts=3),
    "two kinds of layers": transformers.Gemma3TextConfig(
        **SMALL, head_dim=8, layer_types=["sliding_attention", "full_attention"]
    ),
}
LORA = ["lora.rank=2", "model.compute_dtype=bfloat16"]


class Case:
    """A model as its user has it, and the options it is loaded with."""

    def __init__(self, model: str, *options: str, strategies: tuple[str, ...] = ("fsdp2",), trained: bool = False):
        self.model, self.options, self.strategies, self.trained = model, options, strategies, trained


CASES = {
    **{name: Case(name, strategies=("fsdp2", "zero3") if name == "tied" else ("fsdp2",)) for name in MODELS},
    "synthetic": Case("synthetic"),
    "adapters": Case("tied", *LORA, strategies=("fsdp2", "zero3")),
    "trained adapters": Case("tied", *LORA, trained=True),
    "a tie that the file undoes": Case("untied by its file"),
    "a tensor beside the buffers": Case("scaled positions"),
}
READ_BY_ALL = {
    "a tie that the file undoes": "they are not those of its config, lm_head.weight for one",
    "a tensor beside the buffers": "model.table is a tensor, but neither a parameter nor a buffer",
}


def config(path: Path | str, strategy: str, *more: str) -> Config:
    return load_config(None, [f"model.path={path}", f"distributed.strategy={strategy}", "model.embedding_dim=3", *more])


def join(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}  # DeepSpeed asks for them
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    rendezvous, patience = f"file://{folder}/rendezvous", timedelta(minutes=3)
    dist.init_process_group("gloo", rendezvous, patience, world_size=2, rank=rank)


def save_model(lm_config: Any, folder: Path) -> None:
    """In bfloat16, with an end of its own."""
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(lm_config, dtype=torch.bfloat16)
    lm.generation_config.eos_token_id = 7
    lm.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, lm_config in MODELS.items():
        save_model(lm_config, folder / name)
    save_model(MODELS["tied"], folder / "untied by its file")
    file = folder / "untied by its file" / "model.safetensors"
    weights = load_file(file)
    head = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file({**weights, "lm_head.weight": head}, file, metadata={"format": "pt"})
    save_model(MODELS["tied"], folder / "without weights")
    (folder / "without weights" / "model.safetensors").unlink()
    adapted = load_model(config(folder / "tied", "auto", *LORA), str(folder / "tied"), CPU, heads=True)
    for number, parameter in enumerate(p for p in adapted.parameters() if p.requires_grad):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    assert adapted.heads is not None
    (folder / "trained").mkdir()
    adapted.heads.save(folder / "trained")
    adapters = {name: x.contiguous() for name, x in get_peft_model_state_dict(adapted.lm).items()}
    save_file(adapters, folder / "trained" / "adapter_model.safetensors")
    return folder


@contextmanager
def as_loaded(name: str) -> Iterator[None]:
    """A model's own code may keep a tensor that no state dict has."""
    if name != "a tensor beside the buffers":
        yield
        return
    made = transformers.Qwen2Model.__init__

    def init(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        self.table = torch.arange(3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.Qwen2Model, "__init__", init)
        yield


def loaded(models: Path, case: Case, strategy: str) -> tuple[CarftModel, CarftModel | None]:
    """A policy, and the reference it has without adapters; with "auto" for one process."""
    path = case.model if case.model == "synthetic" else str(models / case.model)
    settings = config(path, strategy, *case.options)
    trained = models / "trained" if case.trained else None
    divided = strategy != "auto"
    policy = load_model(settings, path, CPU, heads=True, trained=trained, divided=divided)
    build_learner(settings, policy, settings.rl, CPU)
    return policy, Reference(settings, path, policy)._copy


def bits(model: CarftModel) -> dict[str, Tensor]:
    """Every parameter, whole, and every buffer, saved or not."""
    found = {}
    for name, x in itertools.chain(model.named_parameters(), model.named_buffers()):
        with gathered([x]):
            whole: Callable[[], Tensor] = getattr(x, "full_tensor", x.detach)
            found[name] = whole().detach().clone()
    return found


def all_bits(models: Path, name: str, strategy: str) -> dict[str, Any]:
    with as_loaded(name):
        policy, reference = loaded(models, CASES[name], strategy)
    found = {"policy": bits(policy), "eos": policy.eos_ids}
    return found | ({} if reference is None else {"reference": bits(reference)})


def _rank(rank: int, folder: str, models: Path, strategy: str) -> None:
    join(rank, folder)
    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    load.logger.addHandler(handler)
    for name, case in CASES.items():
        if strategy in case.strategies:
            torch.save(all_bits(models, name, strategy) | {"log": log.copy()}, f"{folder}/{name}-{rank}.pt")
            log.clear()
    if strategy == "fsdp2":
        try:
            loaded(models, Case("without weights"), strategy)
        except InputError as error:
            torch.save(str(error), f"{folder}/refused-{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def together(models: Path) -> Callable[[str, str], list[Any]]:
    folders: dict[str, tempfile.TemporaryDirectory[str]] = {}

    def found(strategy: str, name: str) -> list[Any]:
        if strategy not in folders:
            folders[strategy] = tempfile.TemporaryDirectory()
            spawn(_rank, (folders[strategy].name, models, strategy), 2)
        return [torch.load(f"{folders[strategy].name}/{name}-{rank}.pt") for rank in range(2)]

    return found


@pytest.mark.parametrize(
    ("name", "strategy"), [(name, strategy) for name, case in CASES.items() for strategy in case.strategies]
)
def test_processes_that_divide_a_model_have_the_bits_of_one_that_reads_it(
    models: Path, together: Callable[[str, str], list[Any]], name: str, strategy: str
) -> None:
    expected = all_bits(models, name, "auto")
    assert expected["eos"] == ([7] if name != "synthetic" else expected["eos"])
    for rank, found in enumerate(together(strategy, name)):
        said = found.pop("log")
        assert found.keys() == expected.keys()
        assert found["eos"] == expected["eos"]
        for part in expected.keys() - {"eos"}:
            assert found[part].keys() == expected[part].keys()
            assert any("inv_freq" in key for key in found[part])
            wrong = [key for key, x in expected[part].items() if not same(found[part][key], x)]
            assert not wrong
        looks = [line for line in said if "reads all weights" in line]
        if name in READ_BY_ALL and rank == 1:
            assert len(looks) == len(expected) - 1
            assert all(READ_BY_ALL[name] in line for line in looks)
        else:
            assert not looks


def same(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.equal(y)


def test_what_the_main_process_cannot_read_ends_all_with_its_error(together: Callable[[str, str], list[Any]]) -> None:
    for message in together("fsdp2", "refused"):
        assert "weights could not be loaded" in message


def divide_large(rank: int, folder: str, strategy: str) -> None:
    join(rank, folder)
    if strategy == "zero3":
        import deepspeed  # noqa: F401  what it takes is no weights

    def divide(path: str) -> CarftModel:
        settings = config(path, strategy)
        model = load_model(settings, path, CPU, heads=False, divided=True)
        model.plain_head = True  # else it is found out at work, which takes the device's memory
        divide_frozen(settings, model, CPU, offload=False)
        return model

    kept = [divide("synthetic")]  # nor are what everything else imports, and the first engine's buffers
    dist.barrier()
    Path(folder, f"ready-{rank}").touch()
    wait_for(Path(folder, "go"))
    kept.append(divide(f"{folder}/model"))
    dist.barrier()
    Path(folder, f"divided-{rank}").touch()
    wait_for(Path(folder, "measured"))
    leave()


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 200
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def memory(pids: list[int | None]) -> dict[str, list[int]]:
    """Bytes of each process: its own, and its part of the pages of files (one that two have mapped counts half)."""
    found: dict[str, list[int]] = {"Pss_Anon": [], "Pss_File": []}
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, value = line.split(":")
            if name in found:
                found[name].append(int(value.split()[0]) * 1024)
    return found


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_while_processes_read_and_divide_a_model_its_weights_are_in_memory_once(
    tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # glibc keeps what is freed of tensors below 32 MiB for later ones; those of real models are larger
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "500000")
    save_model(LARGE, tmp_path / "model")
    size = 2 * (tmp_path / "model" / "model.safetensors").stat().st_size
    assert size > 300e6
    ranks: Any = mp.spawn(divide_large, (str(tmp_path), strategy), nprocs=2, join=False)
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    before = memory(ranks.pids())
    (tmp_path / "go").touch()
    seen = []
    while not all((tmp_path / f"divided-{rank}").exists() for rank in range(2)):
        seen.append(memory(ranks.pids()))
        assert not ranks.join(0.02)
    seen.append(memory(ranks.pids()))
    (tmp_path / "measured").touch()
    while not ranks.join():
        pass
    own = [[(x - b) / size for x, b in zip(m["Pss_Anon"], before["Pss_Anon"], strict=True)] for m in seen]
    file = max(sum(m["Pss_File"]) - sum(before["Pss_File"]) for m in seen) / size
    most, of_other = max(map(sum, own)), max(other for _, other in own)
    print(f"\n{strategy}: {most:.2f} copies at the peak, {of_other:.2f} the second process, {file:.2f} pages of files")
    assert len(seen) > 10
    assert most < 1.4
    assert of_other < 0.8
    assert file < 0.8, "the file itself, in bfloat16, and libraries"
    assert max(map(abs, (share - 0.5 for share in own[-1]))) < 0.1
