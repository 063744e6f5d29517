"""More steps for a run that has ended or was interrupted: what `--resume` takes, and what of its folder goes first."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from carft_fast.config import Config, StageConfig, load_config
from carft_fast.core import InputError, read_json_object, remove_folder
from carft_fast.reports import MetricsLog
from carft_fast.training.checkpoint import model_folder
from carft_fast.training.guard import stopped_at
from carft_fast.training.optim import learning_rate

CONFIG_FILE = "config.toml"
ENVIRONMENT_FILE = "run.json"
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, kw_only=True)
class Extension:
    """A stage that is to have more steps than when its run was last started."""

    stage: str
    steps_before: int
    steps: int
    config: StageConfig

    def describe(self) -> str:
        text = f"{self.stage}: {self.steps} steps in place of {self.steps_before}"
        if self.config.lr_schedule == "constant":
            return text
        last = learning_rate(self.steps_before - 1, self.steps_before, self.config)
        following = learning_rate(self.steps_before, self.steps, self.config)
        return (
            f'{text}; lr_schedule = "{self.config.lr_schedule}" is spread over all of them from here on, so this is '
            f"not a run that had them from its start: step {self.steps_before} was planned with lr {last:g}, "
            f"step {self.steps_before + 1} has {following:g}"
        )


def stage_config(config: Config, stage: str) -> StageConfig:
    return config.sft if stage == "sft" else config.rl


def stage_total_steps(config: Config, stage: str, rows: int) -> int:
    """Steps of a stage over `rows` training rows."""
    prompts_per_step = config.rl.batch_size // config.rollout.samples_per_prompt
    rows_per_step = config.sft.batch_size if stage == "sft" else prompts_per_step
    chosen = stage_config(config, stage)
    return chosen.max_steps or -(-chosen.epochs * rows // rows_per_step)


def planned_steps(folder: Path, stages: Sequence[str], config: Config | None = None) -> dict[str, int]:
    """Steps of each stage of the run in a folder, by its own config or by another; empty where a kill fell before any
    was done."""
    environment = folder / ENVIRONMENT_FILE
    if not environment.is_file():
        return {}
    try:
        rows = int(read_json_object(environment)["data"]["train"]["rows"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{environment}: data.train.rows: expected a whole number") from None
    config = config or load_config(str(folder / CONFIG_FILE))
    return {stage: stage_total_steps(config, stage, rows) for stage in stages}


def find_extensions(folder: Path, config: Config, stages: Sequence[str]) -> list[Extension]:
    """The stages for which `config` asks for more steps. Raises InputError where it asks for fewer, or the stage is
    over for good."""
    wanted, found = planned_steps(folder, stages, config), []
    for stage, before in planned_steps(folder, stages).items():
        steps = wanted[stage]
        asked = f"--resume: {steps} steps of {stage} ({stage}.max_steps, {stage}.epochs)"
        if steps < before:
            raise InputError(f"{asked}: the run in {folder} has {before}; allowed are as many or more")
        if steps == before:
            continue
        if stage == "sft" and "rl" in stages and model_folder(folder, stage).is_dir():
            raise InputError(
                f"{asked}: the SFT of the run in {folder} has ended after {before}, and RL goes on from its model; "
                f"allowed is {before}, or another --output-dir"
            )
        metrics = MetricsLog(folder, write=False)
        metrics.load()
        if (ended := stopped_at(metrics.find(stage, "guard"))) is not None:
            raise InputError(
                f"{asked}: the run in {folder} was ended at step {ended}, see the guard record of its metrics.jsonl; "
                f"allowed is {before}"
            )
        found.append(Extension(stage=stage, steps_before=before, steps=steps, config=stage_config(config, stage)))
    return found


def reopen(folder: Path, extensions: Sequence[Extension]) -> None:
    """Take away what says that the stages are finished: first the figures, then the models. Their checkpoints stay, so
    that a kill in between costs nothing: the run goes on with the steps it had, or with more."""
    if extensions:
        (folder / SUMMARY_FILE).unlink(missing_ok=True)
    for extension in extensions:
        model = model_folder(folder, extension.stage)
        if model.is_dir():
            remove_folder(model)
