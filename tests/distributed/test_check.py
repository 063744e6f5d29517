"""What a model is checked for when it is loaded, with its weights divided over real processes (gloo)."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

from carft_fast.core.errors import InputError
from carft_fast.core.processes import leave
from carft_fast.models.attention import PACKED
from carft_fast.models.causal_lm import CarftModel
from carft_fast.training.parallel import shard
from tests.processes import spawn

SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.3,
}
MODELS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**SMALL),
    "granite, whose logits are scaled": transformers.GraniteConfig(**SMALL, logits_scaling=4.0),
    "gemma2, whose attention has a soft cap": transformers.Gemma2Config(**SMALL, head_dim=8),
}
DTYPES = [torch.float32, torch.bfloat16]


def checked(name: str, dtype: torch.dtype, *, divided: bool) -> str:
    """Whether its head is plain, or why it is refused."""
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(MODELS[name], attn_implementation=PACKED).eval()
    model = CarftModel(lm, None, dtype, check=False)
    if divided:
        shard(model, torch.device("cpu"))
    try:
        model(CarftModel.check)
    except InputError as error:
        return str(error)
    return f"plain head: {model.plain_head}"


def _rank(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {(name, dtype): checked(name, dtype, divided=True) for name in MODELS for dtype in DTYPES}
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def found() -> list[dict[Any, str]]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (folder,), 2)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_processes_that_share_weights_find_what_one_with_all_of_them_does(
    found: list[dict[Any, str]], name: str, dtype: torch.dtype
) -> None:
    expected = checked(name, dtype, divided=False)
    assert [of_rank[name, dtype] for of_rank in found] == [expected] * 2
    if name == "llama":
        assert expected == "plain head: True"
    elif name.startswith("granite"):
        assert expected == "plain head: False"
    else:
        assert 'model.attention = "packed": Gemma2ForCausalLM cannot run it' in expected
        assert 'allowed here: "eager" or model.impl = "padded"' in expected
