"""A sync in place, on a real vLLM: its own parameters, read back, are the trainer's to the bit.

What vLLM has packed is read by multiplying with the identity: every product is one weight and zeros. The fused names
are written out by hand here, so nothing depends on the recorded places.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from carft_fast.core.errors import EngineError
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.load import load_model
from carft_fast.models.sampler_weights import SamplerWeights
from carft_fast.rollout.vllm.engine import VLLMEngine
from carft_fast.training.agreement import check_agreement

from .checks import CPU, EOS, PROMPTS, make_config, perturb

FUSED = {
    "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
}
VOCABULARY = 100
"""vLLM pads it to 128 rows."""


def worker_of(engine: VLLMEngine) -> Any:
    return engine._engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker


def version_of(engine: VLLMEngine) -> str:
    return engine._engine._llm.llm_engine.get_weight_version()


def read_back(engine: VLLMEngine) -> dict[str, Tensor]:
    """Every weight by vLLM's name; a layer that keeps a packed copy beside its weight has both."""
    found = {}
    for path, layer in worker_of(engine).get_model().named_modules():
        for name, parameter in layer._parameters.items():
            if parameter is not None and parameter.numel():
                found[f"{path}.{name}"] = parameter.data.clone()
        if hasattr(layer, "cpu_linear"):
            width = getattr(layer, "input_size_per_partition", None) or layer.embedding_dim
            packed = layer.cpu_linear(torch.eye(width, dtype=engine._dtype), layer.weight, None)
            found[f"{path}.weight (packed)"] = packed.T.contiguous()
    return found


def expected_from(lm: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same from the trainer's model."""
    state = {name: tensor.to(dtype) for name, tensor in lm.state_dict().items()}
    expected = {}
    for layer in range(lm.config.num_hidden_layers):
        for fused, parts in FUSED.items():
            for kind in ("weight", "bias"):
                tensors = [state.pop(f"model.layers.{layer}.{part}.{kind}", None) for part in parts]
                if tensors[0] is not None:
                    expected[f"model.layers.{layer}.{fused}.{kind}"] = torch.cat(tensors)
    expected |= state
    for name in [name for name, tensor in expected.items() if tensor.ndim == 2]:
        tensor = expected[name]
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = expected[name] = torch.nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % 64))
            expected[f"{name} (packed)"] = tensor
        else:
            expected[f"{name} (packed)"] = expected.pop(name)
    return expected


def assert_holds(engine: VLLMEngine, lm: Any) -> None:
    found, expected = read_back(engine), expected_from(lm, engine._dtype)
    assert found.keys() >= expected.keys()
    for name, tensor in found.items():
        # a CPU without AVX-512 does not pack in bfloat16, and has each weight as it is, too
        known = expected[name] if name in expected else expected[f"{name} (packed)"]
        assert torch.equal(tensor.to(engine._dtype), known), name


@pytest.fixture
def fresh(local_engine: VLLMEngine) -> Iterator[VLLMEngine]:
    """An engine that has not seen a sync, so far as its places go."""
    worker = worker_of(local_engine)
    worker.__dict__.pop("carft_in_place", None)
    yield local_engine
    worker.__dict__.pop("carft_in_place", None)


@pytest.fixture
def no_reload(monkeypatch: pytest.MonkeyPatch) -> Callable[[VLLMEngine], None]:
    """From its call on, vLLM's `reload_weights` fails."""

    def forbid(engine: VLLMEngine) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise AssertionError("reload_weights was called")

        monkeypatch.setattr(worker_of(engine).worker, "reload_weights", fail)

    return forbid


@pytest.fixture(scope="module")
def other_engine(at_the_end: ExitStack, tmp_path_factory: pytest.TempPathFactory) -> tuple[VLLMEngine, CarftModel]:
    """In bfloat16 from a float32 trainer; heads not tied, biases, a vocabulary that vLLM pads."""
    folder: Path = tmp_path_factory.mktemp("qwen2")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=False)).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    config = make_config("rollout.engine=vllm", "rollout.dtype=bfloat16")
    model = load_model(config, str(folder), CPU, heads=False)
    engine = VLLMEngine(config, model, [EOS])
    at_the_end.callback(engine.close)
    return engine, model


def test_three_syncs_leave_the_trainers_weights_to_the_bit(
    fresh: VLLMEngine, model: CarftModel, no_reload: Callable[[VLLMEngine], None]
) -> None:
    """Tied heads, float32. The first goes through vLLM's loader, those after it do not."""
    assert model.lm.config.tie_word_embeddings
    for change in range(4):
        perturb(model, change)
        fresh.sync(model)
        assert_holds(fresh, model.lm)
        no_reload(fresh)


def test_biases_an_untied_head_and_a_padded_vocabulary_in_bfloat16(
    other_engine: tuple[VLLMEngine, CarftModel], no_reload: Callable[[VLLMEngine], None]
) -> None:
    """Between syncs everything is overwritten with NaN, as a sleep of level 2 may do: padding comes back too."""
    engine, model = other_engine
    for change in range(4):
        perturb(model, change)
        engine.sync(model)
        assert_holds(engine, model.lm)
        no_reload(engine)
        for parameter in worker_of(engine).get_model().parameters():
            parameter.data.fill_(torch.nan)


def test_merged_lora(fresh: VLLMEngine, model: CarftModel, no_reload: Callable[[VLLMEngine], None]) -> None:
    lora = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"])
    adapted: Any = peft.get_peft_model(copy.deepcopy(model.lm), lora)
    trainer = CarftModel(model.lm, None, torch.float32)
    trainer.lm = adapted
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        fresh.sync(trainer)
        no_reload(fresh)
        merged = copy.deepcopy(adapted).merge_and_unload()
        assert not torch.equal(
            merged.state_dict()["model.layers.0.mlp.up_proj.weight"], model.lm.model.layers[0].mlp.up_proj.weight
        )
        assert_holds(fresh, merged)


class _BreaksError(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 2, 3, 9, 12], ids="after {} weights".format)
@pytest.mark.parametrize("syncs_before", [0, 1, 2])
def test_a_sync_that_breaks_off_is_mended_by_the_next(
    fresh: VLLMEngine, model: CarftModel, monkeypatch: pytest.MonkeyPatch, after: int, syncs_before: int
) -> None:
    """Also within a fused weight, in the first sync (vLLM's loader) as in later ones."""
    for _ in range(syncs_before):
        fresh.sync(model)
    whole = SamplerWeights.__iter__

    def broken(self: SamplerWeights) -> Iterator[tuple[str, Tensor]]:
        for index, pair in enumerate(whole(self)):
            if index == after:
                raise _BreaksError
            yield pair

    perturb(model, 7)
    with monkeypatch.context() as patch:
        patch.setattr(SamplerWeights, "__iter__", broken)
        with pytest.raises(_BreaksError):
            fresh.sync(model)
    assert version_of(fresh) == "incomplete"
    for change in range(2):
        fresh.sync(model)
        assert version_of(fresh) == str(fresh.version)
        assert_holds(fresh, model.lm)
        perturb(model, change)


@pytest.mark.parametrize("syncs_before", [0, 1])
def test_another_stream_than_its_metadata_is_refused(
    fresh: VLLMEngine, model: CarftModel, monkeypatch: pytest.MonkeyPatch, syncs_before: int
) -> None:
    for _ in range(syncs_before):
        fresh.sync(model)
    whole = SamplerWeights.__iter__

    def fewer(self: SamplerWeights) -> Iterator[tuple[str, Tensor]]:
        return (pair for pair in whole(self) if pair[0] != "lm_head.weight")

    with monkeypatch.context() as patch:
        patch.setattr(SamplerWeights, "__iter__", fewer)
        with pytest.raises(EngineError, match=r"sent nothing more; its metadata says .*'lm_head.weight'"):
            fresh.sync(model)
    assert version_of(fresh) == "incomplete"
    fresh.sync(model)
    assert_holds(fresh, model.lm)


def test_the_probe_catches_the_tied_head_that_named_parameters_forgets(
    fresh: VLLMEngine, model: CarftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that never had it keeps `reload_weights`, which leaves the old head without a word."""
    assert model.lm.config.tie_word_embeddings
    fresh.sync(model)
    perturb(model, 6)
    begin = SamplerWeights.__init__

    def without_head(self: SamplerWeights, *arguments: Any) -> None:
        begin(self, *arguments)
        del self._parts["lm_head.weight"]

    monkeypatch.setattr(SamplerWeights, "__init__", without_head)
    fresh.sync(model)
    with pytest.raises(EngineError, match="trainer and sampler disagree"):
        check_agreement(fresh, model, PROMPTS, make_config())


Weights = Iterable[tuple[str, Tensor]]


def computed(weights: Weights) -> Weights:
    return ((name, tensor * 1 if "q_proj" in name else tensor) for name, tensor in weights)


def told_wrong(weights: Weights) -> Weights:
    """On tensors without data another order than on real ones."""
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    for name, tensor in weights:
        part = name.split(".")[-2]
        yield (name.replace(part, other[part]) if tensor.is_meta and part in other else name), tensor


def dropped(weights: Weights) -> Weights:
    return ((name, tensor) for name, tensor in weights if name != "model.norm.weight" or not tensor.is_meta)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (computed, r"qkv_proj\.weight is computed by aten\.copy_"),
        (told_wrong, r"gate_up_proj\.weight is not what its weights say"),
        (dropped, r"model\.norm\.weight is not filled by the weights"),
    ],
)
def test_a_loader_that_does_more_than_copy_keeps_reload_weights(
    fresh: VLLMEngine,
    model: CarftModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Weights], Weights],
    reason: str,
) -> None:
    vllm_model = worker_of(fresh).get_model()
    load = vllm_model.load_weights
    monkeypatch.setattr(vllm_model, "load_weights", lambda weights: load(change(weights)))
    assert_falls_back(fresh, model, caplog, reason)


def test_a_quantised_layer_keeps_reload_weights(
    fresh: VLLMEngine, model: CarftModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer = worker_of(fresh).get_model().model.layers[0].mlp.down_proj
    other = type("AnotherMethod", (type(layer.quant_method),), {})
    monkeypatch.setattr(layer, "quant_method", other())
    assert_falls_back(fresh, model, caplog, r"layers\.0\.mlp\.down_proj has the quantisation method AnotherMethod")


def assert_falls_back(engine: VLLMEngine, model: CarftModel, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    """Right weights at every sync, and one line that says why they are slow."""
    with caplog.at_level(logging.WARNING, logger="carft_fast.rollout.vllm.in_place"):
        for change in range(3):
            perturb(model, change)
            engine.sync(model)
            assert_holds(engine, model.lm)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("carft_fast")]
    assert re.search(reason, line), line
