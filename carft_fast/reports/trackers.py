"""Where a run is followed besides its folder: TensorBoard, Weights & Biases, Trackio and MLflow, through accelerate.

A thread of their own talks to them, so no step waits for a server. What goes there is redacted first. One that fails is
left out from then on, with a line; it never ends the run.
"""

import contextlib
import io
import os
import queue
import textwrap
import threading
import urllib.error
import urllib.request
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from carft_fast.config import Config, iter_fields, to_toml
from carft_fast.core import InputError, first_line, read_json_object, redact, visible, visible_json, write_text

CHECK_SECONDS = 10
"""A server that does not answer within this is not reachable."""
FINISH_SECONDS = 60
"""What is not sent so long after the run's end is left."""
IDS_FILE = "trackers.json"

Record = dict[str, Any]
Rows = Sequence[dict[str, Any]]


class _Backend(ABC):
    """One tracker. `start` is called first and in the thread that calls the rest."""

    fresh = True
    """Whether it does not know this run yet."""

    def __init__(self, config: Config, folder: Path, known_as: str | None) -> None:
        # absolute: the process that serves wandb stays in the folder where the first run of this process began
        self.config, self.folder, self.id = config, folder.absolute(), known_as
        self.name = redact(config.output.name)
        self.fresh = known_as is None
        self.tracker: Any = None

    @staticmethod
    @abstractmethod
    def check() -> None:
        """Raise whatever says that it cannot be reached. Starts no run."""

    @abstractmethod
    def start(self) -> str:
        """Returns where the run can be seen, to be told."""

    def log_config(self) -> None:
        self.tracker.store_init_configuration(_flat_config(self.config))

    def log_record(self, record: Record) -> None:
        self.tracker.log(_figures(record, f"{record['stage']}/"), step=record["step"])

    @abstractmethod
    def log_samples(self, name: str, rows: Rows) -> None: ...

    @abstractmethod
    def log_report(self, markdown: str, html: str) -> None: ...

    def finish(self) -> None:
        self.tracker.finish()


class _TensorBoard(_Backend):
    """A writer a stage: steps that run again replace those that the stage had."""

    def __init__(self, config: Config, folder: Path, known_as: str | None) -> None:
        super().__init__(config, folder, known_as)
        self.fresh = not (folder / "tensorboard").is_dir()
        self._of_stage: dict[str, Any] = {}

    @staticmethod
    def check() -> None:
        """A folder of the run's: nothing to reach."""

    def start(self) -> str:
        return ""  # a part of the folder, like its other files

    def _writer(self, stage: str, step: int) -> Any:
        from accelerate.tracking import TensorBoardTracker

        if stage not in self._of_stage:
            tracker = TensorBoardTracker(stage, self.folder / "tensorboard", purge_step=step)
            tracker.start()
            tracker.log({"config": f"```toml\n{redact(to_toml(self.config))}```"}, step=step)
            self._of_stage[stage] = tracker
        return self._of_stage[stage]

    def log_config(self) -> None:
        """Every new writer does."""

    def log_record(self, record: Record) -> None:
        self._writer(record["stage"], record["step"]).log(_figures(record), step=record["step"])

    def log_samples(self, name: str, rows: Rows) -> None:
        kind, _, step = name.rpartition("-")
        text = "\n\n".join(f"```json\n{visible_json(row, indent=1)}\n```" for row in rows)
        self._writer(kind.partition("-")[0], int(step)).log({f"samples/{kind}": text}, step=int(step))

    def log_report(self, markdown: str, html: str) -> None:
        for tracker in list(self._of_stage.values())[-1:]:
            tracker.log({"report": markdown})

    def finish(self) -> None:
        for tracker in self._of_stage.values():
            tracker.finish()


class _Wandb(_Backend):
    @staticmethod
    def check() -> None:
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, timeout=CHECK_SECONDS):
            raise RuntimeError("no API key; set WANDB_API_KEY, or WANDB_MODE=offline")

    def start(self) -> str:
        import wandb
        from accelerate.tracking import WandBTracker

        self.id = self.id or uuid.uuid4().hex[:8]
        # what it would find out by itself has command lines, remotes and other output, none of it redacted
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            finish_timeout=FINISH_SECONDS,
        )
        output = self.config.output
        options = {"name": self.name, "id": self.id, "resume": "allow", "dir": str(self.folder)}
        self.tracker = WandBTracker(output.project, settings=settings, **options)
        self.tracker.start()
        for stage in ("sft", "rl"):  # each counts its own steps, wandb's own only go up
            self.tracker.tracker.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        run = self.tracker.tracker
        return str(self.folder / "wandb") if run.offline else str(run.url)

    def log_record(self, record: Record) -> None:
        stage = record["stage"]
        self.tracker.log(_figures(record, f"{stage}/") | {f"{stage}/step": record["step"]})

    def log_samples(self, name: str, rows: Rows) -> None:
        import wandb

        kind, _, step = name.rpartition("-")
        stage, columns = kind.partition("-")[0], list(rows[0])
        data = [[_cell(row.get(column)) for column in columns] for row in rows]
        self.tracker.log({f"{stage}/samples/{kind}": wandb.Table([*columns], data), f"{stage}/step": int(step)})

    def log_report(self, markdown: str, html: str) -> None:
        import wandb

        self.tracker.log({"report": wandb.Html(html, inject=False)})


class _Trackio(_Backend):
    @staticmethod
    def check() -> None:
        import trackio.utils

        folder = Path(trackio.utils.TRACKIO_DIR)
        parent = next(path for path in (folder, *folder.parents) if path.exists())
        if os.environ.get("TRACKIO_SPACE_ID"):
            import huggingface_hub

            huggingface_hub.HfApi().whoami()
        elif url := os.environ.get("TRACKIO_SERVER_URL"):
            with contextlib.suppress(urllib.error.HTTPError):  # that is an answer
                urllib.request.urlopen(url, timeout=CHECK_SECONDS).close()
        elif not os.access(parent, os.W_OK):
            raise RuntimeError(f"{parent} is not writable; TRACKIO_DIR names another")

    def start(self) -> str:
        import trackio.utils
        from accelerate.tracking import TrackioTracker

        output = self.config.output
        self.id = self.id or f"{self.name}-{uuid.uuid4().hex[:8]}"
        options: dict[str, Any] = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self.tracker = TrackioTracker(output.project, name=self.id, resume="allow", **options)
        self.tracker.start()
        where = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL") or trackio.utils.TRACKIO_DIR
        return f"{self.id} in {where}"

    def log_samples(self, name: str, rows: Rows) -> None:
        import trackio

        kind, _, step = name.rpartition("-")
        columns = list(rows[0])
        data = [[_cell(row.get(column)) for column in columns] for row in rows]
        self.tracker.log({f"samples/{kind}": trackio.Table(columns=columns, data=data)}, step=int(step))

    def log_report(self, markdown: str, html: str) -> None:
        import trackio

        self.tracker.log({"report": trackio.Markdown(markdown)})


class _MLflow(_Backend):
    @staticmethod
    def check() -> None:
        """A store on this machine is made where there is none: mlflow has no other way to tell."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # else a server that is down takes minutes a call
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(CHECK_SECONDS))
        import mlflow

        mlflow.search_experiments(max_results=1)

    def start(self) -> str:
        import mlflow
        from accelerate.tracking import MLflowTracker

        output = self.config.output
        self.tracker = MLflowTracker(output.project, run_id=self.id, run_name=self.name)
        self.tracker.start()
        self.id = self.tracker.tracker.info.run_id
        return f"run {self.id} in {mlflow.get_tracking_uri()}"

    def log_config(self) -> None:
        if self.fresh:  # what mlflow has as a parameter cannot change, and max_steps may
            super().log_config()

    def log_samples(self, name: str, rows: Rows) -> None:
        import mlflow

        columns = {column: [_cell(row.get(column)) for row in rows] for column in rows[0]}
        mlflow.log_table(columns, artifact_file=f"samples/{name}.json")

    def log_report(self, markdown: str, html: str) -> None:
        import mlflow

        for name, text in (("report.md", markdown), ("report.html", html)):
            mlflow.log_text(text, name)


BACKENDS: dict[str, type[_Backend]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
    "mlflow": _MLflow,
}


def check_trackers(config: Config) -> None:
    """Raises InputError for one of output.trackers that is not installed, or does not answer. Starts no run."""
    for name in config.output.trackers:
        seen = f"output.trackers = {visible_json(config.output.trackers)}: {name}"
        if find_spec(name) is None:
            raise InputError(f'{seen} is not installed: leave it out, or pip install ".[{name}]", in the checkout')
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                BACKENDS[name].check()
        except Exception as error:
            reason = textwrap.shorten(first_line(error), 400, placeholder=" ...")
            raise InputError(f"{seen} cannot be reached: leave it out, or fix this: {reason}") from None


class Trackers:
    """Those of output.trackers for one run, which `start` begins or goes on with. None of their errors is raised."""

    def __init__(self, config: Config, folder: Path, log: Callable[[str], None]) -> None:
        self._config, self._folder, self._log = config, folder, log
        self._backends: dict[str, _Backend] = {}
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def start(self, earlier: Sequence[Record]) -> None:
        """`earlier` records of the run go to those that do not know it yet."""
        names = self._config.output.trackers
        if not names:
            return
        from accelerate import PartialState
        from accelerate.utils import clear_environment

        with clear_environment():  # it would join what torchrun has started; one process alone has trackers
            PartialState(cpu=True)  # accelerate's loggers want one
        file = self._folder / IDS_FILE
        ids = read_json_object(file) if file.is_file() else {}
        self._backends = {name: BACKENDS[name](self._config, self._folder, ids.get(name)) for name in names}
        import matplotlib.figure  # noqa: F401  # trackio looks for it while a report may be importing it

        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        self._thread.start()
        self._each(lambda name: self._start(name, earlier))
        self._tasks.join()
        ids |= {name: backend.id for name, backend in self._backends.items() if backend.id}
        if ids:
            write_text(file, visible_json(ids, indent=2) + "\n")

    def _start(self, name: str, earlier: Sequence[Record]) -> None:
        backend = self._backends[name]
        with contextlib.redirect_stdout(io.StringIO()):  # the main thread waits, and prints nothing
            where = backend.start()
        backend.log_config()
        for record in earlier if backend.fresh else ():
            backend.log_record(record)
        if where:
            self._log(f"tracker {name}: {where}")

    def log_record(self, record: Record) -> None:
        if _figures(record):
            self._each(lambda name: self._backends[name].log_record(record))

    def log_samples(self, name: str, samples: Rows) -> None:
        """The first output.samples_per_step of a file of samples."""
        if rows := [
            {k: _redacted(v) for k, v in row.items()} for row in samples[: self._config.output.samples_per_step]
        ]:
            self._each(lambda tracker: self._backends[tracker].log_samples(name, rows))

    def log_report(self) -> None:
        if self._backends:
            texts = [redact((self._folder / name).read_text(encoding="utf-8")) for name in ("report.md", "report.html")]
            self._each(lambda name: self._backends[name].log_report(*texts))

    def close(self) -> None:
        """Waits up to FINISH_SECONDS for what is not sent yet."""
        if self._thread is None:
            return
        self._each(lambda name: self._backends[name].finish())
        self._tasks.put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._log(f"trackers {', '.join(self._backends)}: not all was sent within {FINISH_SECONDS} s; left")
        self._thread = None

    def _each(self, work: Callable[[str], None]) -> None:
        for name in list(self._backends):
            self._tasks.put(partial(self._attempt, name, work))

    def _attempt(self, name: str, work: Callable[[str], None]) -> None:
        if name not in self._backends:
            return
        try:
            work(name)
        except Exception as error:
            del self._backends[name]
            said = textwrap.shorten(str(error) or type(error).__name__, 400, placeholder=" ...")
            self._log(f"tracker {name} failed, and gets nothing more of this run: {said}")

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            self._tasks.task_done()


def _figures(record: Record, prefix: str = "") -> dict[str, float]:
    """The numbers of a record by name: `train/loss`, `train_seconds/update`, `train_reward/<label>`.

    MLflow's file store has a folder for what stands before a slash, so `train/reward` is not one.
    """
    kind, figures = record["kind"], dict[str, float]()
    for name, value in record.items():
        if isinstance(value, int | float) and name != "step":
            group, slash, part = name.partition("/")
            figures[f"{prefix}{kind}_{group}/{part}" if slash else f"{prefix}{kind}/{name}"] = value
    for group in ("seconds", "shares"):
        for phase, value in record.get(group, {}).items():
            figures[f"{prefix}{kind}_{group}/{phase}"] = value
    return figures


def _flat_config(config: Config) -> dict[str, Any]:
    values = {key: value for key, _, value in iter_fields(config)}
    return {k: v if isinstance(v, bool | int | float) else redact(visible(str(v))) for k, v in values.items()}


def _redacted(value: Any) -> Any:
    return visible(redact(value)) if isinstance(value, str) else value


def _cell(value: Any) -> Any:
    """A table's column has one type, or nothing in a row: what is no number is text."""
    return value if value is None or isinstance(value, bool | int | float) else str(value)
