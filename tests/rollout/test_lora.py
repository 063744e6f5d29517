"""LoRA that a real vLLM applies itself, unmerged: in this process and on a server."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from carft_fast.core import EngineError, InputError
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.load import load_model
from carft_fast.models.sampler_weights import SamplerWeights, adapter_weights
from carft_fast.rollout.base import RolloutEngine, SamplingParams
from carft_fast.rollout.hf import HFEngine
from carft_fast.rollout.vllm import adapter
from carft_fast.rollout.vllm.engine import VLLMEngine
from carft_fast.rollout.vllm.servers import VLLMServerEngine

from .checks import CPU, EOS, PROMPTS, assert_samples_of, make_config, perturb

LORA = ("lora.rank=3", "lora.alpha=5", "rollout.lora_sync=adapter")
DRAFTING = "rollout.draft_budget=1000"
GREEDY = SamplingParams(16, temperature=0.0)


def lora_model(*options: str) -> CarftModel:
    return load_model(make_config("rollout.engine=vllm", *LORA, *options), "synthetic", CPU, heads=True)


def train(model: CarftModel, seed: int, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.lm.named_parameters():
            if "lora_" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def local(at_the_end: ExitStack) -> VLLMEngine:
    engine = VLLMEngine(make_config("rollout.engine=vllm", DRAFTING, *LORA), lora_model(), [EOS])
    at_the_end.callback(engine.close)
    return engine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServerEngine]:
    folder = tmp_path_factory.mktemp("lora-server")
    config = make_config("rollout.engine=vllm-server", DRAFTING, *LORA)
    engine = VLLMServerEngine(config, lora_model(), [EOS], folder=folder, log=print)
    yield engine
    engine.close()


@pytest.fixture(params=["local", "server"])
def engine(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_every_sync_is_sampled_from_and_the_frozen_weights_are_sent_once(
    engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[bool] = []
    whole = SamplerWeights.groups

    def counted(self: SamplerWeights) -> Any:
        passes.append(True)
        return whole(self)

    monkeypatch.setattr(SamplerWeights, "groups", counted)
    for base in range(2):  # another model's frozen weights, as after SFT
        model = lora_model()
        perturb(model, base)
        for seed in range(3):
            train(model, seed)
            before = {name: value.clone() for name, value in model.lm.state_dict().items()}
            engine.sync(model)
            assert all(torch.equal(value, before[name]) for name, value in model.lm.state_dict().items())
            assert_samples_of(model.lm, engine.generate(PROMPTS, GREEDY), GREEDY)
        assert len(passes) == base + 1


def test_the_same_tokens_as_every_engine_with_drafts_and_groups(engine: RolloutEngine) -> None:
    model = lora_model()
    train(model, 5)
    engine.sync(model)
    hf = HFEngine(model, build_tokenizer(), batch_size=8, ends=[EOS])
    hf.sync(model)
    expected = hf.generate(PROMPTS, SamplingParams(24, seed=3, samples_per_prompt=2))
    drafts = [[r.completion_ids for r in expected[2 * i : 2 * i + 2]] for i in range(len(PROMPTS))]
    found = engine.generate(PROMPTS, SamplingParams(24, seed=3, samples_per_prompt=2, drafts=drafts))
    assert [r.completion_ids for r in found] == [r.completion_ids for r in expected]
    assert sum(r.accepted for r in found) > 50


def test_a_sync_that_breaks_off_serves_nothing_and_the_next_sends_everything(
    engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lora_model()
    train(model, 1)
    engine.sync(model)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the adapters are gone")

    with monkeypatch.context() as patch:
        patch.setattr("carft_fast.rollout.vllm.adapter_files.save_file", broken)
        with pytest.raises(RuntimeError, match="gone"):
            engine.sync(model)
        with pytest.raises(EngineError):
            engine.generate(PROMPTS, GREEDY)
    train(model, 2)
    engine.sync(model)
    assert_samples_of(model.lm, engine.generate(PROMPTS, GREEDY), GREEDY)


@pytest.mark.long
def test_a_server_that_is_killed_gets_frozen_weights_and_adapters_again(server: VLLMServerEngine) -> None:
    model = lora_model()
    perturb(model, 4)
    train(model, 4)
    server.sync(model)
    killed = server.pids[0]
    os.kill(killed, signal.SIGKILL)
    assert_samples_of(model.lm, server.generate(PROMPTS, GREEDY), GREEDY)
    assert server.pids[0] != killed


def test_nothing_is_left_of_older_versions(local: VLLMEngine) -> None:
    model = lora_model()
    for _ in range(3):
        local.sync(model)
    path = local._adapters.path  # type: ignore[union-attr]
    assert path is not None
    assert list(path.parent.iterdir()) == [path]


def test_small_updates_reach_a_bfloat16_sampler_unmerged_and_are_rounded_away_merged() -> None:
    """An update below half a unit in the last place of every weight: the merged weights are the old ones."""
    model = lora_model()
    train(model, 0, size=1e-3)
    frozen = dict(SamplerWeights(model.lm, torch.bfloat16, merge=False))
    merged = dict(SamplerWeights(model.lm, torch.bfloat16))
    name = "model.layers.0.mlp.up_proj.weight"
    assert (merged[name] == frozen[name]).float().mean() > 0.95
    sent = adapter_weights(model.lm, torch.bfloat16)
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    product = sent[f"{stem}.lora_B.weight"].double() @ sent[f"{stem}.lora_A.weight"].double()
    layer = model.lm.get_submodule(name.removesuffix(".weight"))
    exact = layer.get_delta_weight("default").double() / layer.scaling["default"]
    assert (product - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(
    ("options", "sends"),
    [
        (["rollout.lora_sync=adapter"], (True, True)),
        (["rollout.lora_sync=merge"], (False, False)),
        ([], (False, True)),
        (["lora.rank=600"], (False, False)),
        (["lora.rank=0", "rollout.lora_sync=adapter"], (False, False)),
        (["rollout.engine=vllm-server"], (False, True)),
        (["rollout.engine=vllm-server", 'rollout.servers=["http://gpu2:8000"]'], (False, False)),
        (
            ["rollout.engine=vllm-server", 'rollout.servers=["http://gpu2:8000"]', "rollout.weight_transfer=files"],
            (False, True),
        ),
    ],
)
def test_auto_is_adapters_on_a_gpu_where_they_fit_and_are_seen(options: list[str], sends: tuple[bool, bool]) -> None:
    config = make_config("rollout.engine=vllm", "lora.rank=8", *options)
    assert tuple(adapter.sends_adapters(config, device) for device in ("cpu", "cuda")) == sends


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["rollout.engine=hf"], 'needs rollout.engine = "vllm" or "vllm-server", this is "hf"'),
        (["lora.rank=600"], 'up to 512, this is 600: set rollout.lora_sync = "merge"'),
    ],
)
def test_what_cannot_be_sent_as_adapters_is_refused_first(options: list[str], message: str) -> None:
    model = lora_model()
    with pytest.raises(InputError, match=message):
        adapter.check_engine(make_config("rollout.engine=vllm", *LORA, *options), model.lm.config, "cpu")


def test_adapters_of_other_layers_are_refused_with_what_works(tmp_path: Path) -> None:
    model = load_model(make_config(), "synthetic", CPU, heads=False)
    lm: Any = peft.get_peft_model(model.lm, peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(InputError, match=r'linear layers as adapters: set rollout.lora_sync = "merge"'):
        adapter_weights(lm, torch.float32)
