"""The front door: what a run is asked to do, from Python or by the command line, which is its first client.

A room loads what is asked of it at the first use, so `import carft_fast` and `carft-fast --help` answer at once.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carft_fast import core, data, models, reports, training
from carft_fast.config import ANSWER, SYNTHETIC, Config, Overrides, load_method_config, replaced
from carft_fast.core import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from carft_fast.core import Example
    from carft_fast.data import Check
    from carft_fast.plan import Estimate
    from carft_fast.rewards import RewardFunction
    from carft_fast.rollout import RolloutEngine
    from carft_fast.training.run import Run

    StrPath = str | os.PathLike[str]
    Rows = StrPath | Sequence[dict[str, Any] | Example] | Any

STAGES = (("sft",), ("rl",), ("sft", "rl"))
EVENTS = ("on_step", "on_evaluate", "on_checkpoint", "on_end")


def load_config(path: "StrPath | None" = None, *, method: str | None = None, overrides: Overrides = ()) -> Config:
    """The settings of a run: the defaults, then the TOML file, then what `method` fixes, then the overrides.

    `overrides` maps dotted keys to values, `{"rl.max_steps": 20}`, or lists texts, `["rl.max_steps=20"]`. Raises
    InputError, which names the key, the value seen and what is allowed.
    """
    texts = isinstance(overrides, list | tuple) and all(isinstance(text, str) for text in overrides)
    if not (texts or isinstance(overrides, Mapping)):
        raise InputError(f'overrides = {overrides!r}: expected a dict of dotted keys, or a list of "section.key=value"')
    return load_method_config(None if path is None else _text("path", path), overrides, method)[0]


class Trainer:
    """A training run: SFT, RL or both, by one config, in one folder.

    Under `torchrun` or `accelerate launch` every process makes the same Trainer and calls the same methods.
    """

    def __init__(
        self,
        config: Config,
        *,
        train: "Rows | None" = None,
        eval: "Rows | None" = None,
        reward: "RewardFunction | Sequence[RewardFunction | str] | None" = None,
        engine: "RolloutEngine | None" = None,
        callbacks: Sequence[Any] = (),
        output_dir: "StrPath | None" = None,
    ) -> None:
        """Check the arguments; nothing is loaded or written yet. Raises InputError.

        Args:
            config: what `load_config` returned.
            train, eval: in place of data.train, data.eval: a path or Hub id, a list of dicts or of `Example`s, or a
                `datasets.Dataset`. data.fields maps the names of the columns.
            reward: in place of reward.fn: (completions, examples) -> one finite score each, or a list of such
                functions. Scores are taken as they are, so reward.partial becomes "constant".
            engine: samples in place of rollout.engine; whoever made it closes it.
            callbacks: objects with any of on_step(record), on_evaluate(record), on_checkpoint(path), on_end(summary).
                They run on the main process; what they raise ends the run.
            output_dir: the run's folder; `runs/<output.name>` if not given.
        """
        if not isinstance(config, Config):
            raise InputError(f"config is a {type(config).__name__}: expected what load_config returns")
        self._given: dict[str, Any] = {"engine": engine, "callbacks": _checked_callbacks(callbacks)}
        values: dict[str, Any] = {}
        for name, other, source in (("train", "eval", train), ("eval", "train", eval)):
            if source is not None:
                data.check_source(name, source)
                if isinstance(source, str | os.PathLike):
                    values[f"data.{name}"] = os.fspath(source)
                else:
                    values[f"data.{name}"], self._given[name] = "", source
                if name == "train":
                    values["data.mix"] = {}  # the rows given are in its place, too
                if values[f"data.{name}"] != SYNTHETIC and getattr(config.data, other) == SYNTHETIC:
                    values.setdefault(f"data.{other}", "")  # the generated task has both or none
        if reward is not None:
            several = isinstance(reward, list | tuple)
            self._given["reward"] = list(reward) if isinstance(reward, list | tuple) else [reward]
            names = [_reward_name(function, several) for function in self._given["reward"]]
            values["reward.fn"] = names if several else names[0]
            values["reward.partial"] = "constant"  # its scores are taken as they are
        if engine is not None:
            _check_engine(engine)
        self.config = replaced(config, values)
        default = Path("runs") / config.output.name
        self.output_dir = default if output_dir is None else Path(_text("output_dir", output_dir))
        self._run: Run | None = None

    def train(self, stages: Sequence[str] = ("sft", "rl"), resume: bool = False) -> dict[str, Any]:
        """Run the stages; returns the figures of summary.json (docs/runs.md). A finished run returns them at once.

        `resume` continues from the folder's last checkpoint; a finished run continues if the config has more steps than
        before. Raises InputError before anything is written; Stopped after Ctrl-C or SIGTERM, with everything saved;
        EngineError, RewardError and TrainingError where a run cannot continue.
        """
        stages = _checked_stages(stages)
        self._run = run = self._prepare(self.config, self.output_dir, stages, resume=resume)
        try:
            return training.train(run, stages, resume=resume)
        finally:
            self._run = None

    def stop(self, reason: str) -> None:
        """End the stage after its present step. The step is evaluated and saved; a "guard" record has `reason` as its
        cause. For callbacks; raises InputError when no training is under way."""
        if self._run is None:
            raise InputError("stop: no training is under way; call it from a callback while train() runs")
        if not reason or not isinstance(reason, str):
            raise InputError(f"stop: reason = {reason!r}: expected a text that says why")
        self._run.stop_reason = reason

    def plan(self, stages: Sequence[str] = ("sft", "rl"), resume: bool = False) -> "Table":
        """What `train` would do, as a table. Everything is checked, nothing is written, no weights are loaded."""
        stages = _checked_stages(stages)
        run = self._prepare(self.config, self.output_dir, stages, resume=resume, dry_run=True)
        return training.describe_plan(run, stages)

    def evaluate(
        self, model: "StrPath | None" = None, *, output_dir: "StrPath | None" = None, dry_run: bool = False
    ) -> dict[str, Any]:
        """Greedy accuracy with its interval, and maj@k and pass@k with eval.samples; see docs/evaluation.md.

        `model` is a folder or Hub id; when absent the trained one, and model.path before there is one. Completions and
        figures are written to `output_dir` where it is given. `dry_run` prints the plan and returns nothing.
        """
        config, trained = self.config, self._trained()
        if model is None and trained is None and (self.output_dir / "config.toml").is_file():
            raise InputError(
                f"evaluate: the run in {self.output_dir} is not finished: call train(resume=True), or name a model"
            )
        path = str(trained or config.model.path) if model is None else _text("model", model, empty=True)
        if path != config.model.path:
            config = replaced(config, {"model.path": path, "model.revision": None})
        folder = self.output_dir if output_dir is None else Path(_text("output_dir", output_dir))
        run = self._prepare(config, folder, (), write=output_dir is not None, dry_run=dry_run)
        if dry_run:
            core.Console().show(training.describe_plan(run, ()))
            return {}
        return training.evaluate_only(run, write=output_dir is not None).metrics

    def save(self, folder: "StrPath") -> None:
        """Write the trained model, with its heads, as a plain Hugging Face folder.

        Raises InputError before any training, and for a folder that is not empty.
        """
        trained = self._trained()
        if trained is None:
            raise InputError(f"save: {self.output_dir} holds no finished run; call train first")
        target = Path(_text("folder", folder))
        core.on_main(lambda: training.copy_model(trained, target))

    def _trained(self) -> Path | None:
        """The model of the finished run in the folder."""
        finished = (self.output_dir / "summary.json").is_file()
        found = (self.output_dir / name for name in ("model", "sft"))
        return next((path for path in found if finished and path.is_dir()), None)

    def _prepare(self, config: Config, folder: Path, stages: Sequence[str], **options: Any) -> "Run":
        core.join(models.resolve_device(config.model.device).type, config.distributed.timeout_s)
        return training.prepare(config, folder, core.Console(), stages=stages, **self._given, **options)


def compare(
    config: Config | None = None,
    *,
    methods: str | Sequence[str] = (),
    seeds: str | Sequence[int] = (),
    vary: Sequence[str] = (),
    study: "StrPath | None" = None,
    overrides: Overrides = (),
    output_dir: "StrPath | None" = None,
    resume: bool = False,
    dry_run: bool = False,
) -> None:
    """Run several methods, each from the seed's one SFT checkpoint, and write a report; see docs/compare.md.

    `methods` and `seeds` are lists, or texts with commas; the default methods and the config's seed if not given.
    `vary` lists `section.key=value,value`. A `study` is a TOML file in place of `config`, `methods` and `vary`;
    `seeds` may then select some of its seeds, and `overrides` are values on top of its config. Raises InputError.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("compare runs in one process: start it without torchrun or accelerate launch")
    from carft_fast.compare import (
        DEFAULT_METHODS,
        Comparison,
        expand,
        load_study,
        parse_methods,
        parse_seeds,
        parse_vary,
    )

    chosen = parse_seeds(seeds if isinstance(seeds, str) else ",".join(map(str, seeds))) if seeds else []
    judgement = None
    if study is not None:
        if config or methods or vary:
            raise InputError("a study sets config, methods and vary: leave them out")
        found = load_study(Path(study))
        config = load_config(Path(study).parent / found.config, overrides=overrides)
        if unknown := [seed for seed in chosen if seed not in found.seeds]:
            allowed = ", ".join(map(str, found.seeds))
            raise InputError(f"--seeds: {unknown[0]} is no seed of the study; allowed: {allowed}")
        variants, chosen, judgement = found.variants, chosen or found.seeds, found.judgement
    else:
        if config is None or overrides:
            raise InputError("compare: give a config or a study; overrides are allowed with a study only")
        given = methods if isinstance(methods, str) else ",".join(methods)
        names = parse_methods(given) if given else DEFAULT_METHODS
        variants, chosen = expand(names, dict(map(parse_vary, vary)), config), chosen or [config.seed]
    console, folder = core.Console(), Path(output_dir or Path("runs") / f"{config.output.name}-compare")
    comparison = Comparison(
        config, variants, chosen, folder, console, resume=resume, dry_run=dry_run, judgement=judgement
    )
    if dry_run:
        console.show(comparison.plan())
        return
    comparison.run()


def estimate(
    config: Config, *, gpu: str, gpus: int = 1, stages: Sequence[str] = ("sft", "rl")
) -> "tuple[Estimate, Table]":
    """Whether the stages fit on `gpus` GPUs named `gpu`, and what a step takes: figures, and the same as a table.

    A prediction from a step on tensors without data; see docs/plan.md. Reads the model's config, no weights, no data.
    Raises InputError for an unknown GPU, and for a config that cannot run or be planned.
    """
    from carft_fast import plan

    found = plan.estimate(config, gpu=gpu, gpus=gpus, stages=_checked_stages(stages))
    return found, plan.estimate_table(found)


def report(folder: "StrPath") -> Path:
    """Write report.html of a run from what its folder holds, finished or not; returns its path. Raises InputError."""
    return reports.rewrite_page(Path(folder))


def check_data(source: str, config: Config, *, against: str | None = None) -> "Check":
    """Which rows of a file, folder or Hub id can be used as data.train, and what is wrong with the rest; docs/data.md.

    `against` is a test set whose questions should not be in it; data.eval if not given. Lengths are in tokens where
    model.path is set. Loads no model. Raises InputError.
    """
    one_split = Path(source).is_file() or config.data.eval_split == config.data.train_split
    same = config.data.eval == source and one_split
    held_out = None if same or config.data.eval in ("", SYNTHETIC) else config.data.eval
    tokenizer = None
    if config.model.path:
        tokenizer = models.load_tokenizer(config.model)
        data.check_tokenizer(tokenizer)
    return data.check_data(source, config, tokenizer, against or held_out)


def serve(config: Config, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Run a vLLM server for runs with this config; ends the process when it ends. Raises InputError."""
    from carft_fast.rollout.vllm.launch import serve

    serve(config, host, port)


def export(checkpoint: "StrPath", folder: "StrPath", *, push_to: str | None = None, public: bool = False) -> None:
    """Write a checkpoint as a plain Hugging Face folder: LoRA merged, and the adapter alone; shards joined; heads.

    `push_to` "owner/name" also uploads it to the Hub, with a model card; private unless `public`. The token is that of
    HF_TOKEN or `hf auth login`. Raises InputError for a damaged checkpoint, a folder that is not empty, or a Hub that
    cannot be pushed to, before anything is written; TrainingError where the upload fails.
    """
    training.export_checkpoint(Path(checkpoint), Path(folder), push_to=push_to, public=public)


def _text(name: str, value: Any, *, empty: bool = False) -> str:
    """A path as text; `empty` text has a meaning of its own."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not (text or empty):
        raise InputError(f"{name} = {value!r}: expected a path")
    return text


def _checked_stages(stages: Sequence[str]) -> tuple[str, ...]:
    found = (stages,) if isinstance(stages, str) else tuple(stages) if isinstance(stages, list | tuple) else ()
    if found not in STAGES:
        raise InputError(f"stages = {stages!r}: allowed are {', '.join(map(str, STAGES))}")
    return found


def _checked_callbacks(callbacks: Any) -> tuple[Any, ...]:
    if not isinstance(callbacks, list | tuple):
        raise InputError(f"callbacks is a {type(callbacks).__name__}: expected a list of objects")
    for callback in callbacks:
        if isinstance(callback, type) or not any(callable(getattr(callback, event, None)) for event in EVENTS):
            raise InputError(f"callbacks: {callback!r} has none of the methods {', '.join(EVENTS)}")
    return tuple(callbacks)


def _reward_name(function: Any, several: bool) -> str:
    """What reward.fn says of a given function."""
    if several and function == ANSWER:
        return ANSWER
    if not callable(function):
        place = "an entry of reward" if several else "reward"
        raise InputError(
            f"{place} is a {type(function).__name__}: expected a function (completions, examples) -> scores; the "
            "name of one goes into reward.fn"
        )
    named_as = function if hasattr(function, "__qualname__") else type(function)
    return f"{named_as.__module__}:{named_as.__qualname__}"


def _check_engine(engine: Any) -> None:
    names = ("version", "generate", "sync", "close")
    missing = [name for name in names if isinstance(engine, type) or getattr(engine, name, None) is None]
    if missing:
        raise InputError(f"engine {engine!r} is no RolloutEngine: it has no {', '.join(missing)}")
