"""The model against transformers' own forward: log-probs, heads beyond a matrix, what is saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.heads import CarftHeads
from carft_fast.models.load import load_model
from carft_fast.models.packing import PackedBatch, pack
from carft_fast.objective.losses import completion_logprobs
from carft_fast.objective.passes import Rows, build_passes

from .checks import COMPLETIONS, PROMPTS, alone, config, logits_of


@pytest.fixture
def model() -> CarftModel:
    return load_model(config(), "synthetic", torch.device("cpu"), heads=True)


@pytest.fixture
def batch() -> PackedBatch:
    return pack(PROMPTS, COMPLETIONS, torch.device("cpu"))


@pytest.mark.parametrize(
    ("override", "by_onednn"),
    [
        ("model.compute_dtype=float32", True),
        ("lora.rank=2", True),
        ("model.compute_dtype=bfloat16", False),
        ("model.impl=padded", False),  # our padded baseline
    ],
)
def test_linear_layers_on_a_cpu(override: str, by_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 every product goes to oneDNN, also the LM head's, the heads' and LoRA's; and the way back."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr("carft_kernels._runtime.ONEDNN", True)
    monkeypatch.setattr("carft_kernels._runtime.ONEDNN_FROM", 1)
    model = load_model(config(override), "synthetic", torch.device("cpu"), heads=True)
    passes = build_passes(config(override), model, 100)
    with torch.profiler.profile() as profile:
        loss = passes.cross_entropy(model, Rows(PROMPTS, COMPLETIONS), 10) + model.value(torch.ones(4, 64)).sum()
        loss.backward()
    names = {event.key for event in profile.key_averages()}
    assert ("mkldnn::_linear_pointwise" in names) == by_onednn
    if by_onednn:
        assert not names & {"aten::mm", "aten::addmm", "aten::linear"}


def test_packed_logprobs_equal_each_sequence_alone(model: CarftModel, batch: PackedBatch) -> None:
    with torch.no_grad():
        ours = completion_logprobs(model, model.hidden_states(batch), batch)
        torch.testing.assert_close(ours, torch.cat(alone(model)), rtol=1e-5, atol=1e-5)


def test_heads_beyond_a_plain_matmul_take_the_logits_path(batch: PackedBatch) -> None:
    """A soft cap and a scale after the LM head: found at load, and the log-probs are the model's own."""
    common: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    gemma = transformers.Gemma2Config(**common, head_dim=16, final_logit_softcapping=0.2, initializer_range=0.5)
    gemma._attn_implementation = "eager"  # its attention has a soft cap too, which "packed" refuses
    granite = transformers.GraniteConfig(**common, logits_scaling=4.0, initializer_range=0.5)
    for lm_config in (gemma, granite):
        torch.manual_seed(0)
        lm = transformers.AutoModelForCausalLM.from_config(lm_config).eval()
        model = CarftModel(lm, CarftHeads(32, 8, "shared"), torch.float32)
        assert not model.plain_head
        with torch.no_grad():
            output = model.hidden_states(batch)
            assert output.logits_CV is not None
            ours = completion_logprobs(model, output, batch)
            torch.testing.assert_close(ours, torch.cat(alone(model)), rtol=1e-4, atol=1e-5)
            last = lm.base_model(batch.ids_T[None, :6]).last_hidden_state[0]
            torch.testing.assert_close(output.hidden_TD[:6], last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_with_a_bias_is_not_plain_even_where_it_is_zero(dtype: torch.dtype) -> None:
    """Training may change it."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    lm = transformers.PhiForCausalLM(transformers.PhiConfig(vocab_size=40, **sizes)).eval()
    assert not lm.lm_head.bias.any()
    assert not CarftModel(lm, None, dtype).plain_head


def test_a_saved_folder_is_a_plain_model_with_heads_beside_it(
    model: CarftModel, batch: PackedBatch, tmp_path: Path
) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    again = load_model(config(), str(tmp_path), torch.device("cpu"), heads=True)
    with torch.no_grad():
        expected = logits_of(model, batch.ids_T[None])
        assert torch.equal(plain(batch.ids_T[None]).logits, expected)
        hidden = model.hidden_states(batch).hidden_TD
        assert torch.equal(again.value(hidden), model.value(hidden))
        assert torch.equal(again.embed(hidden), model.embed(hidden))
