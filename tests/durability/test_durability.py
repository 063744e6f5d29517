"""Kills in every phase, full disks, damaged files, wrong clocks: the run ends with the bits of an undisturbed one."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from carft_fast.config.toml import load_config
from carft_fast.core.durable import _write_manifest, find_damage
from carft_fast.training.checkpoint import CheckpointStore

TINY = [
    *("sft.max_steps=6", "sft.batch_size=16", "sft.micro_batch_tokens=400", "sft.save_every=2"),
    *("rl.max_steps=8", "rl.batch_size=12", "rl.mini_batch_size=8", "rl.micro_batch_tokens=200"),
    *("rl.eval_every=2", "rl.save_every=1", "rollout.max_new_tokens=16", "data.eval_rows=20", "data.train_rows=200"),
]
KILLED = -9
WEIGHTS = ("model.safetensors", "carft_heads.safetensors")


class Life(dict[str, Any]):
    """One process's end: "code", what it printed as "text", where it was killed as "where"."""


class Lives:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        command = [sys.executable, str(Path(__file__).with_name("lives.py"))]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def command(self, *argv: str, **plan: Any) -> Life:
        log, note = self._folder / "log", self._folder / "note"
        note.unlink(missing_ok=True)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({"argv": argv, "log": str(log), "note": str(note), **plan}) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        where = note.read_text().strip() if note.exists() else None
        return Life(code=code, text=log.read_text(errors="replace"), where=where)

    def run(self, folder: Path, *overrides: str, **plan: Any) -> Life:
        """The tiny run in `folder`, resumed where it exists."""
        options = [word for override in (*TINY, *overrides) for word in ("--set", override)]
        resume = ["--resume"] if (folder / "config.toml").exists() else []
        return self.command("quickstart", "--output-dir", str(folder), *options, *resume, **plan)

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        assert self._server.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    server = Lives(tmp_path_factory.mktemp("lives"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    life = lives.run(folder)
    assert life["code"] == 0, life["text"]
    return folder


def records(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "shares")} for line in lines]


def assert_same_outcome(folder: Path, reference: Path) -> None:
    for name in (f"{model}/{file}" for model in ("sft", "model") for file in WEIGHTS):
        found, expected = (hashlib.sha256((run / name).read_bytes()).hexdigest() for run in (folder, reference))
        assert found == expected, name
    assert records(folder) == records(reference)
    steps = [(r["stage"], r["step"]) for r in records(folder) if r["kind"] == "train"]
    assert steps == [("sft", i + 1) for i in range(6)] + [("rl", i + 1) for i in range(8)]
    assert not list(folder.rglob(".writing-*"))


def whole_checkpoints(folder: Path) -> list[str]:
    """By stage and step."""
    found = [path for path in (folder / "checkpoints").glob("*-*") if re.fullmatch(r"(sft|rl)-\d+", path.name)]
    assert [path for path in found if find_damage(path)] == [], "a kill left a damaged checkpoint in place"
    return sorted((path.name for path in found), key=in_time)


def in_time(name: str) -> tuple[bool, str]:
    return name.startswith("rl"), name


@pytest.mark.long
def test_twenty_kills(lives: Lives, undisturbed: Path, tmp_path: Path) -> None:
    """At a random function call of every phase; clocks of the lives are years apart, folders' times are shuffled."""
    rng, folder = random.Random(0), tmp_path / "run"
    in_sft = ["load", "train", "train", "checkpoint", "checkpoint", "evaluate"]
    in_rl = [*["rollout", "sync", "checkpoint", "forward"] * 2, *["update"] * 3, "reward", "evaluate"]
    rng.shuffle(in_sft)
    rng.shuffle(in_rl)
    before: list[str] = []
    for phase in [*in_sft, "rollout", *in_rl]:
        # a resumed stage finds its first checkpoint saved already; some lives get a step further
        entry = 2 if before and phase in ("checkpoint", "rollout") and before[-1].startswith("rl") else 1
        wanted = {"phase": phase, "entry": entry, "calls": int(10 ** rng.uniform(0, 3.5))}
        life = lives.run(folder, kill=wanted, clock=rng.uniform(-3e8, 3e8))
        assert (life["code"], str(life["where"]).split()[0]) == (KILLED, phase), life["text"]
        whole = whole_checkpoints(folder)
        assert len(whole) >= min(2, len(before)), f"{before} before, {whole} after a kill in {life['where']}"
        assert not before or in_time(whole[-1]) >= in_time(before[-1])
        before = whole
        for name in whole:
            os.utime(folder / "checkpoints" / name, (0, rng.uniform(0, 4e9)))
    life = lives.run(folder, clock=-3e8)
    assert life["code"] == 0, life["text"]
    assert "damaged" not in life["text"]
    assert_same_outcome(folder, undisturbed)


@pytest.mark.long
def test_kills_while_checkpoints_are_written_asynchronously(lives: Lives, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for function, call in [("_sync", 3), ("_write_manifest", 2), ("publish", 2), ("remove_folder", 1), ("_sync", 20)]:
        life = lives.run(folder, "output.async_save=true", kill_in={"function": function, "call": call})
        assert (life["code"], life["where"]) == (KILLED, function), life["text"]
        whole_checkpoints(folder)
    life = lives.run(folder, "output.async_save=true")
    assert life["code"] == 0, life["text"]
    assert_same_outcome(folder, undisturbed)
    for path in (folder / "checkpoints").glob("rl-*/*.safetensors"):
        assert path.read_bytes() == (undisturbed / path.relative_to(folder)).read_bytes()


@pytest.mark.long
def test_a_stop_while_a_checkpoint_is_written_asynchronously(lives: Lives, undisturbed: Path, tmp_path: Path) -> None:
    """The save under way is finished, and so is that of the step the run stops at."""
    folder, option = tmp_path / "run", "output.async_save=true"
    for signum, save in [(signal.SIGTERM, 2), (signal.SIGINT, 4), (signal.SIGTERM, 3)]:
        life = lives.run(folder, option, stop_in={"signal": signum, "save": save})
        assert life["code"] == 128 + signum, life["text"]
        thread, under_way, trainer_waited = life["where"].split()
        assert thread.startswith("checkpoint"), "not written asynchronously"
        assert trainer_waited == "True"
        stopped = re.search(rf"stopped by {signum.name}: step \d+ saved to \S+/checkpoints/(\S+); go on", life["text"])
        assert stopped, life["text"]
        assert {under_way, stopped[1]} <= set(whole_checkpoints(folder))
        assert in_time(stopped[1]) >= in_time(under_way)
        assert not list(folder.rglob(".writing-*"))
    life = lives.run(folder, option)
    assert life["code"] == 0, life["text"]
    assert_same_outcome(folder, undisturbed)


def test_a_file_that_may_not_grow(lives: Lives, tmp_path: Path) -> None:
    """What a full disk does to a process, without a disk: files of at most 300 kB."""
    folder = tmp_path / "run"
    life = lives.run(folder, largest_file=300_000)
    assert life["code"] == 1, life["text"]
    error = life["text"].splitlines()[-1]
    assert re.fullmatch(
        r"error: \S+/checkpoints/sft-000002 cannot be written: File too large "
        r"\(about [\d,]{7,} bytes are needed, [\d,]+ free\)\. .* --resume goes on .*",
        error,
    ), error
    assert "Traceback" not in life["text"]
    assert list((folder / "checkpoints").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A file system of 5 MB, and how to make it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)

    mount("size=5m")
    yield folder, lambda size: mount(f"remount,size={size}")
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_full_disk(lives: Lives, undisturbed: Path, small_disk: tuple[Path, Callable[[str], None]]) -> None:
    """In the third checkpoint, then where metrics and samples are written; with room again the run goes on."""
    disk, grow = small_disk
    folder = disk / "run"
    life = lives.run(folder)
    assert life["code"] == 1, life["text"]
    assert "checkpoints/sft-000006 cannot be written: No space left on device (about " in life["text"]
    assert "Traceback" not in life["text"]
    assert whole_checkpoints(folder) == ["sft-000002", "sft-000004"]
    assert not list(folder.rglob(".writing-*")), "what was half written still takes room"
    grow("40m")
    ballast = disk / "ballast"
    life = lives.run(folder, fill={"phase": "update", "entry": 2, "path": str(ballast)})
    assert life["code"] == 1, life["text"]
    assert " cannot be written: No space left on device (" in life["text"]
    assert "Traceback" not in life["text"]
    assert whole_checkpoints(folder)[-1] == "rl-000001"
    ballast.unlink()
    life = lives.run(folder)
    assert life["code"] == 0, life["text"]
    assert "resumed at step 1 of 8" in life["text"]
    assert_same_outcome(folder, undisturbed)


def unfinished_copy(run: Path, folder: Path) -> Path:
    """As the run was before its last model was exported."""
    shutil.copytree(run, folder, symlinks=True)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "model")
    return folder


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_damaged_checkpoints_are_set_aside_and_told(lives: Lives, undisturbed: Path, tmp_path: Path) -> None:
    folder = unfinished_copy(undisturbed, tmp_path / "run")
    checkpoints = folder / "checkpoints"
    names = whole_checkpoints(folder)
    assert names[-2:] == ["rl-000007", "rl-000008"]
    truncated = checkpoints / "rl-000008" / "model.safetensors"
    size = truncated.stat().st_size
    os.truncate(truncated, size - 100)
    life = lives.run(folder)
    assert life["code"] == 0, life["text"]
    assert f"model.safetensors has {size - 100:,} bytes, its manifest says {size:,}" in life["text"]
    assert "resumed at step 7 of 8" in life["text"]
    assert (checkpoints / "damaged-rl-000008" / "model.safetensors").stat().st_size == size - 100
    assert_same_outcome(folder, undisturbed)


def test_with_nothing_whole_left_the_stage_starts_again(lives: Lives, undisturbed: Path, tmp_path: Path) -> None:
    """And the model it starts from is made again, being damaged too."""
    folder = unfinished_copy(undisturbed, tmp_path / "run")
    flip_bit(folder / "sft" / "model.safetensors")
    for name in whole_checkpoints(folder):
        flip_bit(folder / "checkpoints" / name / "optimizer.safetensors")
    life = lives.run(folder)
    assert life["code"] == 0, life["text"]
    told = life["text"]
    assert re.search(r"/sft is damaged: model.safetensors has SHA-256 \w{64}, its manifest says \w{64}", told)
    assert "rl-000008 is damaged: optimizer.safetensors has SHA-256" in told
    assert "rl: no whole checkpoint is left, the stage starts from its beginning" in told
    assert "resumed" not in told
    assert_same_outcome(folder, undisturbed)


def refused(life: Life, *said: str) -> None:
    assert life["code"] == 2, life["text"]
    error = life["text"].strip()
    assert error.startswith("error: "), error
    assert "\n" not in error, error
    for text in said:
        assert text in error


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def of_another_seed(lives: Lives, undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "run"
    life = lives.run(folder, "seed=7")
    assert life["code"] == 0, life["text"]
    return folder


def test_what_is_whole_but_of_another_run_is_refused(
    lives: Lives, undisturbed: Path, of_another_seed: Path, tmp_path: Path
) -> None:
    """A checkpoint, an SFT model; nothing is written, nothing set aside. Moved away, the run goes on."""
    folder = unfinished_copy(undisturbed, tmp_path / "run")
    checkpoints = folder / "checkpoints"
    shutil.rmtree(checkpoints / "rl-000008")
    shutil.copytree(of_another_seed / "checkpoints" / "rl-000008", checkpoints / "rl-000008")
    before = state_of(folder)
    refused(lives.run(folder), f"{checkpoints / 'rl-000008'} is whole but not this run's: seed: 7 -> 0")
    assert state_of(folder) == before
    (checkpoints / "rl-000008").rename(tmp_path / "elsewhere")
    (folder / "sft").rename(tmp_path / "own sft")
    shutil.copytree(of_another_seed / "sft", folder / "sft")
    refused(lives.run(folder), f"{folder / 'sft'} is whole but not this run's: its manifest.json says made_by")
    shutil.rmtree(folder / "sft")
    (tmp_path / "own sft").rename(folder / "sft")
    life = lives.run(folder)
    assert life["code"] == 0, life["text"]
    assert "resumed at step 7 of 8" in life["text"]
    assert_same_outcome(folder, undisturbed)


def test_a_checkpoint_of_another_config_is_refused_by_the_key(lives: Lives, undisturbed: Path, tmp_path: Path) -> None:
    """Written by this run's code and seed, sealed again: only its settings are others."""
    folder = unfinished_copy(undisturbed, tmp_path / "run")
    other = folder / "checkpoints" / "rl-000008"
    config = other / "config.toml"
    config.write_text(config.read_text().replace("lr = 0.0002", "lr = 0.0004", 1))
    reseal(other)
    refused(lives.run(folder), str(other), "rl.lr: 0.0004 -> 0.0002")
    config.write_text("[[[")
    reseal(other)
    refused(lives.run(folder), str(other), "not valid TOML")
    (other / "trainer_state.json").write_text("[1]")
    reseal(other)
    refused(lives.run(folder), str(other), "trainer_state.json: expected an object in JSON, found '[1]'")


def reseal(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    _write_manifest(folder, {})


@pytest.mark.parametrize("name", ["rl-000009", "rl-8", "sft-000008"])
def test_a_renamed_checkpoint_is_refused(lives: Lives, undisturbed: Path, tmp_path: Path, name: str) -> None:
    folder = unfinished_copy(undisturbed, tmp_path / "run")
    renamed = (folder / "checkpoints" / "rl-000008").rename(folder / "checkpoints" / name)
    refused(lives.run(folder), f"{renamed} is whole but not this run's: it was written as rl-000008")
    assert renamed.is_dir()


def test_a_best_link_to_another_runs_checkpoint_is_none(undisturbed: Path, of_another_seed: Path) -> None:
    """A rollback would go on from it."""
    store = CheckpointStore(undisturbed / "checkpoints", load_config(str(undisturbed / "config.toml")), print)
    link = undisturbed / "checkpoints" / "best"
    before = os.readlink(link)
    link.unlink()
    link.symlink_to(of_another_seed / "checkpoints" / "rl-000008")
    assert store.best("rl") is None
    link.unlink()
    link.symlink_to(before)
    assert store.best("rl") == undisturbed / "checkpoints" / before


def test_a_manifest_without_files_is_damage(lives: Lives, undisturbed: Path, tmp_path: Path) -> None:
    folder = unfinished_copy(undisturbed, tmp_path / "run")
    newest = folder / "checkpoints" / "rl-000008"
    (newest / "manifest.json").write_text('{"files": {}}')
    (newest / "model.safetensors").write_bytes(b"garbage")
    life = lives.run(folder)
    assert life["code"] == 0, life["text"]
    assert "rl-000008 is damaged: manifest.json lists no file" in life["text"]
    assert "resumed at step 7 of 8" in life["text"]
    assert_same_outcome(folder, undisturbed)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.jsonl", '{"stage": "sft"}\n', "line 1: kind = None: expected a str"),
        ("metrics.jsonl", "\x00\x1b[2J garbage\n", "line 1: not JSON ("),
        ("metrics.jsonl", "[" * 100_000 + "\n", "line 1: not JSON ("),
        ("metrics.jsonl", "[1]\n", "line 1: expected an object in JSON, found '[1]'"),
        ("summary.json", '{"seed": 7}', "is not this run's: seed: 7 -> 0"),
        ("summary.json", "garbage", "summary.json: not JSON ("),
        ("run.json", "[]", "run.json: expected an object in JSON"),
        ("run.json", "{", "run.json: not JSON ("),
        ("config.toml", "x = " + "[" * 10_000, "nested too deep"),
    ],
)
def test_garbage_in_a_runs_files_is_one_sentence(
    lives: Lives, undisturbed: Path, tmp_path: Path, file: str, content: str, said: str
) -> None:
    folder = unfinished_copy(undisturbed, tmp_path / "run")
    (folder / file).write_text(content)
    before = state_of(folder)
    refused(lives.run(folder), str(folder / file), said)
    assert state_of(folder) == before
    life = lives.command("report", str(folder))
    assert life["code"] == 2, life["text"]
    assert "Traceback" not in life["text"]


def test_export(lives: Lives, undisturbed: Path, tmp_path: Path) -> None:
    """The last checkpoint's export is the model the run ended with."""
    checkpoint = undisturbed / "checkpoints" / "rl-000008"
    life = lives.command("export", str(checkpoint), str(tmp_path / "out"))
    assert life["code"] == 0, life["text"]
    exported, final = ({p.name: p.read_bytes() for p in f.iterdir()} for f in (tmp_path / "out", undisturbed / "model"))
    assert exported == final
    life = lives.command("export", str(checkpoint), str(tmp_path / "out"))
    assert (life["code"], life["text"].strip()) == (
        2,
        f"error: {tmp_path / 'out'}: not empty; give a new or empty folder",
    )


def test_export_merges_adapters_into_the_model_the_stage_began_with(lives: Lives, tmp_path: Path) -> None:
    """Also when the run has been moved: its own folders are found from the checkpoint."""
    life = lives.run(tmp_path / "run", "lora.rank=2", "rl.max_steps=1", "model.compute_dtype=bfloat16")
    assert life["code"] == 0, life["text"]
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    checkpoint = moved / "checkpoints" / "rl-000001"
    assert not (checkpoint / "model.safetensors").exists()
    life = lives.command("export", str(checkpoint), str(tmp_path / "out"))
    assert life["code"] == 0, life["text"]
    exported, final = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in (tmp_path / "out", moved / "model")
    )
    assert exported == final
    before, after = (load_file(f / "model.safetensors") for f in (moved / "sft", tmp_path / "out"))
    assert any(not before[name].equal(after[name]) for name in before), "the adapters changed nothing"
