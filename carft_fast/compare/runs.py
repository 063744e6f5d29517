"""A comparison of methods: per seed one SFT checkpoint, from it one run per method, then the report.

Every run is an ordinary run in a folder of its own, so a killed comparison goes on where it was. Runs of a seed share
this process: a first run pays for what is compiled once, and the SFT run is first. Several processes may work on one
comparison, each on seeds of its own.
"""

import gc
import itertools
import re
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from carft_fast.compare.report import screen, write_comparison
from carft_fast.compare.stats import (
    SFT,
    SFT_TIME,
    TRAINING_PHASES,
    Judgement,
    Trajectory,
    limits,
    outcomes,
    summarise,
    trajectory,
)
from carft_fast.config import METHODS, Config, check_method, continued_sft, preset, read_value, replaced
from carft_fast.core import (
    Console,
    InputError,
    Stopped,
    StopRequest,
    Table,
    duration,
    first_line,
    is_empty,
    lock_holder,
    locked,
)
from carft_fast.reports import change_in_short, read_records
from carft_fast.training import CONFIG_FILE, describe_schedule, prepare, stage_total_steps, train

COMPARED = (*METHODS, SFT_TIME)
DEFAULT_METHODS = (SFT, SFT_TIME, "reft", "grpo", "dr_grpo", "carft")
START = "start"
VARIABLE = ("rl", "sft", "reward", "contrastive", "rollout", "lora", "guard")
"""Sections that may differ between runs from one checkpoint."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A method with values on top: those of --vary that it reads, or those of a study's arm."""

    method: str
    values: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    """Of an arm of a study; else made of method and values."""

    @property
    def label(self) -> str:
        if self.name:
            return self.name
        values = (f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.values.items())
        return " ".join([self.method, *values])

    @property
    def stage(self) -> str:
        return "sft" if self.method in (SFT, SFT_TIME) else "rl"

    def folder_name(self, seed: int) -> str:
        return re.sub(r"[^A-Za-z0-9._=+-]", "-", self.label) + f"-seed{seed}"


def parse_methods(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        check_method(name, COMPARED)
    return names


def parse_seeds(text: str) -> list[int]:
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"--seeds {text}: expected whole numbers such as 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {text}: a seed appears twice")
    return seeds


def parse_vary(text: str) -> tuple[str, list[Any]]:
    """`rl.lr=2e-4,6e-4` -> key and values, read as TOML; bare words are strings."""
    key, separator, listed = (part.strip() for part in text.partition("="))
    if not separator or not listed or "." not in key:
        raise InputError(f"--vary {text}: expected section.key=value,value, for instance rl.lr=2e-4,6e-4")
    if key.partition(".")[0] not in VARIABLE:
        raise InputError(
            f"--vary {text}: {key} is the same for all runs from one checkpoint; allowed: the sections "
            f"{', '.join(VARIABLE)}"
        )
    try:
        return key, list(read_value(f"[{listed}]"))
    except tomllib.TOMLDecodeError:
        return key, [word.strip() for word in listed.split(",")]
    except (ValueError, RecursionError) as error:
        raise InputError(f"--vary {key}: {first_line(error)}") from None


def expand(methods: Sequence[str], varied: Mapping[str, Sequence[Any]], base: Config) -> list[Variant]:
    """Every method with every combination of the varied fields that it reads and does not fix itself.

    Continued SFT reads sft and lora, RL methods all but sft.
    """
    found: dict[str, Variant] = {}
    for method in methods:
        if Variant(method).stage == "sft":
            fixed, reads = continued_sft(base), {"sft", "lora"}
        else:
            fixed, reads = METHODS[method], set(VARIABLE) - {"sft"}
        keys = [key for key in varied if key.partition(".")[0] in reads and key not in fixed]
        for values in itertools.product(*(varied[key] for key in keys)):
            variant = Variant(method, dict(zip(keys, values, strict=True)))
            found[variant.label] = variant
    return list(found.values())


class Comparison:
    def __init__(
        self,
        base: Config,
        variants: Sequence[Variant],
        seeds: Sequence[int],
        folder: Path,
        console: Console,
        *,
        resume: bool,
        dry_run: bool = False,
        judgement: Judgement | None = None,
    ) -> None:
        """Check everything that can be checked before the first run. Raises InputError.

        With a `judgement` the report has the differences of the variants, paired by seed.
        """
        if base.rl.eval_every is None:
            raise InputError(
                "rl.eval_every is not set: a comparison needs evaluations on the way, such as every 10 steps"
            )
        if not resume and not is_empty(folder):
            raise InputError(f"--output-dir {folder}: not empty; add --resume to go on with that comparison")
        if resume and not folder.is_dir():
            raise InputError(f"--resume: {folder} does not exist")
        self.base, self.seeds, self._console = base, seeds, console
        self.folder, self._given_folder = folder.resolve(), folder
        # continued SFT for equal time: how long it runs depends on the others
        self.variants = sorted(variants, key=lambda variant: variant.method == SFT_TIME)
        self._judgement = judgement
        self._stop = StopRequest()
        self._begun = 0
        """Runs so far, finished ones that are not repeated included."""
        checked = prepare(
            self._start_config(seeds[0]),
            self._start_folder(seeds[0]),
            console,
            stages=("sft",),
            write=not resume,
            dry_run=dry_run,
        )
        self._rows = len(checked.train_rows)
        self._eval_rows = len(checked.eval_rows)
        self._device = checked.device
        for variant in self.variants:
            self.config(variant, seeds[0])

    def _start_config(self, seed: int) -> Config:
        return replaced(self.base, {"seed": seed})

    def _start_folder(self, seed: int) -> Path:
        return self.folder / f"{START}-seed{seed}"

    def config(self, variant: Variant, seed: int, sft_steps: int | None = None) -> Config:
        """What a variant runs: as many steps as the base config's RL, of as many samples.

        `sft_steps` are those of continued SFT for equal time.
        """
        values = variant.values | {"seed": seed, "model.path": str(self._start_folder(seed) / "sft")}
        if variant.stage == "sft":
            done = stage_total_steps(self.base, "sft", self._rows)
            config = replaced(self.base, values | {"sft.max_steps": done, "rl.max_steps": self._rl_steps(self.base)})
            more = continued_sft(config)
            return replaced(config, more | ({"sft.max_steps": sft_steps} if sft_steps else {}))
        if "rl.epochs" in values:
            values = {"rl.max_steps": None} | values
        config = replaced(self.base, preset(variant.method, self.base) | values)
        return replaced(config, {"rl.max_steps": self._rl_steps(config)})

    def _rl_steps(self, config: Config) -> int:
        """As with the base config's samples per question: a method with more takes fewer questions, not more steps."""
        return stage_total_steps(config.model_copy(update={"rollout": self.base.rollout}), "rl", self._rows)

    def _schedules(self, at_equal_time: str) -> dict[str, str]:
        """What is run for a seed, by label; `at_equal_time` describes SFT whose length depends on the other runs."""
        found = {START: describe_schedule(self._start_config(self.seeds[0]), "sft", self._rows)}
        for variant in self.variants:
            schedule = describe_schedule(self.config(variant, self.seeds[0]), variant.stage, self._rows)
            found[variant.label] = at_equal_time if variant.method == SFT_TIME else schedule
        return found

    def plan(self) -> Table:
        table = Table("run, for each seed", "", title="dry run: nothing was written")
        schedules = self._schedules("as many SFT steps as fit the time of the seed's fastest RL run")
        for label, schedule in schedules.items():
            table.add_row(label, schedule)
        table.add_row("seeds", ", ".join(map(str, self.seeds)))
        table.add_row("evaluation", f"{self._eval_rows} rows")
        table.add_row("output", str(self.folder))
        return table

    def run(self) -> list[Trajectory]:
        """Every run that is not finished yet; the report is written after each seed.

        A seed that another process works on is left to it. Raises InputError where that is so with all of them.
        """
        schedules = self._schedules("SFT continued for the training time of the seed's fastest RL run")
        described = [f"`{label}`: {schedule}" for label, schedule in schedules.items()]
        self.folder.mkdir(parents=True, exist_ok=True)
        runs: list[Trajectory] = []
        busy = ""
        with self._stop.installed():
            try:
                for seed in self.seeds:
                    place = self.folder / f".seed{seed}"
                    place.mkdir(exist_ok=True)
                    if busy := lock_holder(place) or "":
                        self._console.log(f"seed {seed} is left out: {busy}")
                        continue
                    with locked(place, self._console.log):
                        self._run_seed(seed)
                    of_seeds = [self._finished(seed) for seed in self.seeds]
                    runs = [run for found in of_seeds if len(found) == len(self.variants) for run in found]
                    judged = outcomes(runs, self._judgement) if self._judgement else []
                    write_comparison(self.folder, runs, self.base, described, self._device, judged)
            except Stopped as stopped:
                self._console.log(f"stopped by {stopped}: go on with --resume")
                raise
        if not runs:
            raise InputError(busy)
        self._console.show(screen(summarise(runs), self._given_folder, width=self._console.width))
        return runs

    def _run_seed(self, seed: int) -> None:
        start = self._start_folder(seed)
        self._train(self._start_config(seed), start, "sft")
        for variant in self.variants:
            before = [run for run in self._finished(seed) if run.method != SFT_TIME]
            steps = self._sft_steps(before, start) if variant.method == SFT_TIME else None
            self._train(self.config(variant, seed, steps), self._folder(variant, seed), variant.stage)

    def _folder(self, variant: Variant, seed: int) -> Path:
        return self.folder / variant.folder_name(seed)

    def _finished(self, seed: int) -> list[Trajectory]:
        """The runs of a seed that have ended, of this process or of others, continued SFT for equal time too."""
        found: list[Trajectory] = []
        for variant in self.variants:
            folder = self._folder(variant, seed)
            if (folder / "summary.json").is_file():
                config = self.config(variant, seed)
                samples = config.sft.batch_size if variant.stage == "sft" else config.rl.batch_size
                records = read_records(folder / "metrics.jsonl")
                found.append(
                    trajectory(records, label=variant.label, method=variant.method, seed=seed, samples_per_step=samples)
                )
        return found

    def _train(self, config: Config, folder: Path, stage: str) -> None:
        resumed = (folder / CONFIG_FILE).is_file()
        if not resumed:  # a kill may have fallen before the run's first file
            shutil.rmtree(folder, ignore_errors=True)
        self._begun += 1
        name = f"{self._begun}/{len(self.seeds) * (1 + len(self.variants))} {folder.name}"
        run = prepare(config, folder, Console(name=name), stages=(stage,), resume=resumed)
        run.stop = self._stop  # also for what is asked between two runs
        self._stop.check()
        summary = train(run, (stage,), resume=resumed)
        self._console.log(f"{name}: {change_in_short(summary)}, {duration(summary['seconds_total'])}")
        self._stop.check()
        del run
        gc.collect()
        torch.compiler.reset()  # else its limit of recompilations would be shared by all runs
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _sft_steps(self, runs: Sequence[Trajectory], start: Path) -> int:
        """SFT steps that take as long as the fastest RL run, at the checkpoint run's own seconds per step."""
        steps = [record for record in read_records(start / "metrics.jsonl") if record["kind"] == "train"]
        seconds = sum(r["seconds"].get(phase, 0.0) for r in steps for phase in TRAINING_PHASES)
        return max(1, round(limits(runs).seconds / (seconds / len(steps)))) if runs else len(steps)
