"""The CUDA path of real recipes without a GPU: two layers on fake tensors, whose every operation is audited.

run_cases.py runs them, once for the session in one process and once in a group of eight; nothing is computed, so that
only calls, dtypes, devices and waits are tested here.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
LAYERS = 2
TESTED = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
assert TESTED is not None

pytestmark = [
    pytest.mark.skipif(
        torch.__version__.partition("+")[0] != TESTED[1],
        reason=f"the fake device uses torch {TESTED[1]} from the inside (constraints.txt), this is {torch.__version__}",
    ),
    pytest.mark.skipif(
        torch.version.cuda is not None, reason="torch is built with CUDA: the fake device is not needed"
    ),
]


class Case(NamedTuple):
    """A recipe, and how many forwards its phases have.

    The rows of a recipe of the paper: 64 sequences of 100 + 200 tokens are 19,200, so two micro-batches of 16,384
    tokens; the annotated ones, of 100 + 160 tokens, are 16,640, two as well.
    """

    recipe: str
    model: str
    forwards: dict[str, int]
    overrides: tuple[str, ...] = ()
    stage: str = "rl"
    processes: int = 1
    lengths: tuple[int, int, int] = (100, 200, 160)
    """Mean tokens of prompts, completions and annotated CoTs."""


PAPER = "configs/paper/gsm8k_{}.toml"
LLAMA, QWEN = "codellama_7b", "qwen2.5_7b"
MODELS = {LLAMA: "codellama", QWEN: "qwen"}
SMOLLM2 = "configs/svamp_smollm2_cpu.toml"

# Recipes of the paper recompute activations: a forward with gradient runs twice.
# SFT: two micro-batches.
SFT = {"sft": 2 * 2}
# ReFT: reference and policy over two micro-batches; two epochs of two.
REFT = {"experience": 2 + 2, "update": 2 * 2 * 2}
# Dr.GRPO has no reference, and four completions share a prompt: 16 prompts and 64 completions are 14,400 tokens.
DR_GRPO = {"experience": 1, "update": 2 * 2}
# CARFT: the annotated CoTs follow each micro-batch; the second epoch finds every z_2 without gradient first.
CARFT = {"experience": 2 + 2 + 2, "update": 2 * 2 * 2 + 2}
# All rollouts in one micro-batch: the first epoch goes on from the log-prob pass, whose layers run again in backward.
ONE = {"experience": 1 + 1 + 1, "update": 1 + 2}

# In micro-batches of 2,048 tokens: 16 sequences, of 4,800 tokens or of SFT's 4,160, are three.
THREE = {"experience": 3 * 3, "update": 2 * 2 * 3 + 3}
SFT_THREE = {"sft": 2 * 3}

METHODS = {"sft": SFT, "reft": REFT, "dr_grpo": DR_GRPO, "carft": CARFT}


def paper(model: str, method: str, *overrides: str, forwards: dict[str, int] | None = None, **rest: Any) -> Case:
    stage = "sft" if method == "sft" else "rl"
    recipe = PAPER.format(f"{model}_{method}")
    return Case(recipe, MODELS[model], forwards or METHODS[method], overrides, stage, **rest)


def one_gpu(method: str, *, tied: bool = False, lean: bool = False) -> Case:
    """`lean`: in micro-batches of 2,048 tokens; of 16 sequences, to be quick."""
    stage = "sft" if method.endswith("_sft") else "rl"
    forwards = (SFT if stage == "sft" else CARFT) if not lean else SFT_THREE if stage == "sft" else THREE
    sizes = ("sft.batch_size=16", "rl.batch_size=16", "rl.mini_batch_size=16") if lean else ()
    recipe = f"configs/one_gpu/gsm8k_qwen2.5_{method}.toml"
    return Case(recipe, "qwen_tied" if tied else "qwen", forwards, sizes, stage)


SHARED = ("distributed.strategy=fsdp2",)
CASES = {f"{MODELS[model]}_{method}": paper(model, method) for model in MODELS for method in METHODS} | {
    "lora": paper(LLAMA, "carft", "lora.rank=8"),
    "offload": paper(LLAMA, "carft", "rl.reference_offload=true"),
    "negative": paper(LLAMA, "carft", "contrastive.mode=negative"),
    "both": paper(QWEN, "carft", "contrastive.mode=both"),
    "share_prompts": paper(QWEN, "carft", "rollout.samples_per_prompt=4", forwards=ONE),
    "prompts_apart": paper(QWEN, "dr_grpo", "rl.share_prompts=false", forwards={"experience": 2, "update": 2 * 2 * 2}),
    "one_micro_batch": paper(LLAMA, "carft", "rl.micro_batch_tokens=20480", forwards=ONE),
    # 8 sequences of 60 + 80 tokens in micro-batches of 1,024: two, and nothing is recomputed
    "smollm2_sft": Case(SMOLLM2, "smollm2", {"sft": 2}, stage="sft", lengths=(60, 100, 80)),
    # 16 rollouts of 60 + 100 in two mini-batches of two micro-batches each; three of four updates find every z_2 first
    "smollm2": Case(SMOLLM2, "smollm2", {"experience": 3 * 4, "update": 8 + 3 * 2}, lengths=(60, 100, 80)),
    "1.5b_full_sft": one_gpu("1.5b_full_sft", tied=True),
    "1.5b_full": one_gpu("1.5b_full_carft", tied=True),
    "7b_full_sft": one_gpu("7b_full_sft", lean=True),
    "7b_full": one_gpu("7b_full_carft", lean=True),
    "7b_lora_sft": one_gpu("7b_lora_sft"),
    "7b_lora": one_gpu("7b_lora_carft"),
    "flash_attention_2": paper(QWEN, "carft", "model.attention=flash_attention_2"),
    "shared_sft": paper(LLAMA, "sft", *SHARED, forwards={"sft": 2}, processes=8),
    "shared_both": paper(QWEN, "carft", *SHARED, "contrastive.mode=both", forwards=ONE, processes=8),
    "shared_dr_grpo": paper(LLAMA, "dr_grpo", *SHARED, processes=8),
    # eight processes take two micro-batches each
    "shared_offload": paper(
        LLAMA, "carft", *SHARED, "rl.reference_offload=true", "rl.micro_batch_tokens=1600", processes=8
    ),
}
VARLEN = [name for name in CASES if name != "flash_attention_2"]

Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def found(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What the audit found, by case."""
    folder = tmp_path_factory.mktemp("gpu_path")
    return run(1, folder, shim) | run(8, folder, shim)


def compiled(folder: Path) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.fail("g++ is not on the PATH: tests/gpu_path/shim.cpp needs it (Debian: apt-get install g++)")
    torch_folder, shim = Path(torch.__file__).parent, folder / "shim.so"
    command = [compiler, "-O0", "-std=c++20", "-shared", "-fPIC", str(HERE / "shim.cpp"), "-o", str(shim)]
    command += [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"tests/gpu_path/shim.cpp does not compile:\n{done.stderr}")
    return shim


def run(processes: int, folder: Path, shim: Path) -> Found:
    cases = [
        {
            "name": name,
            **case._asdict(),
            "lengths": dict(zip(("prompt", "completion", "cot"), case.lengths, strict=True)),
        }
        for name, case in CASES.items()
        if case.processes == processes
    ]
    if processes == 1:
        cases.append(
            {"name": "probe", "recipe": SMOLLM2, "model": "smollm2", "overrides": [], "stage": "probe", "lengths": {}}
        )
    asked, answer = folder / f"cases_{processes}.json", folder / f"found_{processes}.json"
    asked.write_text(json.dumps(cases))
    environment = os.environ | {
        "CARFT_FAKE_CUDA_SHIM": str(shim),
        "CARFT_KERNELS_CHECK_INDICES": "0",  # as on a GPU
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "PYTHONSAFEPATH": "",  # the script imports its neighbours
    }
    command = [sys.executable, str(HERE / "run_cases.py"), str(asked), str(answer), str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(answer.read_text())


def test_the_audit_sees_what_it_is_for(found: Found) -> None:
    probe = found["probe"]
    assert probe["syncs"]["probe"] == {
        "blocking copy to the device: outside": 1,
        "copy of unpinned memory: outside": 1,
        "read: outside": 2,
        "copy to the host: outside": 1,
        "nonzero: outside": 1,
        "boolean index: outside": 1,
        "synchronize: outside": 1,
    }
    assert probe["async_copies"] == ["outside"]
    assert probe["atomic"] == ["aten::index_add: outside"]
    assert probe["sdpa"] == {"probe": 1}
    assert probe["launches"] == {"probe_kernel": 1}
    assert probe["wrong"] == ["aten::index: outside", "probe_kernel (Triton): outside"]
    assert probe["host_floats"] == ["aten::mul: outside", "aten::zeros: outside"]


@pytest.mark.parametrize("name", VARLEN)
def test_one_varlen_kernel_takes_the_attention_of_a_layer(found: Found, name: str) -> None:
    """Layers times forwards, and no sequence goes through SDPA."""
    expected = {phase: LAYERS * n for phase, n in CASES[name].forwards.items()}
    assert {phase: n for phase, n in found[name]["varlen"].items() if phase != "load"} == expected
    assert found[name]["sdpa"] == {}


@pytest.mark.parametrize("name", VARLEN)
def test_a_model_is_checked_on_the_device(found: Found, name: str) -> None:
    """Policy and reference, packed once each; weights that are divided too, and none on the host."""
    case = CASES[name]
    models = 1 if case.stage == "sft" or "dr_grpo" in case.recipe or "lora" in name else 2
    assert found[name]["varlen"]["load"] == LAYERS * models
    assert found[name]["host_attention"] == 0


@pytest.mark.parametrize("name", VARLEN)
def test_attention_is_in_bfloat16_by_int32_offsets(found: Found, name: str) -> None:
    assert found[name]["varlen_inputs"] == ["bfloat16/bfloat16/bfloat16/int32/int32 on cuda"]


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_where_it_is_used(found: Found, name: str) -> None:
    """No operation and no Triton launch got a tensor of the other device, and the host computes nothing in floats."""
    assert found[name]["wrong"] == []
    assert found[name]["host_floats"] == []


@pytest.mark.parametrize("name", CASES)
def test_sums_have_the_same_order_in_every_run(found: Found, name: str) -> None:
    """Forward and backward: no operation that adds with atomics. The varlen kernel's own backward is not seen here."""
    assert found[name]["atomic"] == []


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.stage == "rl"])
def test_the_operators_run_their_kernels(found: Found, name: str) -> None:
    """By hand: a policy loss for every micro-batch of the two epochs, GAE once a step, the common tokens once."""
    case, launches = CASES[name], Counter(found[name]["launches"])
    one = case.forwards in (ONE, DR_GRPO)
    losses = 8 if case.recipe == SMOLLM2 else 2 if one else 2 * 3 if case.forwards is THREE else 4
    assert [launches[kernel] for kernel in ("policy_kernel", "logprob_bwd_kernel")] == [losses] * 2
    assert launches["matmul_lse_kernel"] > losses, "in the log-prob passes, too"
    assert launches["logprob_fwd_kernel"] == 0, "statistics come out of the product"
    dr_grpo = "dr_grpo" in case.recipe
    assert [launches["gae_kernel"], launches["value_kernel"]] == ([0, 0] if dr_grpo else [1, losses])
    negative = any("contrastive.mode" in option for option in case.overrides)
    assert [launches["lcs_table_kernel"], launches["lcs_walk_kernel"]] == [int(negative)] * 2


def documented_waits() -> set[str]:
    """The table of docs/step.md."""
    rows = re.findall(
        r"^\| (\w+) \| `(\S+)` `(\S+)` \| ([\w -]+) \|", (ROOT / "docs/step.md").read_text(), re.MULTILINE
    )
    assert rows
    return {f"{phase}: {kind}: {file} {function}" for phase, file, function, kind in rows}


def waits(found: Found, names: list[str]) -> set[str]:
    return {f"{phase}: {wait}" for name in names for phase, all_of in found[name]["syncs"].items() for wait in all_of}


def test_the_host_waits_for_the_device_where_the_docs_say(found: Found) -> None:
    assert waits(found, list(CASES)) == documented_waits()


def test_dr_grpo_waits_in_a_place_of_its_own_and_the_negative_signal_in_none(found: Found) -> None:
    plain = waits(found, ["codellama_reft"])
    assert waits(found, ["codellama_carft", "qwen_carft", "lora", "offload", "shared_offload"]) == plain
    assert waits(found, ["1.5b_full", "7b_full", "7b_lora"]) == plain
    assert waits(found, ["negative", "both"]) == plain
    assert {wait.partition(" ")[2] for wait in waits(found, ["codellama_dr_grpo", "qwen_dr_grpo"]) - plain} == {
        "copy to the host: carft_fast/training/step.py Step.plan_update"
    }
    assert waits(found, ["codellama_sft", "qwen_sft", "smollm2_sft", "shared_sft"]) == set()
    assert waits(found, ["1.5b_full_sft", "7b_full_sft", "7b_lora_sft"]) == set()


@pytest.mark.parametrize("name", CASES)
def test_host_data_is_sent_from_pinned_memory(found: Found, name: str) -> None:
    allowed = {"carft_fast/core/devices.py to_device"}
    if name in ("negative", "both", "shared_both"):
        allowed |= {"kernels/carft_kernels/_runtime.py to_device"}
    if name in ("offload", "7b_full"):
        allowed |= {"carft_fast/training/reference.py Reference._to_device"}
    if name == "shared_offload":  # by FSDP2, before a layer and before the model
        allowed |= {"carft_fast/models/causal_lm.py CarftModel.hidden_states"}
        allowed |= {"carft_fast/training/step.py Step._outputs"}
        allowed |= {
            f"carft_fast/models/causal_lm.py CarftModel.{f}" for f in ("_packing_difference", "_has_plain_head")
        }
        allowed |= {"carft_fast/training/parallel.py _check_divided"}
    assert set(found[name]["async_copies"]) == allowed


# Bytes of the fake models' weights in bfloat16: see SHAPE in run_cases.py.
HEAD = 2 * 512 * 64
LARGEST = 2 * 96 * 64
QUERY_OUT, KEY_VALUE, MLP = 2 * 64 * 64, {"codellama": 2 * 64 * 64, "qwen": 2 * 32 * 64}, 3 * LARGEST


@pytest.mark.parametrize("name", [f"{model}_{method}" for model in ("codellama", "qwen") for method in METHODS])
def test_a_forward_without_gradient_holds_one_cast_weight_at_a_time(found: Found, name: str) -> None:
    """The LM head's is the largest; with gradient they are those of the layer that is recomputed."""
    case = CASES[name]
    layer = 2 * QUERY_OUT + 2 * KEY_VALUE[case.model] + MLP
    for phase, most in {"experience": HEAD, "update": max(HEAD, layer), "sft": max(HEAD, layer)}.items():
        if phase in case.forwards:
            assert found[name]["kept_casts"][phase] <= most


def test_flash_attention_gets_what_its_signature_asks_for(found: Found) -> None:
    """flash-attn 2.8.3: half precision, int32 offsets on the device, lengths as int. Never run with the package."""
    calls = found["flash_attention_2"]["flash"]
    forwards = CARFT["experience"] + CARFT["update"]
    assert len(calls) == LAYERS * (forwards + 2), "and one each of policy and reference when they are loaded"
    assert found["flash_attention_2"]["varlen"] == {}
    assert found["flash_attention_2"]["sdpa"] == {}
    for call in calls:
        for name, heads in (("q", 4), ("k", 2), ("v", 2)):
            dtype, device, shape = call[name]
            assert (dtype, device, shape[1:]) == ("torch.bfloat16", "cuda", [heads, 16])
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            dtype, device, shape = call[name]
            assert (dtype, device, len(shape)) == ("torch.int32", "cuda", 1)
        assert call["max_seqlen_q"] == call["max_seqlen_k"]
        assert call["max_seqlen_q"][0] == "int"
        settings = ("dropout_p", "softmax_scale", "causal", "window_size")
        assert [call[name][1] for name in settings] == [0.0, 16**-0.5, True, [-1, -1]]
    longest = {call["max_seqlen_q"][1] for call in calls}
    assert longest == {7, 110 + 230, 110 + 180}, "of the check when a model is loaded, of rollouts, of annotated CoTs"


def test_the_recipes_of_a_model_and_method_train_alike() -> None:
    """All for one GPU are run. Of the paper's only GSM8K's: SVAMP's differ in data, names and evaluation."""
    for recipe in sorted((ROOT / "configs/paper").glob("gsm8k_*.toml")):
        settings = [tomllib.loads(path.read_text()) for path in (recipe, recipe.with_name("svamp" + recipe.name[5:]))]
        for found in settings:
            found["output"].pop("name")
            found["data"] = {key: value for key, value in found["data"].items() if key not in ("train", "eval")}
            for stage in ("sft", "rl"):
                for key in ("eval_every", "save_every"):
                    found.get(stage, {}).pop(key, None)
        assert settings[0] == settings[1], recipe.name
    names = {path.stem.removeprefix("gsm8k_") for path in (ROOT / "configs/paper").glob("gsm8k_*.toml")}
    assert names == {f"{model}_{method}" for model in MODELS for method in METHODS}
    assert {case.recipe for case in CASES.values()} >= {
        str(path.relative_to(ROOT)) for path in (ROOT / "configs/one_gpu").glob("*.toml")
    }
