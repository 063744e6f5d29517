"""The stream of weights a sampler gets: names, rounding, LoRA, shards; without an engine."""

import copy
import socket
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from carft_fast.config.sections import LoraConfig
from carft_fast.core.errors import InputError
from carft_fast.core.processes import leave
from carft_fast.models.load import _add_adapters
from carft_fast.models.sampler_weights import SamplerWeights
from tests.processes import spawn

MOE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
}


def llama(*, tied: bool = True, layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    )


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_values_are_those_of_a_saved_model(tied: bool) -> None:
    lm = llama(tied=tied)
    weights = SamplerWeights(lm, torch.float32)
    sent = dict(weights)
    expected = lm.state_dict()
    assert list(sent) == list(expected)
    assert "lm_head.weight" in sent
    assert all(torch.equal(sent[name], expected[name]) for name in expected)
    assert {info.name: info.shape for info in weights.metadata()} == {n: tuple(x.shape) for n, x in expected.items()}
    assert [info.name for info in weights.metadata()] == [name for name, _ in weights]
    half = dict(SamplerWeights(lm, torch.bfloat16))
    assert all(torch.equal(half[name], expected[name].bfloat16()) for name in expected)
    assert all(parameter.dtype == torch.float32 for parameter in lm.parameters())


def test_a_pass_goes_layer_by_layer_and_can_be_repeated() -> None:
    lm = llama()
    weights = SamplerWeights(lm, torch.bfloat16)
    groups = [[name for name, _ in group] for group in weights.groups()]
    assert groups[0] == ["model.embed_tokens.weight"]
    assert [all(name.startswith(f"model.layers.{i}.") for name in groups[1 + i]) for i in range(3)] == [True] * 3
    assert groups[4:] == [["model.norm.weight"], ["lm_head.weight"]]
    with torch.no_grad():
        lm.model.norm.weight.fill_(3)  # the trainer goes on: the next pass has the new values
    assert torch.equal(dict(weights)["model.norm.weight"], torch.full((32,), 3.0).bfloat16())


def adapted(lm: torch.nn.Module, **options: Any) -> Any:
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"], **options}
    model = peft.get_peft_model(copy.deepcopy(lm), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"modules_to_save": ["norm"]},
        {"target_modules": ["q_proj", "k_proj"]},  # with biases of the base model (Qwen2)
    ],
)
def test_lora_is_merged_as_peft_merges_it(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    small = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    lm = Qwen2ForCausalLM(Qwen2Config(**small, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False))
    model = adapted(lm, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sent = dict(SamplerWeights(model, torch.float32))
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    assert set(sent) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(sent[name], value, rtol=1e-6, atol=1e-6)
    assert any(not torch.equal(sent[name], value) for name, value in lm.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "Olmoe", "DeepseekV3"])
def test_lora_on_experts_is_merged_into_the_plain_models_weights(family: str) -> None:
    """A plain model with the merged weights computes what the adapted one does."""
    config = getattr(transformers, f"{family}Config")(**MOE)
    torch.manual_seed(0)
    lm, plain = (getattr(transformers, f"{family}ForCausalLM")(copy.deepcopy(config)).eval() for _ in range(2))
    _add_adapters(lm, LoraConfig(rank=2, alpha=4, target_modules=["all-linear"]), 0, None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    changed = [name for name, _ in lm.named_parameters() if "experts" in name and "lora_B" in name]
    plain.load_state_dict(dict(SamplerWeights(lm, torch.float32)))
    ids = torch.arange(12)[None]
    torch.testing.assert_close(plain(ids).logits, lm(ids).logits, rtol=1e-4, atol=1e-5)
    assert len(changed) == 4, "two weights of the experts, in two layers"


def test_a_merged_adapter_is_not_added_twice() -> None:
    model = adapted(llama(tied=False))
    expected = dict(SamplerWeights(model, torch.float32))
    model.merge_adapter()
    for name, value in SamplerWeights(model, torch.float32):
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_adapters_that_no_plain_weight_expresses_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"q_proj: this LoRA variant .* cannot be merged"):
        SamplerWeights(adapted(llama(tied=False), **options), torch.float32)


def _sharded_rank(rank: int, port: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    lm = llama(tied=False)
    expected = {name: value.clone() for name, value in lm.state_dict().items()}
    for layer in lm.model.layers:
        fully_shard(layer)
    fully_shard(lm)
    assert all(isinstance(parameter, DTensor) for parameter in lm.parameters())
    gathered, whole = 0, DTensor.full_tensor
    live: list[int] = []

    def counting(self: Any, **options: Any) -> torch.Tensor:
        nonlocal gathered
        gathered += 1
        return whole(self, **options)

    DTensor.full_tensor = counting  # type: ignore[method-assign]
    weights = SamplerWeights(lm, torch.float32)
    assert [info.shape for info in weights.metadata()] == [tuple(value.shape) for value in expected.values()]
    assert gathered == 0
    names = []
    for group in weights.groups():
        live.append(gathered)
        gathered = 0
        for name, value in group:
            assert torch.equal(value, expected[name])
            names.append(name)
    assert names == list(expected)
    assert max(live) == 9  # a layer's tensors at a time, never the model's
    torch.save(len(names), Path(folder) / f"rank{rank}")
    leave()


def test_fsdp2_shards_are_gathered_a_layer_at_a_time(tmp_path: Path) -> None:
    """Two real ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_sharded_rank, (port, str(tmp_path)), 2)
    assert {torch.load(path) for path in tmp_path.iterdir()} == {30}
