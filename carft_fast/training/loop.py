"""The loop around the steps of a stage: what happens between them, how many there are, which rows they take."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from carft_fast.config import SftConfig, StageConfig
from carft_fast.core import Stopped, TrainingError, derive_seed, epoch_rows, on_main
from carft_fast.data import EncodedExample
from carft_fast.models import CarftModel, load_model
from carft_fast.rollout import RolloutEngine
from carft_fast.training.checkpoint import has_sharded
from carft_fast.training.guard import find_collapse, rollbacks, stopped_at
from carft_fast.training.parallel import Learner, build_learner, strategy
from carft_fast.training.run import Run


class StageLoop(AbstractContextManager["StageLoop"]):
    """The steps of one stage, with what happens between steps: evaluation, checkpoints, progress, stop requests.

    Use as `with StageLoop(...) as loop: for step in loop: ...`. It owns the model and its optimizer, which it loads
    from the stage's newest checkpoint or, without one, from `model_path`. A stop request saves and ends the loop.
    """

    def __init__(self, run: Run, stage: str, config: StageConfig, model_path: str, total_steps: int) -> None:
        self._run, self._stage, self._config, self.total_steps = run, stage, config, total_steps
        self._model_path = model_path
        self._current_engine: Callable[[], RolloutEngine] | None = None
        self._more_figures: Callable[[], dict[str, float]] = dict
        checkpoint, self._step = run.store.latest(stage) or (None, 0)
        self._last_saved = checkpoint
        self._unannounced: list[Path] = []
        """Checkpoints that callbacks do not know of yet; with output.async_save they may still be written."""
        with run.timer("load"):
            self.learner: Learner = build_learner(run.config, self._load(checkpoint), config, run.device)
            if checkpoint is not None:
                self.learner.load(checkpoint)
        run.metrics.rewind(stage, self._step)
        self._ends_at = stopped_at(run.metrics.find(stage, "guard"))
        if checkpoint is not None:
            run.console.log(f"{stage}: resumed at step {self._step} of {total_steps} from {checkpoint}")

    def _load(self, trained: Path | None) -> CarftModel:
        """The learner divides it where the device gets only a share, and loads what is sharded on disk."""
        run = self._run
        divided = strategy(run.config) in ("fsdp2", "zero3")
        whole = None if trained is not None and has_sharded(trained) else trained
        return load_model(run.config, self._model_path, run.device, heads=True, trained=whole, divided=divided)

    def evaluate_with(
        self, current_engine: Callable[[], RolloutEngine], more_figures: Callable[[], dict[str, float]] = dict
    ) -> None:
        """`current_engine` returns the sampler with the present weights, `more_figures` what an evaluation's record has
        beside its own; they are called for every evaluation."""
        self._current_engine, self._more_figures = current_engine, more_figures

    def __iter__(self) -> Iterator[int]:
        run = self._run
        with run.console.track(self._stage, self.total_steps, "steps", done=self._step) as tracker:
            while True:
                best = self._evaluate_if_due()
                if best or self._due(self._config.save_every):
                    self._save(best=best)
                run.store.check()
                if self._announce_checkpoints():
                    continue  # a callback ended the stage: this step is evaluated and saved as its last
                run.stop.check_together()
                if self._is_last:
                    return
                yield self._step
                self._step += 1
                run.stop.deferred = False  # see begin_update
                tracker.advance(note=self._note())
                self._tell("on_step", run.metrics.find(self._stage, "train", self._step)[-1])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = isinstance(error, Stopped)
        if error is not None and not stopped:
            return
        if stopped:
            self._save()
        self._run.store.wait()
        self._announce_checkpoints()
        if stopped:
            self._run.console.log(
                f"stopped by {error}: step {self._step} saved to {self._last_saved}; go on with --resume"
            )

    def begin_update(self) -> None:
        """Defer stop requests to the end of the step: a checkpoint in between would repeat the update."""
        self._run.stop.deferred = True

    @property
    def _is_last(self) -> bool:
        """Whether the stage ends with the present step."""
        return self._step >= self.total_steps or self._step == self._ends_at

    def _tell(self, event: str, value: Any) -> bool:
        """Call the callbacks; True if one asked to end the stage, which then ends with this step."""
        run = self._run
        reason = run.tell(event, value)
        if reason is None or self._ends_at is not None:
            return False
        self._ends_at = self._step
        run.metrics.log(self._stage, "guard", self._step, {"action": "stop", "cause": reason}, {})
        run.console.log(f"{self._stage} step {self._step}: stop, {reason}")
        return True

    def _announce_checkpoints(self) -> bool:
        """Call on_checkpoint for those that are whole on disk by now; True if a callback asked to end the stage."""
        ends = False
        while self._unannounced and bool(on_main(self._unannounced[0].is_dir)):
            ends |= self._tell("on_checkpoint", self._unannounced.pop(0))
        return ends

    def report_skipped(self, rows: list[dict[str, Any]]) -> None:
        """After the record of a step whose loss or gradient was not finite: write its rows to samples/.

        Raises TrainingError after `max_skipped_steps` such steps in a row.
        """
        run, done, most = self._run, self._step + 1, self._config.max_skipped_steps
        name = f"{self._stage}-nonfinite-{done:06d}"
        run.write_samples(name, rows)
        run.console.log(
            f"{self._stage} step {done}: a loss or gradient was not finite: not applied; its rows: {name}.jsonl"
        )
        recent = run.metrics.find(self._stage, "train")[-most:]
        if len(recent) == most and all(record["skipped_updates"] for record in recent):
            raise TrainingError(
                f"{self._stage} step {done}: a loss or gradient was not finite in each of the last {most} steps "
                f"({self._stage}.max_skipped_steps). The rows are in "
                f"{run.folder / 'samples'}/{self._stage}-nonfinite-*.jsonl; "
                "a lower learning rate, float32 or shorter rows may help. --resume goes on from the last checkpoint"
            )

    def _best_checkpoint(self) -> Path | None:
        """None where no evaluated step was better than the stage's start."""
        accuracy = {record["step"]: record["accuracy"] for record in self._run.metrics.find(self._stage, "eval")}
        start = accuracy.pop(0)
        return self._run.store.best(self._stage) if max(accuracy.values(), default=-1.0) > start else None

    def _due(self, every: int | None) -> bool:
        return self._step > 0 and (self._is_last or bool(every and self._step % every == 0))

    @property
    def lr_scale(self) -> float:
        """Factor of the scheduled learning rate: lower after every rollback."""
        return self._run.config.guard.lr_factor ** rollbacks(self._run.metrics.records)

    def guard_against_collapse(self) -> bool:
        """After a step's record: end the stage or go back if the run has collapsed; True if the weights changed.

        Going back restores weights and optimizer of the best evaluated checkpoint, or of the stage's start where none
        was better. The count of steps goes on.
        """
        run, config, done = self._run, self._run.config.guard, self._step + 1
        cause = None if config.action == "off" else find_collapse(run.metrics.records, config)
        if cause is None:
            return False
        stop = config.action == "stop" or rollbacks(run.metrics.records) >= config.max_rollbacks
        best = self._best_checkpoint()
        event = {"action": "stop" if stop else "rollback", "cause": cause}
        if stop:
            self._ends_at = done
        else:
            event["to"] = str(best or self._model_path)
            self.learner.replace_weights(self._load(best))
            if best is not None:
                self.learner.load(best)
        run.metrics.log(self._stage, "guard", done, event, {})
        run.console.log(f"{self._stage} step {done}: collapse, {cause}: {event['action']} {event.get('to', '')}")
        return not stop

    def _evaluate_if_due(self) -> bool:
        """True when the step is evaluated and the stage's best so far."""
        run, stage, step = self._run, self._stage, self._step
        if not (step == 0 or self._due(self._config.eval_every)):
            return False
        earlier = [self._merit(record) for record in run.metrics.find(stage, "eval") if 0 < record["step"] < step]
        if not run.metrics.find(stage, "eval", step):  # else a kill fell between checkpoint and best link
            assert self._current_engine is not None
            if step == 0 and (of_sft := run.metrics.find("sft", "eval")):  # the weights SFT ended with
                run.repeat_evaluation(of_sft[-1], stage)
            else:
                run.evaluate(self._current_engine(), stage, step, self._more_figures())
            self._tell("on_evaluate", run.metrics.records[-1])
        record = run.metrics.find(stage, "eval", step)[0]
        return step > 0 and self._merit(record) > max(earlier, default=-math.inf)

    def _merit(self, record: dict[str, Any]) -> float:
        """Of an evaluation; the best checkpoint has the highest."""
        by_loss = isinstance(self._config, SftConfig) and self._config.best_by == "eval_loss"
        return -float(record["eval_loss"]) if by_loss else float(record["accuracy"])

    def _save(self, *, best: bool = False) -> None:
        run = self._run
        with run.timer("checkpoint"):
            path = run.store.save(
                self._stage,
                self._step,
                self.learner.model,
                run.tokenizer,
                self.learner.optimizer,
                whole=self.learner.gather_state(),
                model_path=self._model_path,
                seed=run.config.seed,
                best=best,
            )
        if path != self._last_saved:  # else the step was saved before
            self._last_saved = path
            self._unannounced.append(path)

    def _note(self) -> str:
        record = self._run.metrics.records[-1]
        shown = ("loss", "reward", "train_accuracy")
        return "  ".join(f"{name} {record[name]:.3f}" for name in shown if name in record)


def picked_rows(run: Run, stage: str, count: int, step: int) -> list[EncodedExample]:
    """Training rows of a step: every row once an epoch, in an order of the seed's, with another of its annotations
    first in every epoch."""
    seed = derive_seed(run.config.seed, stage)
    return [
        run.train_rows[row].turn(derive_seed(seed, "annotation", row) + epoch)
        for row, epoch in epoch_rows(len(run.train_rows), count, step, seed)
    ]
