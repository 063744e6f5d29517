"""A plan's peaks against fake CUDA tensors and sums by hand; fits and does not; the largest micro-batch; bad input.

Nothing here was ever run on a GPU.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plan_table
from carft_fast import trainer
from carft_fast.config.schema import Config
from carft_fast.config.toml import load_config, to_toml
from carft_fast.core.errors import InputError
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models.flops import ModelCost, Work
from carft_fast.plan import resources
from carft_fast.plan.gpus import GPUS, USABLE, Gpu
from tests.gpu_path import test_gpu_path

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1408}
LAYERS, VOCABULARY, LENGTH, NEW = 3, 8192, 256, 192
PROCESSES = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Config and tokenizer of a small Qwen2; no weights."""
    import transformers

    folder = tmp_path_factory.mktemp("model")
    transformers.Qwen2Config(
        **SHAPE, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, tie_word_embeddings=False
    ).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(model: str) -> Callable[..., Config]:
    def make(*options: str) -> Config:
        base = [f"model.path={model}", "model.compute_dtype=bfloat16", "model.gradient_checkpointing=true"]
        base += [f"data.max_length={LENGTH}", f"rollout.max_new_tokens={NEW}", 'rollout.engine="vllm-server"']
        base += ['rollout.server_devices=["1"]', "rl.batch_size=64", "rl.mini_batch_size=64"]
        return load_config(None, [*base, "rl.micro_batch_tokens=2048", "sft.micro_batch_tokens=2048", *options])

    return make


def needs_fake_cuda(test: Any) -> Any:
    for mark in test_gpu_path.pytestmark:
        test = mark(test)
    return test


class SharedWorker(resources.Worker):
    """Goes on for the next test; what was asked before is not run again."""

    def __init__(self, processes: int) -> None:
        super().__init__(processes, (9, 0))
        self._found: dict[tuple[str, str, int], dict[str, Any]] = {}

    def step(self, config: Config, stage: str, layers: int) -> dict[str, Any]:
        key = to_toml(config), stage, layers
        if key not in self._found:
            self._found[key] = super().step(config, stage, layers)
        return self._found[key]

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def workers() -> Iterator[Callable[..., SharedWorker]]:
    """By processes: a start costs more than most steps."""
    started: dict[int, SharedWorker] = {}

    def worker(processes: int, _: Any = None) -> SharedWorker:
        return started.get(processes) or started.setdefault(processes, SharedWorker(processes))

    yield worker
    for found in started.values():
        resources.Worker.close(found)


@pytest.fixture
def shared(workers: Callable[..., SharedWorker], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans ask the shared workers."""
    monkeypatch.setattr(resources, "Worker", workers)


def parameters() -> int:
    """By hand, with the two heads."""
    d, kv, mlp = SHAPE["hidden_size"], SHAPE["hidden_size"] // 4, SHAPE["intermediate_size"]
    layer = d * d + d + 2 * (d * kv + kv) + d * d + 3 * d * mlp + 2 * d
    return LAYERS * layer + 2 * VOCABULARY * d + d + (64 * d + 64) + (64 + 1)


def test_lasting_memory_by_hand(config: Callable[..., Config], workers: Callable[..., SharedWorker]) -> None:
    """float32: weights, gradients, two moments; the reference has its layers' matrices in bfloat16."""
    found = workers(1).step(resources.full_micro_batches(config(), "rl", 8, 2, 1), "rl", LAYERS)
    size = parameters()
    d, kv, mlp = SHAPE["hidden_size"], SHAPE["hidden_size"] // 4, SHAPE["intermediate_size"]
    halved = LAYERS * (2 * d * d + d + 2 * (d * kv + kv) + 3 * d * mlp)
    heads = (64 * d + 64) + 65
    reference = 4 * (size - heads) - 2 * halved
    assert found["rollout"]["parts"]["weights"] == 4 * size
    assert found["rollout"]["parts"]["moments"] == pytest.approx(8 * size, rel=1e-3), "and a count each"
    assert found["rollout"]["parts"]["reference"] == pytest.approx(reference, rel=1e-3), "and rotary frequencies"
    assert found["update: optimizer"]["peak"] == pytest.approx(16 * size + reference, rel=5e-3)
    # the LM head: logits in float32, whose gradient takes their place; its gradient in float32 and its cast in
    # bfloat16; the states' gradient in bfloat16 and, before it is rounded, in float32
    scratch = 8 * NEW * (VOCABULARY * 4 + d * (4 + 2)) + VOCABULARY * d * (4 + 2)
    parts = found["update"]["parts"]
    assert parts["LM-head scratch"] + parts["cast weights"] == pytest.approx(scratch, rel=5e-3)


def two_micro_batches(config: Callable[..., Config], stage: str, processes: int) -> Config:
    options = ["distributed.strategy=fsdp2"] if processes > 1 else []
    return resources.full_micro_batches(config(*options), stage, 8, 2, processes)


FakeCuda = Callable[[int, Sequence[Config], Sequence[str]], list[dict[str, Any]]]
CASES = {1: ("rl",), PROCESSES: ("sft", "rl")}


@pytest.fixture(scope="module")
def on_fake_cuda(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> FakeCuda:
    """Steps of configs and stages in a group of processes: by processes, run once."""
    done: dict[int, list[dict[str, Any]]] = {}

    def steps(processes: int, configs: Sequence[Config], stages: Sequence[str]) -> list[dict[str, Any]]:
        if processes not in done:
            folder = tmp_path_factory.mktemp("fake_cuda")
            asked, answer = folder / "asked.json", folder / "answer.json"
            lengths = {"prompt": LENGTH - NEW, "completion": NEW, "layers": LAYERS}
            requests = [
                {"config": to_toml(c), "stage": stage, **lengths} for c, stage in zip(configs, stages, strict=True)
            ]
            asked.write_text(json.dumps(requests))
            environment = os.environ | {
                "CARFT_FAKE_CUDA_SHIM": str(shim),
                "CARFT_KERNELS_CHECK_INDICES": "0",
                "TRITON_INTERPRET": "0",
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            }
            script = str(Path(__file__).with_name("on_fake_cuda.py"))
            command = [sys.executable, script, str(asked), str(answer), str(processes)]
            ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
            assert answer.is_file(), ended.stderr[-4000:]
            done[processes] = json.loads(answer.read_text())
        return done[processes]

    return steps


@needs_fake_cuda
@pytest.mark.parametrize(("stage", "processes"), [(stage, n) for n, stages in CASES.items() for stage in stages])
def test_peaks_are_those_of_fake_cuda_tensors(
    config: Callable[..., Config],
    workers: Callable[..., SharedWorker],
    on_fake_cuda: FakeCuda,
    stage: str,
    processes: int,
) -> None:
    """The same step where tensors say that they are on a GPU, and nothing of the plan's stand-ins is installed.

    There no kernel computes SiLU's gradient at once, as a GPU has: three arrays more while a layer's backward runs.
    """
    found = workers(processes).step(two_micro_batches(config, stage, processes), stage, LAYERS)
    stages = CASES[processes]
    all_expected = on_fake_cuda(processes, [two_micro_batches(config, one, processes) for one in stages], stages)
    expected = all_expected[stages.index(stage)]
    silu = 3 * 8 * LENGTH * SHAPE["intermediate_size"] * 2
    phases = [name for name in expected if name and name != "load"]
    assert len(phases) >= 5
    for name in phases:
        least = expected[name]["peak"] * 0.999
        assert least - (silu if "backward" in name else 0) <= found[name]["peak"] <= expected[name]["peak"] * 1.001, (
            name
        )
    reads = [sum(x["syncs"] for name, x in steps.items() if name not in ("", "load")) for steps in (found, expected)]
    assert abs(reads[0] - reads[1]) <= 1


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    def of_size(mebibytes: float) -> None:
        monkeypatch.setitem(GPUS, "small", Gpu("small", round(mebibytes), 1e12, 1e11, (9, 0)))

    return of_size


@pytest.mark.usefixtures("shared")
def test_the_largest_micro_batch_fits_and_one_sequence_more_does_not(
    config: Callable[..., Config], card: Callable[[float], None], workers: Callable[..., SharedWorker]
) -> None:
    settings = config("sft.batch_size=64")

    def peak(rows: int) -> float:
        found = workers(1).step(resources.full_micro_batches(settings, "sft", rows, 2, 1), "sft", LAYERS)
        return max(phase["peak"] for name, phase in found.items() if name)

    border = (peak(20) + peak(21)) / 2
    card(border / USABLE / 2**20)
    found = resources.estimate(settings, gpu="small", stages=("sft",))
    assert found.fits()
    assert found.stages["sft"].largest_micro_batch_tokens == 20 * LENGTH
    assert not found.stages["sft"].whole_mini_batch


@pytest.mark.parametrize("given", [1, 2, 16, 64])
def test_the_search_finds_every_border_in_a_few_runs(given: int) -> None:
    """Memory is a straight line in the sequences of a micro-batch, and another where one micro-batch is all."""
    for border in range(65):
        asked = []

        def excess(k: int, border: int = border, asked: list[int] = asked) -> float:
            asked.append(k)
            return (k - border - 0.5) * (1.3 if k == 64 else 1.0)

        assert resources._largest(excess, given, 64) == border
        assert len(asked) == len(set(asked)) <= 6


@pytest.mark.usefixtures("shared")
def test_what_does_not_fit_says_so(config: Callable[..., Config], card: Callable[[float], None]) -> None:
    card(parameters() * 15 / USABLE / 2**20)  # weights, gradients and moments alone are 16 bytes each
    found, table = trainer.estimate(config(), gpu="small", stages="sft")
    assert not found.fits()
    assert found.stages["sft"].largest_micro_batch_tokens is None
    assert "prediction, nothing was run on a GPU" in str(table.title)
    cells = " ".join(map(str, table.columns[1].cells))
    assert "does not fit" in cells
    assert "not even one sequence" in cells


def test_a_sampler_that_sleeps_leaves_its_memory(config: Callable[..., Config]) -> None:
    cost = ModelCost(0, 0, parameters(), 0, 0, VOCABULARY, LAYERS, 0)
    lm_config = resources.load_lm_config(config().model)
    gpu = GPUS["h100-80"]
    shares = []
    for level in (0, 2):
        options = ['rollout.engine="vllm"', "rollout.server_devices=[]", f"rollout.sleep_level={level}"]
        sampler = resources.Sampler(config(*options, "rollout.memory_fraction=0.5"), cost, lm_config, gpu)
        assert sampler.working == gpu.memory / 2
        assert not sampler.problem
        shares.append(sampler.sleeping)
    assert shares == [gpu.memory / 2, 2**30]
    options = ['rollout.engine="vllm"', "rollout.server_devices=[]", "rollout.memory_fraction=0.01"]
    assert "do not hold its weights" in resources.Sampler(config(*options), cost, lm_config, gpu).problem


@pytest.mark.parametrize("name", ["a100-80", "h100-80", "b200-180"])
@pytest.mark.parametrize(("tokens", "wasted"), [(2, 0.5), (4, 0.5), (2, 1.0)])
def test_the_batch_from_which_drafts_are_worthless_is_where_their_rounds_take_longer(
    name: str, tokens: int, wasted: float
) -> None:
    """Round by round, for a model of linear layers alone."""
    gpu, weights = GPUS[name], 7_000_000_000

    def seconds(rows: float) -> float:
        return gpu.seconds(Work(2 * weights * rows, 2 * weights))

    def saves(sequences: int) -> bool:
        return seconds(sequences * tokens * (1 + wasted)) < tokens * seconds(sequences)

    for sequences in (1, 8, 60, 120, 500):
        gain = tokens * seconds(sequences) / seconds(sequences * tokens * (1 + wasted))
        assert gpu.draft_gain(sequences, tokens, wasted) == pytest.approx(gain)
    limit = gpu.sequences_for_drafts(wasted)
    assert saves(math.floor(limit))
    assert not saves(math.floor(limit) + 1)


def draft_options(sequences: int, *more: str) -> tuple[str, ...]:
    return f"rl.batch_size={sequences}", f"rl.mini_batch_size={sequences}", *more


def test_a_plan_says_what_drafts_would_save(config: Callable[..., Config]) -> None:
    """Of few sequences, whose rounds read the weights; a full batch is bound by its arithmetic."""
    cost = ModelCost.of_config(resources.load_lm_config(config().model))
    gpu = GPUS["h100-80"]
    few = config(*draft_options(8))
    without = [resources._seconds(few, "rl", gpu, 1, cost, length)["rollout"] for length in (1.0, 0.25)]
    found = resources._drafts(few, "rl", gpu, 1, cost)
    assert found is not None
    assert found.seconds == {tokens: pytest.approx([seconds / tokens for seconds in without]) for tokens in (2, 4)}
    many = config(*draft_options(512, "rollout.batch_size=512", "rollout.draft_budget=4096"))
    found = resources._drafts(many, "rl", gpu, 1, cost)
    assert found is not None
    assert found.seconds[4] == found.seconds[2]
    assert resources._drafts(config('rollout.drafts="off"'), "rl", gpu, 1, cost) is None
    assert resources._drafts(config(), "sft", gpu, 1, cost) is None


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize(
    ("sequences", "options", "gpus", "tokens", "said"),
    [
        (64, (), 1, [], "rollout.draft_budget = 64 leaves no guess for 64 sequences at once; 128 would leave one"),
        (64, ("rollout.draft_budget=128",), 1, [2], "leaves 1 guess for each of 64 sequences at once; worthless"),
        (64, ("rollout.batch_size=16",), 1, [2, 4], "leaves 3 guesses for each of 16 sequences at once"),
        (64, ("rollout.batch_size=24",), 1, [2], "leaves 1 guess for each of 24 sequences at once"),
        (64, ("rollout.batch_size=400",), 1, [], "no guess for 64 sequences at once; 128 would"),
        (64, (), PROCESSES, [2, 4], "leaves 7 guesses for each of 8 sequences at once; worthless"),
        (4, (), 1, [2, 4], "leaves 8 guesses for each of 4 sequences at once"),
    ],
)
def test_a_plan_knows_the_budget_of_drafts(
    config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    sequences: int,
    options: tuple[str, ...],
    gpus: int,
    tokens: list[int],
    said: str,
) -> None:
    """1 + guesses tokens a forward at most, for the sequences that a GPU decodes at once."""
    monkeypatch.setattr(resources, "_largest", lambda *_: 1)
    settings = config(*draft_options(sequences, *options))
    _, table = trainer.estimate(settings, gpu="h100-80", gpus=gpus, stages="rl")
    rows = dict(zip(*([str(cell).strip() for cell in column.cells] for column in table.columns), strict=True))
    row = rows["rollout with drafts, predicted"]
    assert said in row
    assert [n for n in (2, 3, 4) if f"at {n} tokens a forward" in row] == tokens
    assert "for each token of a completion" in rows["seconds"]


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize(
    ("options", "gpu", "words"),
    [
        ((), "h100", ["h100", "h100-80", "rtx4090-24"]),
        (("distributed.strategy=zero3",), "h100-80", ["zero3", "ddp", "fsdp2"]),
        (("model.attention=sdpa",), "h100-80", ["sdpa", "packed"]),
        (("model.device=cpu",), "h100-80", ["model.device", "cuda"]),
        (("model.impl=padded",), "h100-80", ["padded", "fast"]),
        (("lora.rank=4", 'lora.target_modules=["nothing"]'), "h100-80", ["lora.target_modules", "nothing"]),
    ],
)
def test_bad_input_names_what_is_allowed(
    config: Callable[..., Config], options: tuple[str, ...], gpu: str, words: list[str]
) -> None:
    with pytest.raises(InputError) as error:
        resources.estimate(config(*options), gpu=gpu, gpus=PROCESSES, stages=("rl",))
    for word in words:
        assert word in str(error.value)


def test_the_command_ends_with_2_for_an_unknown_gpu(model: str) -> None:
    command = [sys.executable, "-m", "carft_fast", "plan", "--gpu", "gtx", "--set", f"model.path={model}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert 'gpu = "gtx": allowed are' in done.stderr


CLAIMS = [claim for claim in plan_table.claims() if claim.gpus == 1]


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.recipe.stem)
def test_a_shipped_recipe_fits_where_it_says(
    claim: plan_table.Claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "LAYERS", (2, 3))
    monkeypatch.setattr(resources, "_largest", lambda *_: 1)  # costs most, and has a test of its own
    found = resources.estimate(plan_table.config_of(claim.recipe, tmp_path), gpu=claim.gpu, stages=(claim.stage,))
    assert found.fits(), plan_table.verdict(found, claim.stage)
    assert len(CLAIMS) == len(list((ROOT / "configs" / "one_gpu").glob("*.toml")))


def test_what_the_table_says_of_a_recipe_is_what_the_recipe_says() -> None:
    claims = {str(claim.recipe.relative_to(ROOT)): claim for claim in plan_table.claims()}
    rows = json.loads(plan_table.ROWS.read_text())
    assert rows
    for row in rows:
        claim = claims[row["recipe"]]
        assert (row["gpu"], row["gpus"], row["fits"]) == (claim.gpu, claim.gpus, True)
    page = plan_table.PAGE.read_text()
    assert plan_table.with_table(page, rows) == page
