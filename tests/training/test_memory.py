"""Memory by strategy: sums done by hand, and what a dry run shows of it."""

from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from benchmarks.memory_table import MODELS
from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config.schema import Config
from carft_fast.config.sections import Strategy
from carft_fast.config.toml import load_config
from carft_fast.core.console import Console
from carft_fast.models.flops import ModelCost
from carft_fast.training.memory import estimate_memory
from carft_fast.training.pipeline import describe_plan, prepare

COST = ModelCost(
    layer_weights=4000,
    head_weights=600,
    all_weights=5200,
    attention_width=40,
    hidden_size=10,
    vocabulary=60,
    layers=4,
    linear_width=400,
)
# The inputs of four layers in float32, and twice a layer's linear inputs and outputs in bfloat16. The LM head's are
# less: 500 x 60 logits of 4 bytes, 600 weights of 2 and 4.
ACTIVATIONS = 1000 * (4 * 10 * 4 + 2 * 100 * 2)


def config(*options: str) -> Config:
    base = ["model.compute_dtype=bfloat16", "model.gradient_checkpointing=true", "rollout.engine=vllm-server"]
    base += ["data.max_length=1000", "rollout.max_new_tokens=500", "rl.micro_batch_tokens=1000"]
    return load_config(None, [*base, "sft.micro_batch_tokens=1000", *options])


# (strategy, devices, LoRA rank) -> bytes of everything but the activations.
# All weights: 5200 x 4 = 20,800 of weights and of gradients, 41,600 of moments, 4000 x 2 + 1200 x 4 = 12,800 of
# reference.
# Rank 2: 12,800 of frozen weights, 2 x 400 x 4 = 3,200 of adapters and of gradients, 6,400 of moments, no reference.
BY_HAND: dict[tuple[Strategy, int, int], int] = {
    ("ddp", 1, 0): 20_800 + 20_800 + 41_600 + 12_800,
    ("fsdp2", 1, 0): 20_800 + 20_800 + 41_600 + 12_800,
    ("ddp", 4, 0): 20_800 + 20_800 + 41_600 + 12_800 + 20_800,  # the last: the bucket, at most all gradients
    # a quarter of everything; gathered are two layers of 1000 x 2 bytes and, twice, 1200 x 4
    ("fsdp2", 4, 0): (20_800 + 20_800 + 41_600 + 12_800) // 4 + 4_000 + 9_600,
    ("zero3", 4, 0): (20_800 + 20_800 + 41_600 + 12_800) // 4 + 12_800 + 8_800 + 20_800 // 4,
    ("zero2", 4, 0): 20_800 + (20_800 + 41_600) // 4 + 12_800 + 8_800 + 20_800 // 4,
    ("ddp", 1, 2): 12_800 + 3_200 + 3_200 + 6_400,
    ("ddp", 4, 2): 12_800 + 3_200 + 3_200 + 6_400 + 3_200,
    ("fsdp2", 4, 2): (12_800 + 3_200 + 3_200 + 6_400) // 4 + 4_000 + 9_600,
    ("zero3", 4, 2): (12_800 + 3_200 + 3_200 + 6_400) // 4 + 2 * 1000 * 2 + 1200 * 4 + 3_200 // 4,
    ("zero2", 4, 2): 12_800 + 3_200 + (3_200 + 6_400) // 4 + 3_200 // 4,
}


@pytest.mark.parametrize(("strategy", "devices", "rank"), BY_HAND)
def test_by_hand(strategy: Strategy, devices: int, rank: int) -> None:
    found = estimate_memory(config(f"lora.rank={rank}"), COST, None, "rl", strategy, devices)
    assert found["total"][0] == BY_HAND[strategy, devices, rank] + ACTIVATIONS
    parts = sum(size for name, (size, _) in found.items() if name != "total")
    assert found["total"][0] == parts, "nothing takes turns where servers sample"


def test_sft_and_an_offloaded_reference_hold_none() -> None:
    with_reference = estimate_memory(config(), COST, None, "rl", "fsdp2", 4)["total"][0]
    sft = estimate_memory(config(), COST, None, "sft", "fsdp2", 4)["total"][0]
    assert sft == with_reference - 12_800 // 4 - 1200 * 4, "and embeddings and head are there once"
    offloaded = estimate_memory(config("rl.reference_offload=true"), COST, None, "rl", "fsdp2", 4)["total"][0]
    assert offloaded == with_reference - 12_800 // 4


def test_a_process_has_no_more_tokens_than_its_share() -> None:
    """64 sequences of 1,000 tokens: 8,000 on each of eight, whatever a micro-batch may hold."""
    cost = ModelCost.of_config(MODELS["Qwen2.5-7B"])
    large, exact = (
        estimate_memory(config(f"rl.micro_batch_tokens={n}"), cost, None, "rl", "fsdp2", 8)["activations"][0]
        for n in (16_384, 8_000)
    )
    assert large == exact


# Peaks of the trainer that `carft-fast plan` found for gsm8k_qwen2.5_7b on eight GPUs (GiB): see docs/plan.md.
@pytest.mark.parametrize(("stage", "planned"), [("sft", 24.2), ("rl", 28.9)])
def test_the_estimate_is_within_15_percent_of_the_plan(stage: str, planned: float) -> None:
    cost = ModelCost.of_config(MODELS["Qwen2.5-7B"])
    options = ["data.max_length=1024", "rollout.max_new_tokens=700", f"{stage}.micro_batch_tokens=16384"]
    found = estimate_memory(
        config(*options, f"{'rl' if stage == 'sft' else 'sft'}.micro_batch_tokens=2048"), cost, None, stage, "fsdp2", 8
    )
    assert found["total"][0] / 2**30 == pytest.approx(planned, rel=0.15)


def test_a_bucket_of_a_large_model() -> None:
    cost = ModelCost.of_config(MODELS["Qwen2.5-7B"])
    alone, several = (estimate_memory(config(), cost, None, "rl", "ddp", n)["total"][0] for n in (1, 8))
    assert several - alone == 128 * 2**20


def test_a_dry_run_shows_what_each_device_holds(
    tmp_path: Path, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*tiny_run[1::2], "output.name=x"]
    prepared = prepare(
        load_config(str(QUICKSTART_CONFIG), options), tmp_path / "x", Console(), stages=("sft", "rl"), dry_run=True
    )

    def shown() -> str:
        rich = RichConsole(width=200)
        with rich.capture() as capture:
            rich.print(describe_plan(prepared, ("sft", "rl")))
        return capture.get()

    assert "of the trainer on one device" in shown()
    row = prepared.train_rows[0].example
    for text in ("Answer reasoning:", row.question, row.cots[0], f"Therefore, the answer is: {row.answer}<eos>"):
        assert text in shown(), "one row as the model sees it"
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    for module in ("training.parallel", "training.pipeline"):
        monkeypatch.setattr(f"carft_fast.{module}.world_size", lambda: 4)
    assert "of the trainer on each of 4 devices, fsdp2" in shown()
    assert "(weights x 4 bytes) / 4" in shown()
