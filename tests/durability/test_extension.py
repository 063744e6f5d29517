"""A finished run gets more steps: it ends as one that had them from the start, and nothing else of it may change."""

import json
import shutil
from pathlib import Path

import pytest
from trackio.sqlite_storage import SQLiteStorage

from carft_fast import InputError, Trainer, load_config
from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config import Config
from carft_fast.training.run import check_run_folder

from ..conftest import TINY_RUN
from ..trainer.conftest import digests, records

STAGES = ("sft", "rl")


def short(*more: str) -> Config:
    """Two steps a stage, each evaluated and saved; a learning rate that does not know how many there are."""
    steps = ["sft.max_steps=2", "rl.max_steps=2", "rl.eval_every=1", "data.eval_rows=8", "data.train_rows=64"]
    steps.append('rl.lr_schedule="constant"')
    return load_config(QUICKSTART_CONFIG, overrides=[*TINY_RUN, *steps, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    Trainer(short(), output_dir=folder).train(STAGES)
    return folder


@pytest.mark.long
def test_an_extended_run_has_the_bits_of_a_long_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also saved less often and followed elsewhere, which is no other run either: what was before is told there."""
    extended, straight = tmp_path / "extended", tmp_path / "straight"
    shutil.copytree(finished, extended, symlinks=True)
    long = short("rl.max_steps=4", "rl.save_every=3", 'output.trackers=["tensorboard", "trackio"]')
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    summary = Trainer(long, output_dir=extended).train(STAGES, resume=True)
    undisturbed = Trainer(long, output_dir=straight).train(STAGES)
    assert digests(extended) == digests(straight)
    assert digests(extended) != digests(finished)
    assert records(extended) == records(straight)
    assert summary["final_accuracy"] == undisturbed["final_accuracy"]
    assert load_config(extended / "config.toml") == long
    assert "rl: 4 steps in place of 2" in (extended / "console.log").read_text()
    assert Trainer(long, output_dir=extended).train(STAGES, resume=True) == summary, "it is finished again"

    (name,) = json.loads((extended / "trackers.json").read_text()).values()
    logs = SQLiteStorage.get_logs("carft-fast", name)
    for stage, kind, figure in (("sft", "train", "loss"), ("rl", "train", "reward"), ("rl", "eval", "accuracy")):
        told = [(log["step"], log[key]) for log in logs if (key := f"{stage}/{kind}/{figure}") in log]
        assert told == [(r["step"], r[figure]) for r in records(extended, kind) if r["stage"] == stage]
    assert {"samples/rl", "samples/rl-eval", "report"} <= {key for log in logs for key in log}


def test_a_schedule_that_ends_says_what_more_steps_do_to_it(tmp_path: Path) -> None:
    """By hand: over 2 steps, linear to 0, the second has 0; over 5 the third has half of the peak."""
    schedule = ('sft.lr_schedule="linear"', "sft.warmup_steps=0", "sft.lr=0.01")
    folder = tmp_path / "run"
    Trainer(short(*schedule), output_dir=folder).train("sft")
    Trainer(short(*schedule, "sft.max_steps=5"), output_dir=folder).train("sft", resume=True)
    assert [r["lr"] for r in records(folder, "train")] == pytest.approx([0.01, 0, 0.005, 0.0025, 0])
    said = (folder / "console.log").read_text()
    assert "step 2 was planned with lr 0, step 3 has 0.005" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("rl.max_steps=1", "1 steps of rl (rl.max_steps, rl.epochs): the run in {} has 2; allowed are as many or more"),
        ("sft.max_steps=3", "3 steps of sft (sft.max_steps, sft.epochs): the SFT of the run in {} has ended after 2"),
        ("rl.lr=0.5", "the config differs from that of the run in {}:\n  rl.lr: 0.0002 -> 0.5"),
        ("rl.batch_size=24", "rl.batch_size: 12 -> 24"),
        ("output.keep_last=3", "output.keep_last: 2 -> 3"),
    ],
)
def test_what_would_be_another_run_is_refused(finished: Path, change: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        check_run_folder(finished, short("rl.max_steps=4", change), STAGES, resume=True)
    assert said.format(finished) in str(error.value)


def test_a_stage_that_was_ended_stays_ended(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, symlinks=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rl", "kind": "guard", "step": 2, "action": "stop", "cause": "enough", "seconds": {}}\n')
    with pytest.raises(InputError, match="was ended at step 2, see the guard record"):
        check_run_folder(folder, short("rl.max_steps=4"), STAGES, resume=True)


def test_a_checkpoint_beyond_the_runs_end_is_foreign(finished: Path, tmp_path: Path) -> None:
    folder, config = tmp_path / "run", tmp_path / "run" / "config.toml"
    shutil.copytree(finished, folder, symlinks=True)
    config.write_text(config.read_text().replace("max_steps = 2", "max_steps = 1"))
    with pytest.raises(InputError, match="rl-000002 is whole but not this run's: it has 2 steps, the run's rl 1"):
        check_run_folder(folder, short("sft.max_steps=1", "rl.max_steps=1"), STAGES, resume=True)
