"""What trainer and sampler disagree on, measured."""

import math

import pytest
import torch
import transformers

from carft_fast.config.toml import load_config
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models.causal_lm import CarftModel
from carft_fast.rollout.hf import HFEngine
from carft_fast.training.agreement import Mismatch, check_agreement

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]


def test_mismatch_of_known_differences() -> None:
    found = Mismatch.of(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0.005, 1.0, 2.5, 2.0]))
    assert math.isclose(found.mean, 0.37625, rel_tol=1e-5)
    assert (found.max, found.material, found.tokens) == (1.0, 0.5, 4)


@pytest.mark.parametrize("family", ["Falcon", "GptOss", "Mamba"])
def test_models_that_cannot_be_packed_agree_with_their_sampler(family: str) -> None:
    """The probe goes through the same passes as the step."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 2}
    sizes |= {
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "num_local_experts": 4,
        "state_size": 8,
    }
    sizes |= {"num_experts_per_tok": 2, "pad_token_id": 1}
    sizes |= {"head_dim": 16} if family == "GptOss" else {}
    torch.manual_seed(0)
    lm = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes)).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(3)  # far from uniform
    model = CarftModel(lm, None, torch.float32, packs=False)
    config = load_config(None, ["model.impl=padded", "rollout.max_new_tokens=12"])
    found = check_agreement(HFEngine(model, build_tokenizer(), batch_size=4), model, PROMPTS, config)
    assert found.tokens > 20
    assert found.max < 1e-4
