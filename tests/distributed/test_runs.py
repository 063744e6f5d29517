"""Whole runs over several processes (gloo), as users start them: accelerate, torchrun, a process that dies, resume."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from carft_fast.config.toml import load_config
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models.load import load_model
from tests.processes import Command, on_ranks

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
FSDP2 = ["--set", "distributed.strategy=fsdp2"]
ZERO3 = ["--set", "distributed.strategy=zero3"]
ROUNDING = {"sampler_diff_mean", "sampler_diff_max", "first_ratio_error"}
"""Differences that are themselves rounding errors."""


def command(launcher: list[str], folder: Path, options: list[str]) -> list[str]:
    return [sys.executable, *launcher, "-m", "carft_fast", "quickstart", "--output-dir", str(folder), *options]


def start(launcher: list[str], folder: Path, options: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path])}
    return subprocess.Popen(
        command(launcher, folder, options),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str] | Command) -> tuple[int, str]:
    output, _ = process.communicate(timeout=400)
    assert process.returncode is not None
    return process.returncode, output


def run(processes: int, folder: Path, options: list[str]) -> Path:
    """Without a launcher."""
    words = ["quickstart", "--output-dir", str(folder), *options]
    code, output = on_ranks(processes, words, 400) if processes > 1 else finish(Command(words))
    assert code == 0, output[-4000:]
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    unlike = {
        "seconds",
        "shares",
        "tokens_per_forward",
        "draft_accepted",
        "draft_wasted",
    }  # drafts depend on the batch's size
    return [{k: v for k, v in json.loads(line).items() if k not in unlike} for line in lines]


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def run_script(folder: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """On two processes, in `folder`, with the words as its arguments."""
    (folder / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, *TORCHRUN, "2", "script.py", *words]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


BUSY_TO_THE_END = """
import sys, time, torch, torch.distributed as dist
import carft_fast.cli
from carft_fast.core.processes import join

def app():
    join("cpu", 60)
    dist.barrier()
    sys.setswitchinterval(1000)  # no other thread gets the interpreter from here on, so gloo's has to wait for it
    dist.all_reduce(torch.ones(3), async_op=True)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        pass
    sys.exit({code})

carft_fast.cli.app = app
carft_fast.cli.run_cli()
"""


@pytest.mark.parametrize("code", [0, 3])
def test_a_process_ends_with_its_own_exit_code_whatever_gloo_still_holds(code: int, tmp_path: Path) -> None:
    found = run_script(tmp_path, BUSY_TO_THE_END.format(code=code))
    assert "terminate called" not in found.stderr
    assert found.returncode == bool(code)
    assert bool(re.search(r"exitcode *: 3 ", found.stderr)) == bool(code), found.stderr


def assert_same_run(ours: Path, expected: Path) -> None:
    """Every record but for rounding, the same samples, and the same weights within 1e-5."""
    for mine, theirs in zip(records(ours), records(expected), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            if key in ROUNDING:
                assert math.isclose(mine[key], value, abs_tol=1e-5)
            elif isinstance(value, float):
                assert mine[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
            else:
                assert mine[key] == value, key
    for name in ("sft/model.safetensors", "model/model.safetensors", "model/carft_heads.safetensors"):
        mine, theirs = load_file(ours / name), load_file(expected / name)
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(mine[key], tensor, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def tiny_run(tiny_run: list[str]) -> list[str]:
    """With an epsilon that keeps AdamW from dividing one rounding error by another."""
    return [*tiny_run, "--set", "sft.eps=1e-5", "--set", "rl.eps=1e-5"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_run: list[str]) -> Path:
    return run(1, tmp_path_factory.mktemp("alone") / "run", tiny_run)


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory: pytest.TempPathFactory, tiny_run: list[str]) -> Path:
    """By accelerate's launcher with the config of this repository."""
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "configs/accelerate/fsdp2.yaml"]
    folder = tmp_path_factory.mktemp("fsdp2") / "run"
    code, output = finish(start([*launcher, "--num_processes", "2"], folder, tiny_run))
    assert code == 0, output[-4000:]
    return folder


def workers(folder: Path) -> dict[int, int]:
    """Rank -> process id of the trainers of this run folder."""
    found = {}
    for path in Path("/proc").iterdir():
        try:
            line = (path / "cmdline").read_text().split("\0")
            environment = (path / "environ").read_text().split("\0")
        except OSError:
            continue
        rank = next((word for word in environment if word.startswith("RANK=")), None)
        if str(folder) in line and rank is not None:
            found[int(rank.removeprefix("RANK="))] = int(path.name)
    return found


def kill_a_rank_after(process: subprocess.Popen[str], folder: Path, checkpoint: str) -> str:
    """SIGKILL rank 1 once the checkpoint is there; returns what the job said. It has a minute to end, all of it."""
    deadline = time.monotonic() + 300
    while not (folder / "checkpoints" / checkpoint).is_dir():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(workers(folder)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not workers(folder)
    return output


@pytest.mark.long
def test_fsdp2_from_accelerate_is_the_run_of_one_process(alone: Path, fsdp2: Path) -> None:
    assert json.loads((fsdp2 / "run.json").read_text())["machine"]["strategy"] == "fsdp2"
    assert_same_run(fsdp2, alone)


@pytest.mark.long
def test_a_rank_that_dies_ends_the_job_and_the_run_goes_on(
    tmp_path: Path, tiny_run: list[str], alone: Path, fsdp2: Path
) -> None:
    """To the bit with as many processes, within rounding with one."""
    killed, moved = tmp_path / "killed", tmp_path / "moved"
    output = kill_a_rank_after(start([*TORCHRUN, "2"], killed, [*tiny_run, *FSDP2]), killed, "rl-000001")
    assert re.search(r"rank\s*: 1.*\n\s*exitcode\s*: -9", output), output[-2000:]
    shutil.copytree(killed, moved, symlinks=True)
    run(2, killed, [*tiny_run, *FSDP2, "--resume"])
    assert digest(killed) == digest(fsdp2)
    assert records(killed) == records(fsdp2)
    run(1, moved, [*tiny_run, "--resume"])
    assert_same_run(moved, alone)


@pytest.mark.long
def test_zero3_goes_on_where_it_was_killed(tmp_path: Path, tiny_run: list[str], alone: Path) -> None:
    kill_a_rank_after(start([*TORCHRUN, "2"], tmp_path / "run", [*tiny_run, *ZERO3]), tmp_path / "run", "rl-000001")
    assert_same_run(run(2, tmp_path / "run", [*tiny_run, *ZERO3, "--resume"]), alone)


@pytest.mark.long
def test_adapters_under_zero3_go_on_with_as_many_processes_and_with_one(tmp_path: Path, tiny_run: list[str]) -> None:
    options = [*tiny_run, "--set", "lora.rank=4", "--set", "rl.lr=3e-3"]
    whole = run(1, tmp_path / "alone", options)
    before, after = (load_file(whole / stage / "model.safetensors") for stage in ("sft", "model"))
    assert max(float((after[name] - x).abs().max()) for name, x in before.items()) > 1e-3
    killed, moved = tmp_path / "killed", tmp_path / "moved"
    kill_a_rank_after(start([*TORCHRUN, "2"], killed, [*options, *ZERO3]), killed, "rl-000001")
    shutil.copytree(killed, moved, symlinks=True)
    assert_same_run(run(2, killed, [*options, *ZERO3, "--resume"]), whole)
    assert_same_run(run(1, moved, [*options, "--resume"]), whole)


def broken_on_rank_1(completions: list[str], examples: list[Any]) -> list[float]:
    """A user's reward function."""
    if os.environ["RANK"] == "1":
        raise ZeroDivisionError("the second process's share")
    return [0.0] * len(completions)


@pytest.mark.long
def test_what_fails_on_one_rank_ends_all_with_its_error(tmp_path: Path, tiny_run: list[str]) -> None:
    reward = ["--set", "reward.fn=distributed.test_runs:broken_on_rank_1", "--set", "reward.partial=constant"]
    code, output = finish(start([*TORCHRUN, "2"], tmp_path / "run", [*tiny_run, *reward]))
    assert code != 0
    assert "the second process's share" in output
    assert not workers(tmp_path / "run")


FAILS_IN_THE_MODEL = """
import os
from carft_fast.rollout import hf

pick = hf._TokenPicker.__call__

def call(self, *arguments):
    if os.environ["RANK"] == "1" and len(self.logprobs) == 3 and self._sampling.temperature > 0:
        raise ZeroDivisionError("in the middle of a completion")
    return pick(self, *arguments)

hf._TokenPicker.__call__ = call
from carft_fast.cli import run_cli
run_cli()
"""


@pytest.mark.long
def test_what_fails_on_one_rank_while_the_others_need_it_ends_all(tmp_path: Path, tiny_run: list[str]) -> None:
    """Under FSDP2 every forward is a collective: the others learn of it by the process's end."""
    words = ["quickstart", "--output-dir", str(tmp_path / "run"), *tiny_run, *FSDP2]
    found = run_script(tmp_path, FAILS_IN_THE_MODEL, *words)
    assert found.returncode != 0
    assert "in the middle of a completion" in found.stdout + found.stderr
    assert not workers(tmp_path / "run")


WHAT_IS_LEFT = """
import os, weakref
import carft_fast.training.loop as loop

started = loop.StageLoop.__init__
seen = []

def start(self, *arguments):
    started(self, *arguments)
    for stage, model, optimizer in seen:
        print(f"rank {os.environ['RANK']}: of {stage} left:", model() is not None, optimizer() is not None, flush=True)
    optimizer = getattr(self.learner.optimizer, "optimizer", self.learner.optimizer)  # under DeepSpeed's own
    seen.append((arguments[1], weakref.ref(self.learner.model), weakref.ref(optimizer)))

loop.StageLoop.__init__ = start
from carft_fast.cli import run_cli
run_cli()
"""


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_a_stage_leaves_no_model_and_no_optimizer_in_memory(tmp_path: Path, tiny_run: list[str], strategy: str) -> None:
    words = ["quickstart", "--output-dir", str(tmp_path / "run"), *tiny_run]
    words += ["--set", f"distributed.strategy={strategy}", "--set", "sft.max_steps=1", "--set", "rl.max_steps=1"]
    found = run_script(tmp_path, WHAT_IS_LEFT, *words)
    assert found.returncode == 0, found.stderr[-3000:]
    for rank in (0, 1):
        assert f"rank {rank}: of sft left: False False" in found.stdout


OTHER_ROWS = """
import os, sys
sys.argv = [word.replace("rows.json", f"rows-{os.environ['RANK']}.json") for word in sys.argv]
from carft_fast.cli import run_cli
run_cli()
"""


def test_processes_with_other_rows_are_refused(tmp_path: Path) -> None:
    """As with a file that one machine holds an older version of."""
    rows = [
        {"item_id": str(i), "question": f"{i} plus 1?", "answer_cot": "add", "answer_value": i + 1} for i in range(9)
    ]
    for rank, order in enumerate((rows, rows[::-1])):
        (tmp_path / f"rows-{rank}.json").write_text(json.dumps(order))
    folder = tmp_path / "model"
    load_model(load_config(None, []), "synthetic", torch.device("cpu"), heads=False).save(folder)
    build_tokenizer().save_pretrained(folder)
    words = ["sft", "--output-dir", str(tmp_path / "run"), "--set", f"model.path={folder}"]
    for option in ("data.max_length=160", "rollout.max_new_tokens=24", "data.train=rows.json", "data.eval=rows.json"):
        words += ["--set", option]
    found = run_script(tmp_path, OTHER_ROWS, *words)
    assert found.returncode != 0
    message = "data.train is not the same for all processes: 9 usable rows for process 0, 9 for process 1, not the same"
    assert message in found.stdout + found.stderr
    assert not (tmp_path / "run").exists()


CACHE = ["--set", "rollout.kv_cache_gib=0.25"]
REPEATED = ["--set", "data.train_rows=12", "--set", "rollout.temperature=0.3"]
"""A step samples every question, with a policy that is surer of its tokens: what was sampled last stands again."""


def tokens_per_forward(folder: Path) -> list[float]:
    """Of the RL steps."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["tokens_per_forward"] for line in lines if (line["stage"], line["kind"]) == ("rl", "train")]


@pytest.fixture(scope="module")
def sampled_by_vllm(tmp_path_factory: pytest.TempPathFactory, tiny_run: list[str]) -> Path:
    """Without drafts, which the other runs have."""
    options = [*tiny_run, *CACHE, *REPEATED, "--set", "rollout.engine=vllm", "--set", "rollout.drafts=off"]
    return run(1, tmp_path_factory.mktemp("vllm") / "run", options)


@pytest.mark.long
@pytest.mark.parametrize("how", [FSDP2, ZERO3], ids=["fsdp2", "zero3"])
def test_an_engine_in_every_process_samples_what_one_would(
    how: list[str], tmp_path: Path, tiny_run: list[str], sampled_by_vllm: Path
) -> None:
    options = [*tiny_run, *CACHE, *REPEATED, "--set", "rollout.engine=vllm", *how]
    folder = run(2, tmp_path / "run", options)
    first, *later = tokens_per_forward(folder)
    assert min(first, *later) > 1, "drafts stand in every step"
    assert max(later) > first, "and more where there are last completions"
    assert_same_run(folder, sampled_by_vllm)
    differences = [r["sampler_diff_max"] for r in records(folder) if (r["stage"], r["kind"]) == ("rl", "train")]
    assert len(differences) == 4
    assert max(differences) < 1e-4, "the sampler has other weights"


@pytest.mark.long
@pytest.mark.parametrize("how", [FSDP2, ZERO3], ids=["fsdp2", "zero3"])
def test_servers_sample_ahead_for_processes_that_share_the_weights(
    how: list[str], tmp_path: Path, tiny_run: list[str]
) -> None:
    """The main process drives the server, with weights gathered from both; the probe compares them after every step."""
    more = [*CACHE, *REPEATED, "--set", "rollout.engine=vllm-server", "--set", "rollout.async_depth=1"]
    more += ["--set", "rollout.probe_every=1"]
    words = ["quickstart", "--output-dir", str(tmp_path / "run"), *tiny_run, *more, *how]
    code, output = on_ranks(2, words, 400)
    assert code == 0, output[-4000:]
    probes = re.findall(r"trainer and sampler agree: .*? max (\S+) nats", output.replace("\n", " "))
    assert len(probes) == 5
    assert max(map(float, probes)) < 1e-4
    train = [r for r in records(tmp_path / "run") if (r["stage"], r["kind"]) == ("rl", "train")]
    assert [record["staleness"] for record in train] == [0, 1, 1, 1]
    assert train[0]["sampler_diff_max"] < 1e-4
    assert min(tokens_per_forward(tmp_path / "run")) > 1
