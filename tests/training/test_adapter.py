"""With LoRA a saved model has the adapter by itself, too: peft loads it, and it says what the merged weights say."""

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from carft_fast.config.toml import load_config
from carft_fast.core.durable import find_damage
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models.load import load_model
from carft_fast.training.checkpoint import CheckpointStore
from carft_fast.training.export import copy_model, export_checkpoint
from carft_fast.training.optim import build_optimizer

CPU = torch.device("cpu")


@pytest.mark.parametrize("targets", ['["all-linear"]', '["q_proj", "down_proj"]'])
def test_peft_loads_the_adapter(tmp_path: Path, targets: str) -> None:
    base = load_model(load_config(None, ["model.path=synthetic"]), "synthetic", CPU, heads=False)
    base.save(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    config = load_config(None, [f"model.path={tmp_path / 'base'}", "lora.rank=3", f"lora.target_modules={targets}"])
    adapted = load_model(config, config.model.path, CPU, heads=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.lm.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    store = CheckpointStore(tmp_path / "store", config, print)
    optimizer = build_optimizer(adapted, config.rl)
    saved = store.save("rl", 1, adapted, build_tokenizer(), optimizer, model_path=config.model.path, seed=0)
    export_checkpoint(saved, tmp_path / "out")
    copy_model(tmp_path / "out", tmp_path / "copy")
    assert find_damage(tmp_path / "copy") is None
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        without = plain(ids).logits
        found = peft.PeftModel.from_pretrained(plain, str(tmp_path / "copy" / "adapter"))(ids).logits
        torch.testing.assert_close(found, merged(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, without, atol=0.1)
    settings = json.loads((tmp_path / "copy" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] is None, "a folder of this machine means nothing elsewhere"
    assert settings["r"] == 3
