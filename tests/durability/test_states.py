"""What a kill leaves of a run's folder at every change of a name in it, against the table of docs/durability.md."""

import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from carft_fast.config.toml import load_config, replaced
from carft_fast.core.console import Console
from carft_fast.core.durable import find_damage, lock_holder, write_folder, write_text
from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.load import load_model
from carft_fast.training.checkpoint import CheckpointStore, made_by
from carft_fast.training.optim import build_optimizer
from carft_fast.training.pipeline import prepare
from carft_fast.training.run import Run, check_run_folder

from ..training.runs import tiny_config

DOCUMENT = Path(__file__).parents[2] / "docs" / "durability.md"
EXTENDED = "| killed while | unfinished | checkpoints | `best` | `model/` | `summary.json` | steps by `config.toml` |"
HEADER = "| killed while | unfinished | checkpoints | `best` | `model/` | `summary.json` | what goes on |"
CHANGES = ("os.rename", "os.symlink", "os.mkdir", "os.rmdir", "os.remove")
FILES = ("manifest.json", "trainer_state.json", "run.lock", "metrics.jsonl", ".writing-summary.json")
"""Of those that are opened to write, the moments to die at; others within an unfinished folder look alike."""
STAGES = ("rl",)
FIGURES = '{"method": "carft", "seed": 0}\n'


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, tiny_run: list[str]) -> "Scene":
    return Scene(tmp_path_factory.mktemp("states") / "run", tiny_run)


class Scene:
    """A run that is checked and has not begun, and a model to save: processes are forked from here."""

    def __init__(self, folder: Path, tiny_run: list[str]) -> None:
        self.folder = folder
        self.config = tiny_config(tiny_run, "rl.max_steps=3")
        self.run: Run = prepare(self.config, folder, Console(), stages=STAGES)
        self.model: CarftModel = load_model(self.config, "synthetic", torch.device("cpu"), heads=True)
        self.optimizer = build_optimizer(self.model, self.config.rl)
        self.model.save(folder.parent / "imported")  # what a first save imports, the forks have

    def act(self, *, resume: bool, steps: int = 3) -> None:
        """What the loop of a stage does to the folder: `steps` steps, then the model, then the figures."""
        run, store = self.run, self.run.store
        with run.opened(STAGES, resume=resume):
            _, done = store.latest("rl") or (None, 0)
            run.metrics.rewind("rl", done)
            for step in range(done, steps):
                run.metrics.log("rl", "train", step + 1, {"loss": 1.0}, {})
                self.save(step + 1)
            if done == steps:
                self.save(steps)  # the loop settles what it finds at its first step
            if not store.has_model(self.folder / "model"):
                write_folder(self.folder / "model", self.model.save, made_by(self.config, "rl", steps))
            write_text(self.folder / "summary.json", FIGURES)

    def plan(self, steps: int) -> "Scene":
        """The same run, to have so many steps."""
        self.config = replaced(self.config, {"rl.max_steps": steps})
        self.run.config, self.run.store._config = self.config, self.config
        self.run.metrics.records = []
        return self

    def save(self, step: int) -> None:
        best, rest = step != 2, {"model_path": "synthetic", "seed": self.config.seed}
        self.run.store.save("rl", step, self.model, self.run.tokenizer, self.optimizer, best=best, **rest)

    def live(self, *, resume: bool, dies_at: int | None, steps: int = 3) -> bool:
        """Act in a fork, which is killed at that change; whether it was."""
        child = os.fork()
        if child == 0:
            try:
                if dies_at is not None:
                    die_at(dies_at, str(self.folder))
                self.act(resume=resume, steps=steps)
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(70)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        return code != 0


def die_at(number: int, folder: str) -> None:
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in (*CHANGES, "open") or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        if event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR) and os.path.basename(path) in FILES):
            return
        if str(path).startswith(folder) and "tensorboard" not in str(path):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def documented(header: str = HEADER) -> list[tuple[str, ...]]:
    """The rows of the table without their first cells, in order."""
    lines = DOCUMENT.read_text(encoding="utf-8").split(header)[1].splitlines()[2:]
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in lines[: lines.index("")]]
    return [tuple(cell.strip("`") for cell in row[1:]) for row in rows]


def found(folder: Path) -> tuple[str, ...]:
    """The same cells, of what is on disk."""
    checkpoints = sorted((folder / "checkpoints").glob("rl-*"))
    damaged = [path for path in (*checkpoints, folder / "model") if path.is_dir() and find_damage(path)]
    assert damaged == [], "a kill left a damaged folder in place"
    steps = [str(int(path.name[3:])) for path in checkpoints]
    best = folder / "checkpoints" / "best"
    resumes = (folder / "config.toml").is_file()
    finished = (folder / "summary.json").is_file()
    if not resumes:
        goes_on = "a new run"
    elif finished:
        goes_on = "nothing"
    elif (folder / "model").is_dir():
        goes_on = "the figures"
    else:
        goes_on = f"step {steps[-1]}" if steps else "step 0"
    return (
        ", ".join(sorted(path.name for path in folder.rglob(".writing-*"))),
        ", ".join(steps),
        str(int(os.readlink(best)[3:])) if best.is_symlink() else "",
        "whole" if (folder / "model").is_dir() else "",
        "there" if finished else "",
        goes_on,
    )


def outcome(folder: Path) -> dict[str, bytes]:
    """All that a run leaves but its times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("console.log", "run.lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if "tensorboard" not in path.parts}


def test_every_state_is_in_the_table_and_goes_on_as_it_says(scene: Scene) -> None:
    folder, rows = scene.folder, documented()
    assert not scene.live(resume=False, dies_at=None)
    undisturbed, seen = outcome(folder), list[tuple[str, ...]]()
    for number in range(1, 1000):
        shutil.rmtree(folder)
        if not scene.live(resume=False, dies_at=number):
            break
        folder.mkdir(exist_ok=True)  # the first kill comes before it
        state = found(folder)
        assert state in rows, f"after kill {number}: {state}"
        seen.append(state)
        assert lock_holder(folder) is None
        resume = state[-1] != "a new run"
        check_run_folder(folder, scene.config, STAGES, resume=resume)
        if state[-1].startswith("step"):
            store = CheckpointStore(folder / "checkpoints", scene.config, pytest.fail)
            step = int(state[-1].removeprefix("step "))
            assert (store.latest("rl") or (None, 0))[1] == step
            best = store.best("rl")
            assert (best.name if best else "") == (f"rl-{int(state[2]):06d}" if state[2] else "")
        if state[-1] != "nothing":
            assert not scene.live(resume=resume, dies_at=None)
        assert outcome(folder) == undisturbed
    assert {*seen, found(folder)} == set(rows), "the table has a state that no kill leaves"


def test_a_finished_run_that_gets_more_steps_is_never_without_a_way_on(scene: Scene) -> None:
    """Killed at every change of a name while it is opened again, it goes on with the steps it had, and with more."""
    folder, rows = scene.folder, documented(EXTENDED)
    shutil.rmtree(folder, ignore_errors=True)
    assert not scene.plan(3).live(resume=False, dies_at=None)
    finished = folder.with_name("finished")
    shutil.copytree(folder, finished, symlinks=True)
    short = outcome(folder)
    assert not scene.plan(4).live(resume=True, dies_at=None, steps=4)
    long, seen = outcome(folder), list[tuple[str, ...]]()
    for number in range(1, 1000):
        shutil.rmtree(folder)
        shutil.copytree(finished, folder, symlinks=True)
        assert scene.plan(4).live(resume=True, dies_at=number, steps=4)
        steps = load_config(str(folder / "config.toml")).rl.max_steps
        state = (*found(folder)[:-1], str(steps))
        assert state in rows, f"after kill {number}: {state}"
        seen.append(state)
        killed = folder.with_name("killed")
        shutil.copytree(folder, killed, symlinks=True)
        assert not scene.plan(4).live(resume=True, dies_at=None, steps=4)
        assert outcome(folder) == long
        shutil.rmtree(folder)
        killed.rename(folder)
        if steps == 4:  # from here on it is an ordinary run of four steps
            break
        assert not scene.plan(3).live(resume=True, dies_at=None)
        assert outcome(folder) == short
    assert set(seen) == set(rows), "the table has a state that no kill leaves"
