"""The reference of a step: the policy with its adapters off, or a copy, whole, offloaded, after stored prompts."""

import pytest
import torch

from carft_fast.training.reference import Reference

from .stepcase import SEED, quick_config, random_case, take_apart, update


def test_with_lora_the_reference_is_the_model_without_adapters() -> None:
    """No second copy; the same log-probs as one; only adapters and heads are trained."""
    case = random_case(14, "mixed")
    config = quick_config("lora.rank=4", "rl.ppo_epochs=1")
    parts = take_apart(config, case)
    assert parts.step._reference is not None
    assert parts.step._reference._copy is None
    trained = {name for name, p in parts.policy.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("heads.") for name in trained)
    base = {name: p.detach().clone() for name, p in parts.policy.named_parameters() if name not in trained}
    assert (parts.experience.old_logprob_C - parts.experience.ref_logprob_C).abs().max() > 1e-2, "adapters do something"
    update(parts, case, torch.optim.SGD(parts.policy.parameters(), lr=0.1), lr=0.1)
    again = parts.step.explore(case.samples, SEED)
    assert torch.equal(again.ref_logprob_C, parts.experience.ref_logprob_C), "the update moved the reference"
    assert not torch.equal(again.old_logprob_C, parts.experience.old_logprob_C)
    for name, p in parts.policy.named_parameters():
        if name in base:
            assert torch.equal(p, base[name]), name


def test_an_offloaded_reference_holds_device_weights_only_while_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU a copy in other memory stands for the device."""
    case = random_case(14, "mixed")
    plain = take_apart(quick_config(), case)
    monkeypatch.setattr(Reference, "_to_device", lambda _, weight: weight.clone())
    parts = take_apart(quick_config("rl.reference_offload=true"), case)
    assert torch.equal(parts.experience.ref_logprob_C, plain.experience.ref_logprob_C)
    reference = parts.step._reference
    host = {name: p.data_ptr() for name, p in reference._copy.named_parameters()}
    with reference.model() as model:
        assert not {p.data_ptr() for p in model.parameters()} & set(host.values())
    assert {name: p.data_ptr() for name, p in reference._copy.named_parameters()} == host


def test_frozen_weights_in_half_precision_give_the_bits_of_autocast() -> None:
    """The reference's linear layers are kept in bfloat16; autocast would have cast the same weights at every use."""
    case = random_case(15, "mixed")
    parts = take_apart(quick_config("model.compute_dtype=bfloat16"), case)
    copy = parts.step._reference._copy
    assert copy.lm.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert copy.lm.model.embed_tokens.weight.dtype == torch.float32
    plain = take_apart(quick_config(), case).step._reference._copy
    for parameter, wide in zip(copy.parameters(), plain.parameters(), strict=True):
        parameter.data = wide.data
    again = parts.step.explore(case.samples, SEED)
    assert torch.equal(again.ref_logprob_C, parts.experience.ref_logprob_C)
