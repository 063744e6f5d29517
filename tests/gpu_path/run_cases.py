"""Run steps of real recipes on a fake CUDA device; write what the audit found as JSON.

    CARFT_FAKE_CUDA_SHIM=shim.so python tests/gpu_path/run_cases.py CASES.json FOUND.json PROCESSES

A case names a recipe, overrides, a stage, and the lengths of its sequences. The model has the recipe's
architecture at two layers, and a small vocabulary.
"""

import fake_cuda  # isort: split

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from audit import ROOT, Audit
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

DEVICE = torch.device("cuda", 0)
VOCABULARY = 512
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
}


def make_models(folder: Path) -> dict[str, str]:
    """A folder for each architecture the recipes name."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from carft_fast.data import build_tokenizer

    models: dict[str, Any] = {
        "codellama": LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=4, tie_word_embeddings=False)),
        "qwen": Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=False)),
        "qwen_tied": Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True)),
        "smollm2": LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


def stub_launches(audit: Audit) -> None:
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        audit.launch(self.fn.__name__, [*args, *options.values()])

    JITFunction.run = run


def watch_attention(current: list[Audit]) -> None:
    """Calls of torch's SDPA; to be called before the package is imported, which takes the function by its name."""
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **options: Any) -> Any:
        for audit in current:
            audit.sdpa[audit.phase] += 1
            audit.host_attention += args[0].device.type == "cpu"
        return real(*args, **options)

    torch.nn.functional.scaled_dot_product_attention = watched


def keep_host_work_real() -> None:
    """Files are read, and weights are made, outside the fake mode."""
    from carft_fast.models import load

    real = load._load_lm

    def load_lm(*args: Any) -> Any:
        with unset_fake_temporarily():
            return real(*args)

    load._load_lm = load_lm
    load.on_main = lambda work: work()  # there are no others to tell


def install_flash_attention(folder: Path) -> None:
    """A package that transformers takes for flash-attn; to be installed before transformers looks for packages."""
    package, metadata = folder / "flash_attn", folder / "flash_attn-2.8.3.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    shutil.copy(Path(__file__).parent / "flash_attn_stand_in.py", package / "__init__.py")
    (package / "bert_padding.py").write_text("pad_input = unpad_input = None\n")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    (metadata / "top_level.txt").write_text("flash_attn\n")
    sys.path.insert(0, str(folder))


def flash_calls() -> list[dict[str, Any]]:
    """Since they were last asked for."""
    import flash_attn

    found = flash_attn.calls.copy()
    flash_attn.calls.clear()
    return found


def share_weights(world: int) -> None:
    """A process group whose other processes do not exist; what they would send is of the right shape."""
    import torch.distributed as dist
    from torch.distributed import device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from carft_fast.training import parallel

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    make_mesh, shard = device_mesh.init_device_mesh, parallel.shard

    def init_device_mesh(*args: Any, **options: Any) -> Any:
        with _disable_current_modes():  # ranks are numbers that the host reads
            return make_mesh(*args, **options)

    def shard_fake(model: Any, device: torch.device, **options: Any) -> None:
        mode = detect_fake_mode()
        assert mode is not None
        model._apply(mode.from_tensor)  # FSDP moves weights by `p.data = ...`, which a real tensor refuses
        shard(model, device, **options)

    device_mesh.init_device_mesh = init_device_mesh
    parallel.shard = shard_fake


def sequences(count: int, mean: int, spread: int) -> list[list[int]]:
    """Token ids of lengths mean - spread, mean, mean + spread, mean, and so on: `count` times the mean in all."""
    assert count % 4 == 0
    lengths = [mean - spread, mean, mean + spread, mean] * (count // 4)
    return [[3 + (7 * i + j) % (VOCABULARY - 3) for j in range(n)] for i, n in enumerate(lengths)]


def load_policy(config: Any, model_path: str) -> Any:
    """As `StageLoop` does."""
    from carft_fast.models import load_model
    from carft_fast.training.parallel import strategy

    return load_model(config, model_path, DEVICE, heads=True, divided=strategy(config) == "fsdp2")


def run_sft(audit: Audit, config: Any, model_path: str, lengths: dict[str, int]) -> None:
    from carft_fast.core import own_turns, world_size
    from carft_fast.models import SamplerWeights
    from carft_fast.objective import Rows, build_passes
    from carft_fast.training.parallel import build_learner

    stage = config.sft
    learner = build_learner(config, load_policy(config, model_path), stage, DEVICE)
    model = learner.model
    n = stage.batch_size
    batch = Rows(sequences(n, lengths["prompt"], 10), sequences(n, lengths["cot"], 20))
    passes = build_passes(config, model, stage.micro_batch_tokens)
    with audit.at("sft"):
        loss_sum = torch.zeros((), device=DEVICE)
        own = own_turns(passes.micro_batches(batch, world_size()))
        for number, micro in enumerate(own):
            loss = model(passes.cross_entropy, batch.pick_or_shortest(micro), sum(batch.lengths))
            learner.backward(loss, last=number == len(own) - 1)
            loss_sum += loss.detach()
        learner.step(stage.lr, stage.max_grad_norm, loss_sum)
    with audit.at("weights"):
        for _ in SamplerWeights(model.lm, torch.bfloat16):
            pass


def run_rl(audit: Audit, config: Any, model_path: str, lengths: dict[str, int]) -> None:
    from carft_fast.core import Example
    from carft_fast.data import EncodedExample
    from carft_fast.models import SamplerWeights
    from carft_fast.reports import PhaseTimer
    from carft_fast.rewards import Grade
    from carft_fast.rollout import Rollout
    from carft_fast.training.batch import Needs
    from carft_fast.training.parallel import build_learner
    from carft_fast.training.reference import Reference
    from carft_fast.training.rl import as_samples, estimate_advantages, rollout_metrics, score_rollouts
    from carft_fast.training.step import Step

    learner = build_learner(config, load_policy(config, model_path), config.rl, DEVICE)
    policy = learner.model
    reference = Reference(config, model_path, policy) if Needs.of(config).reference else None
    step = Step(config, learner, reference)
    n, per_prompt = config.rl.batch_size, config.rollout.samples_per_prompt
    prompts = sequences(n // per_prompt, lengths["prompt"], 10)
    cots = sequences(n // per_prompt, lengths["cot"], 20)
    rows = [
        EncodedExample(Example(str(i), "", (), "1"), prompts[i], (cots[i],))
        for i in range(n // per_prompt)
        for _ in range(per_prompt)
    ]
    rollouts = [Rollout(ids, [-1.0] * len(ids), "stop", 0) for ids in sequences(n, lengths["completion"], 30)]
    grades = [Grade(i % 3 > 0, 1.0) for i in range(n)]
    timer = PhaseTimer(DEVICE)
    with audit.at("experience"), timer("forward"):
        samples = as_samples(rows, rollouts, DEVICE)
        experience = step.make_experience(samples, 1)
    with audit.at("advantages"), timer("forward"):
        score_N = score_rollouts(grades, experience.cosine_N, config, DEVICE)
        advantages = estimate_advantages(score_N, experience, config)
    with audit.at("update"), timer("update"):
        step.update(experience, advantages, [g.correct for g in grades], config.rl.lr)
    with audit.at("metrics"):
        rollout_metrics(rollouts, grades, score_N, experience, advantages)
        timer.flush()
    with audit.at("weights"):
        for _ in SamplerWeights(policy.lm, torch.bfloat16):
            pass


def run_probe(audit: Audit, *_: Any) -> None:
    """What the audit is for, done once each."""
    import triton

    @triton.jit
    def probe_kernel(x):  # type: ignore[no-untyped-def]
        pass

    with audit.at("probe"):
        x = torch.tensor([1.0, 2.0], device=DEVICE)
        torch.tensor([1]).to(DEVICE, non_blocking=True)
        torch.tensor([1]).pin_memory().to(DEVICE, non_blocking=True)
        assert float(x[0]) == 0.0
        assert x.tolist() == [1.0, 2.0], "known on the host"
        x.cpu()
        x.nonzero()
        x[x > 0] = 0.0
        torch.cuda.synchronize()
        q = torch.zeros(1, 1, 2, 8, device=DEVICE)
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        probe_kernel[(1,)](torch.zeros(2))
        x[torch.tensor([0])]
        torch.zeros(2) * 2
        both = torch.tensor([0, 0]).pin_memory().to(DEVICE, non_blocking=True)
        y = torch.zeros(2, device=DEVICE, requires_grad=True)
        (y.index_select(0, both) + torch.nn.functional.embedding(both, y[:, None])[:, 0] + y[both]).sum().backward()


def run_case(case: dict[str, Any], models: dict[str, str], current: list[Audit]) -> dict[str, Any]:
    from carft_fast.config.toml import load_config

    config = load_config(
        str(ROOT / case["recipe"]),
        [
            f"model.path={models[case['model']]}",
            "model.device=cuda",
            "rollout.engine=hf",
            "rollout.sleep_level=0",
            *case["overrides"],
        ],
    )
    audit = Audit()
    stub_launches(audit)
    current[:] = [audit]
    FakeTensor.tolist = lambda self: audit.read_list(self)
    run = {"sft": run_sft, "rl": run_rl, "probe": run_probe}[case["stage"]]
    single = torch.autograd.set_multithreading_enabled(False)  # backward runs where it is called: its place is known
    with FakeTensorMode(allow_non_fake_inputs=True), audit, single:
        run(audit, config, models[case["model"]], case["lengths"])
    return audit.report() | {"flash": flash_calls()}


def main() -> None:
    cases, found_file, world = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    fake_cuda.install(world)
    found: dict[str, Any] = {}
    current: list[Audit] = []
    watch_attention(current)
    with tempfile.TemporaryDirectory() as folder:
        install_flash_attention(Path(folder) / "packages")
        if world > 1:
            share_weights(world)
        models = make_models(Path(folder))
        keep_host_work_real()
        for case in json.loads(Path(cases).read_text()):
            found[case["name"]] = run_case(case, models, current)
    found_file.write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # the interpreter's end would ask the device for things it does not have


main()
