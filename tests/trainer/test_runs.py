"""Runs through `Trainer`: the command line's run again, with rows, rewards, engines and callbacks of the caller."""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers

from carft_fast import EngineError, InputError, Rollout, SamplingParams, Stopped, Trainer, load_config
from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config import Config
from carft_fast.core.durable import find_damage
from carft_fast.data.synthetic import build_tokenizer, make_task
from carft_fast.rollout.hf import HFEngine

from ..conftest import TINY_RUN
from .conftest import digests, records

ROOT = Path(__file__).resolve().parents[2]


def tiny(*more: str) -> Config:
    return load_config(QUICKSTART_CONFIG, overrides=[*TINY_RUN, *more])


def as_row(example: Any) -> dict[str, Any]:
    """With names of its own, for data.fields."""
    return {"id": example.item_id, "q": example.question, "why": list(example.cots), "a": example.answer}


FIELDS = 'data.fields={item_id="id", question="q", cot="why", answer="a"}'


class Watch:
    """Keeps what it is told, and how every checkpoint was when it was told of it."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.evaluations: list[Any] = []
        self.checkpoints: list[tuple[str, str | None]] = []
        self.summaries: list[Any] = []

    def on_step(self, record: Any) -> None:
        self.steps.append(record)

    def on_evaluate(self, record: Any) -> None:
        self.evaluations.append(record)

    def on_checkpoint(self, path: Path) -> None:
        self.checkpoints.append((path.name, find_damage(path)))

    def on_end(self, summary: Any) -> None:
        self.summaries.append(summary)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, dict[str, Any], Watch]:
    """The same rows as Python objects, checkpoints written beside the training, callbacks."""
    train, held_out = make_task(0)
    watch = Watch()
    trainer = Trainer(
        tiny(FIELDS, "output.async_save=true"),
        train=list(map(as_row, train)),
        eval=held_out,
        callbacks=[watch],
        output_dir=tmp_path_factory.mktemp("watched") / "run",
    )
    return trainer, trainer.train(), watch


def test_rows_of_python_give_the_run_of_the_command_line(
    watched: tuple[Trainer, dict[str, Any], Watch], by_command: Path
) -> None:
    trainer, summary, _ = watched
    assert records(trainer.output_dir) == records(by_command)
    assert digests(trainer.output_dir) == digests(by_command)
    expected = json.loads((by_command / "summary.json").read_text())
    for name in ("method", "initial_accuracy", "sft_accuracy", "final_accuracy", "completion_tokens", "example"):
        assert summary[name] == expected[name], name
    saved = load_config(trainer.output_dir / "config.toml")
    assert (saved.data.train, saved.data.eval) == ("", "")
    assert "the rows given as train: 300 of 300 rows used" in (trainer.output_dir / "console.log").read_text()


def test_callbacks_are_told_what_is_on_disk(watched: tuple[Trainer, dict[str, Any], Watch]) -> None:
    trainer, summary, watch = watched
    lines = map(json.loads, (trainer.output_dir / "metrics.jsonl").read_text().splitlines())
    written = list(lines)
    assert watch.steps == [r for r in written if r["kind"] == "train"]
    assert watch.evaluations == [r for r in written if r["kind"] == "eval"]
    assert watch.checkpoints == [
        (name, None)
        for name in ("sft-000002", "sft-000004", "sft-000006", *(f"rl-{step:06d}" for step in (1, 2, 3, 4)))
    ]
    assert watch.summaries == [summary]


def test_evaluate_and_save_take_the_trained_model(
    watched: tuple[Trainer, dict[str, Any], Watch], by_command: Path, tmp_path: Path
) -> None:
    trainer, summary, watch = watched
    figures = trainer.evaluate()
    assert figures == {k: v for k, v in watch.evaluations[-1].items() if k in figures}
    assert figures["accuracy"] == summary["final_accuracy"]
    again = Trainer(tiny(), output_dir=by_command)  # of a run that is finished
    again.save(tmp_path / "model")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for name in ("model", "carft_heads"):
        saved, trained = (f / f"{name}.safetensors" for f in (tmp_path / "model", by_command / "model"))
        assert saved.read_bytes() == trained.read_bytes()
    with pytest.raises(InputError, match="not empty"):
        again.save(tmp_path / "model")
    fresh = Trainer(tiny("data.eval_rows=4"), output_dir=tmp_path / "none")
    with pytest.raises(InputError, match="no finished run"):
        fresh.save(tmp_path / "other")
    assert fresh.evaluate()["accuracy"] == fresh.evaluate("synthetic")["accuracy"]
    assert not (tmp_path / "none").exists()


def test_a_thread_beside_the_main_one_and_a_second_trainer(by_command: Path, tmp_path: Path) -> None:
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            Trainer(tiny(), output_dir=tmp_path / "run").train()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
    assert records(tmp_path / "run") == records(by_command)
    assert digests(tmp_path / "run") == digests(by_command)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers


class At:
    """Does something at an event of the RL stage's step."""

    def __init__(self, step: int, action: Callable[[], None], event: str = "on_step") -> None:
        def method(value: Any) -> None:
            at = value if isinstance(value, dict) else {"stage": value.name[:2], "step": int(value.name[-6:])}
            if (at["stage"], at["step"]) == ("rl", step):
                action()

        setattr(self, event, method)


@pytest.mark.parametrize(("event", "step"), [("on_step", 3), ("on_evaluate", 2), ("on_checkpoint", 1)])
def test_a_callback_stops_the_stage(event: str, step: int, by_command: Path, tmp_path: Path) -> None:
    trainer = Trainer(
        load_config(by_command / "config.toml", overrides={"model.path": by_command / "sft"}),
        callbacks=[At(step, lambda: trainer.stop("seen enough"), event)],
        output_dir=tmp_path / "run",
    )
    summary = trainer.train("rl")
    expected = [r for r in records(by_command, "train") if r["stage"] == "rl" and r["step"] <= step]
    assert records(tmp_path / "run", "train") == expected
    (guard,) = records(tmp_path / "run", "guard")
    assert guard == {"stage": "rl", "kind": "guard", "step": step, "action": "stop", "cause": "seen enough"}
    last = records(tmp_path / "run", "eval")[-1]
    assert (last["step"], last["accuracy"]) == (step, summary["final_accuracy"]), "the end is evaluated"
    assert (tmp_path / "run" / "checkpoints" / f"rl-{step:06d}").is_dir()

    # killed before the model was exported, then gone on with: it stays stopped
    before, model = records(tmp_path / "run"), (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "model").rename(tmp_path / "gone")
    Trainer(trainer.config, output_dir=tmp_path / "run").train("rl", resume=True)
    assert records(tmp_path / "run") == before
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == model


def test_what_a_callback_raises_ends_a_run_that_goes_on(by_command: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError("in a callback")

    trainer = Trainer(tiny(), callbacks=[At(3, fail)], output_dir=tmp_path / "run")
    with pytest.raises(ZeroDivisionError, match="in a callback"):
        trainer.train()
    assert records(tmp_path / "run", "train")[-1]["step"] == 3
    with pytest.raises(InputError, match="no training is under way"):
        trainer.stop("too late")
    Trainer(tiny(), output_dir=tmp_path / "run").train(resume=True)
    assert records(tmp_path / "run") == records(by_command)
    assert digests(tmp_path / "run") == digests(by_command)


def test_a_signal_saves_and_leaves_the_handlers_as_they_were(by_command: Path, tmp_path: Path) -> None:
    def mine(_signum: int, _frame: object) -> None:
        raise AssertionError("not during training")

    before = signal.signal(signal.SIGTERM, mine)
    try:
        watch = Watch()
        callbacks = [At(3, lambda: os.kill(os.getpid(), signal.SIGTERM)), watch]
        trainer = Trainer(tiny("rl.save_every=100"), callbacks=callbacks, output_dir=tmp_path / "run")
        with pytest.raises(Stopped, match="SIGTERM"):
            trainer.train()
        assert signal.getsignal(signal.SIGTERM) is mine
        assert watch.checkpoints[-1] == ("rl-000003", None)
    finally:
        signal.signal(signal.SIGTERM, before)
    trainer.train(resume=True)
    assert records(tmp_path / "run") == records(by_command)
    assert digests(tmp_path / "run") == digests(by_command)


class Scripted:
    """Answers the n-th prompt of a call with n % 4 + 1 words."""

    def __init__(self) -> None:
        tokenizer = build_tokenizer()
        self.word, self.eos = tokenizer.convert_tokens_to_ids("Ada"), tokenizer.eos_token_id
        self.version = 0
        self.sampled: list[list[int]] = []
        self.closed = False

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, on_progress: Any = None
    ) -> list[Rollout]:
        found = [[self.word] * (n % 4 + 1) + [self.eos] for n in range(len(prompts) * sampling.samples_per_prompt)]
        self.sampled = found
        return [Rollout(ids, [-1.0] * len(ids), "stop", self.version) for ids in found]

    def sync(self, model: Any) -> int:
        self.version += 1
        return self.version

    def close(self) -> None:
        self.closed = True


class Stale:
    """Takes weights over once, and says at every sync that it has them."""

    version = 0

    def sync(self, model: Any) -> int:
        if not self.version:
            self.model = copy.deepcopy(model)
            self.engine = HFEngine(self.model, build_tokenizer(), batch_size=64)
        self.version = self.engine.version = self.version + 1
        return self.version

    def generate(self, *arguments: Any, **options: Any) -> list[Rollout]:
        return self.engine.generate(*arguments, **options)

    def close(self) -> None: ...


def test_an_engine_that_keeps_old_weights_is_found_after_the_first_step(tmp_path: Path) -> None:
    trainer = Trainer(tiny("rl.lr=1e-2", "rl.warmup_steps=0"), engine=Stale(), output_dir=tmp_path / "run")
    with pytest.raises(EngineError, match=r"trainer and sampler disagree"):
        trainer.train("rl")
    assert not [r for r in records(tmp_path / "run") if r["kind"] == "train"]
    with pytest.raises(InputError, match=r"is not finished: call train\(resume=True\), or name a model"):
        trainer.evaluate()


class Spoiler:
    """Edits what it is told."""

    def on_step(self, record: dict[str, Any]) -> None:
        record.clear()

    def on_evaluate(self, record: dict[str, Any]) -> None:
        record["accuracy"] = "high"


def test_a_callback_that_edits_its_record_changes_nothing(tmp_path: Path, by_command: Path) -> None:
    Trainer(tiny(), callbacks=[Spoiler()], output_dir=tmp_path / "run").train()
    assert records(tmp_path / "run") == records(by_command)


def test_own_engine_own_reward_and_a_column_of_the_rows(tmp_path: Path) -> None:
    train, held_out = make_task(0)
    rows = [{**as_row(example), "weight": n} for n, example in enumerate(train[:24])]
    seen: dict[str, int] = {}

    def words_times_weight(completions: list[str], examples: list[Any]) -> list[float]:
        assert all(set(example.extra) <= {"weight"} for example in examples)
        seen.update({example.item_id: example.extra.get("weight", -1) for example in examples})
        pairs = zip(completions, examples, strict=True)
        return [text.count("Ada") * example.extra.get("weight", 0) / 100 for text, example in pairs]

    engine = Scripted()
    options = [FIELDS, "rl.max_steps=1", "rollout.probe_tolerance=100"]
    options += ["output.samples_per_step=12", "rl.whiten_advantages=false"]
    arguments: dict[str, Any] = {"eval": held_out, "reward": words_times_weight, "engine": engine}
    trainer = Trainer(tiny(*options), train=rows, output_dir=tmp_path / "run", **arguments)
    trainer.train("rl")
    written = [json.loads(x) for x in (tmp_path / "run" / "samples" / "rl-000001.jsonl").read_text().splitlines()]
    number = {example.item_id: n for n, example in enumerate(train)}
    assert [row["completion"] for row in written] == ["Ada" * (n % 4 + 1) for n in range(12)]
    expected = [(n % 4 + 1) * number[row["item_id"]] / 100 for n, row in enumerate(written)]
    assert [row["reward"] for row in written] == pytest.approx(expected)
    (record,) = records(tmp_path / "run", "train")
    assert record["reward"] == pytest.approx(sum(expected) / 12)
    assert record["completion_tokens"] == sum(n % 4 + 2 for n in range(12))
    assert engine.version == 2, "the weights before the step and after it"
    assert not engine.closed
    assert {seen[row["item_id"]] for row in written} <= set(range(24))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["engine"].endswith("test_runs:Scripted")
    assert trainer.config.reward.fn.endswith("words_times_weight")

    # the column is part of what --resume has to find again
    (tmp_path / "run" / "summary.json").unlink()
    changed = [row | {"weight": 0} for row in rows]
    other = Trainer(tiny(*options), train=changed, output_dir=tmp_path / "run", **arguments)
    with pytest.raises(InputError, match=r"data\.train has changed .* not the same"):
        other.train("rl", resume=True)
    trainer.train("rl", resume=True)


def test_plan_is_what_a_dry_run_shows(by_command: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from carft_fast.cli import app

    words = ["quickstart", "--config", str(by_command / "config.toml"), "--dry-run", "--output-dir", "nowhere"]
    app(words, standalone_mode=False)
    shown = capsys.readouterr().out
    from rich.console import Console

    rich = Console(highlight=False, soft_wrap=True)
    rich.print(Trainer(load_config(by_command / "config.toml"), output_dir="nowhere").plan())
    planned = capsys.readouterr().out
    assert planned.strip()
    assert planned in shown
    assert not Path("nowhere").exists()


TWO_PROCESSES = """
import os, sys
from carft_fast import Trainer, load_config
from carft_fast.core import leave

config = load_config(sys.argv[1], overrides={"data.eval_rows": 4})
say = lambda text: print(f"rank {os.environ['RANK']}: {text}", flush=True)

class Stops:
    def on_step(self, record):
        say(f"told of {record['step']}")
        trainer.stop("enough")

class Fails:
    def on_step(self, record):
        raise ZeroDivisionError("in a callback")

trainer = Trainer(config, callbacks=[Stops()], output_dir="stopped")
say(f"done {trainer.train('sft')['sft_accuracy']}")
trainer = Trainer(config, callbacks=[Fails()], output_dir="failed")
try:
    trainer.train("sft")
except Exception as error:
    say(f"caught {error!r}")
leave()
"""


@pytest.mark.long
def test_two_processes_agree_on_a_stop_and_on_a_failure(by_command: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    found = subprocess.run(
        [*command, str(by_command / "config.toml")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    told = [line for line in found.stdout.splitlines() if "told" in line]
    assert told == ["rank 0: told of 1"], "callbacks run on the main process"
    for rank in (0, 1):
        assert f"rank {rank}: done " in found.stdout
        assert f"rank {rank}: caught ZeroDivisionError('in a callback')" in found.stdout
    assert [r["step"] for r in records(tmp_path / "stopped", "train")] == [1]
    assert records(tmp_path / "stopped", "guard")[0]["cause"] == "enough"


def test_examples_keep_what_they_were_given() -> None:
    """Rows of all three kinds, read alike."""
    import datasets

    from carft_fast.data.load import load_set

    rows = [
        {"q": "1 + 1?", "why": "add", "a": 2, "tests": ["x"]},
        {"q": "1 + 1?", "why": "count", "a": "2", "tests": ["y"]},
        {"q": "", "why": "add", "a": 2, "tests": []},
    ]
    config = load_config(
        overrides={"data.fields": {"question": "q", "cot": "why", "answer": "a"}, "data.merge_questions": True}
    )
    examples, report = load_set(config, "train", rows)
    assert [(e.cots, e.answer, e.extra) for e in examples] == [(("add", "count"), "2", {"tests": ["x"]})]
    assert (report.rows_read, report.rows_used, report.rows_merged) == (3, 1, 1)
    assert report.rejected == {'no question (field "q")': 1}
    as_text = [row | {"a": str(row["a"])} for row in rows]
    assert load_set(config, "train", datasets.Dataset.from_list(as_text))[0] == examples
    assert load_set(config, "train", examples)[0] == examples
    assert load_set(config, "train", [dataclasses.replace(examples[0], item_id="")])[0] == examples
