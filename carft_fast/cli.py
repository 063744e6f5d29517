"""The commands: a thin client of `trainer`. They and Python cannot differ."""

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from carft_fast import core, trainer
from carft_fast.config import METHODS, Config, load_method_config, to_toml, value_origins
from carft_fast.core import EngineError, InputError, RewardError, Stopped, TrainingError, redact
from carft_fast.trainer import Trainer, load_config

QUICKSTART_CONFIG = Path(__file__).with_name("config") / "quickstart.toml"

app = typer.Typer(
    help="Contrastive reinforced fine-tuning (CARFT) of language models that reason.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

data_app = typer.Typer(help="Look at data before a run is spent on it.", no_args_is_help=True)
app.add_typer(data_app, name="data")

ConfigFile = Annotated[str | None, typer.Option("--config", help="TOML file; see `carft-fast config`.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")]
Method = Annotated[
    str | None, typer.Option("--method", help=f"Sets what defines a method, before --set: {', '.join(METHODS)}.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the run's last checkpoint; with more steps, a finished run too.")
]
OutputDir = Annotated[str | None, typer.Option("--output-dir", help="Run folder; runs/<output.name> if not given.")]


@app.command()
def quickstart(
    config: ConfigFile = None,
    method: Method = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    output_dir: OutputDir = None,
) -> None:
    """SFT, then RL, evaluation and report in one run: on a generated task, or on --config's model and data."""
    if method == "sft":
        raise InputError('--method sft: that is continued SFT in place of RL; give it to "carft-fast rl"')
    resolved = load_config(config or QUICKSTART_CONFIG, method=method, overrides=overrides or ())
    _train(resolved, ("sft", "rl"), dry_run, resume, output_dir)


@app.command()
def sft(
    config: ConfigFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    output_dir: OutputDir = None,
) -> None:
    """Stage 1: supervised fine-tuning of model.path on annotated chains of thought."""
    _train(load_config(config, overrides=overrides or ()), ("sft",), dry_run, resume, output_dir)


@app.command()
def rl(
    config: ConfigFile = None,
    method: Method = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    output_dir: OutputDir = None,
) -> None:
    """Stage 2: reinforced fine-tuning of model.path, usually the folder stage 1 wrote; --method sft: more SFT."""
    stage = "sft" if method == "sft" else "rl"
    _train(load_config(config, method=method, overrides=overrides or ()), (stage,), dry_run, resume, output_dir)


@app.command()
def compare(
    config: ConfigFile = None,
    methods: Annotated[str | None, typer.Option(help="Names with commas between; see docs/compare.md.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 0,1,2; the config's seed if not given.")] = None,
    vary: Annotated[
        list[str] | None, typer.Option(help="section.key=value,value: every method with each; may be repeated.")
    ] = None,
    study: Annotated[
        str | None, typer.Option(help="TOML file of arms, seeds and how they are judged; see docs/compare.md.")
    ] = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    output_dir: Annotated[str | None, typer.Option(help="Folder; runs/<output.name>-compare if not given.")] = None,
) -> None:
    """Methods from one SFT checkpoint per seed, at equal samples and at equal time, with a report."""
    own = study is None or config  # else the study names its config
    trainer.compare(
        load_config(config or QUICKSTART_CONFIG, overrides=overrides or ()) if own else None,
        methods=methods or (),
        seeds=seeds or (),
        vary=vary or (),
        study=study,
        overrides=() if own else overrides or (),
        output_dir=output_dir,
        resume=resume,
        dry_run=dry_run,
    )


@app.command()
def plan(
    gpu: Annotated[str, typer.Option(help="Such as h100-80 or rtx4090-24; a wrong name lists all.")],
    gpus: Annotated[
        int, typer.Option(help="How many of them; with several, FSDP2 unless the config names another.")
    ] = 1,
    config: ConfigFile = None,
    method: Method = None,
    overrides: Overrides = None,
    stage: Annotated[str, typer.Option(help="sft, rl, or both with a comma.")] = "sft,rl",
) -> None:
    """Does it fit on a GPU, and how long does a step take: a prediction, made without one. Downloads no weights."""
    stages = ("sft",) if method == "sft" else tuple(stage.split(","))
    resolved = load_config(config, method=method, overrides=overrides or ())
    core.Console().show(trainer.estimate(resolved, gpu=gpu, gpus=gpus, stages=stages)[1])


@app.command("eval")
def evaluate(
    config: ConfigFile = None, overrides: Overrides = None, dry_run: DryRun = False, output_dir: OutputDir = None
) -> None:
    """Greedy accuracy of model.path on data.eval, and maj@k and pass@k with eval.samples; with --output-dir,
    completions and figures are written there.
    """
    resolved = load_config(config, overrides=overrides or ())
    Trainer(resolved).evaluate(resolved.model.path, output_dir=output_dir, dry_run=dry_run)


@app.command()
def report(folder: Annotated[str, typer.Argument(help="A run's folder, finished or not.")]) -> None:
    """Write report.html of a run from what its folder holds: figures, curves, settings, in one file."""
    typer.echo(core.visible(f"wrote {trainer.report(folder)}"))


@data_app.command("check")
def check_data_file(
    file: Annotated[str, typer.Argument(help="File, folder or Hub id, read as data.train would be.")],
    config: ConfigFile = None,
    overrides: Overrides = None,
    against: Annotated[
        str | None, typer.Option(help="Test set whose questions should not be in FILE; data.eval if not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Rows that can be used, lengths, wrong or repeated annotations, questions of the test set. Loads no model."""
    check = trainer.check_data(file, load_config(config, overrides=overrides or ()), against=against)
    if as_json:
        typer.echo(core.visible_json(check.as_dict(), indent=2))
    else:
        core.Console().show(check.table())


@app.command()
def serve(
    config: ConfigFile = None,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 for other machines, ::1 for IPv6.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> None:
    """A vLLM server for runs with this config and rollout.engine = "vllm-server"; give its URL in rollout.servers.

    Asks for the token in CARFT_SERVER_TOKEN; makes one and prints it where that is not set.
    """
    words = ['rollout.engine="vllm-server"', *(overrides or ())]
    trainer.serve(load_config(config, overrides=words), host, port)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Any checkpoint of a run: runs/<name>/checkpoints/<stage>-<step>.")],
    folder: Annotated[str, typer.Argument(help="New or empty folder.")],
    push: Annotated[
        str | None, typer.Option(help="owner/name on the Hugging Face Hub: upload it, with a model card.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="--push makes a private repository without it.")] = False,
) -> None:
    """A checkpoint as a plain Hugging Face folder: LoRA merged, shards put together, heads beside it. Needs no GPU."""
    if public and push is None:
        raise InputError("--public needs --push owner/name")
    trainer.export(checkpoint, folder, push_to=push, public=public)
    typer.echo(core.visible(f"model: {folder}"))
    if push is not None:
        typer.echo(core.visible(f"pushed: {push}"))


@app.command("config")
def show_config(config: ConfigFile = None, method: Method = None, overrides: Overrides = None) -> None:
    """Print the resolved config as TOML, every field with its meaning and where its value comes from."""
    resolved, preset = load_method_config(config, overrides or (), method)
    typer.echo(to_toml(resolved, origins=value_origins(config, overrides or (), preset)), nl=False)


def _train(config: Config, stages: tuple[str, ...], dry_run: bool, resume: bool, output_dir: str | None) -> None:
    run = Trainer(config, output_dir=output_dir)
    if dry_run:
        table = run.plan(stages, resume)
        core.Console().show(table)  # made when the processes have joined, so that one of them speaks
    else:
        run.train(stages, resume)


def run_cli() -> None:
    """Exit codes: 0 done, 1 failed, 2 bad input (nothing written), 130 or 143 stopped by Ctrl-C or SIGTERM after
    saving.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        _run_app("")
        return
    try:
        _run_app(f"[rank {os.environ['RANK']}] ")
    except SystemExit as end:
        core.leave(end.code if isinstance(end.code, int) else int(end.code is not None))


def _run_app(rank: str) -> None:
    core.guard_library_output()
    try:
        app()
    except InputError as error:
        print(core.visible(redact(f"{rank}error: {error}")), file=sys.stderr)
        sys.exit(2)
    except (EngineError, RewardError, TrainingError) as error:
        print(core.visible(redact(f"{rank}error: {error}")), file=sys.stderr)
        sys.exit(1)
    except Stopped as stopped:
        sys.exit(stopped.exit_code)
    except ModuleNotFoundError:
        raise  # __main__ knows which extra it is of
    except Exception as error:  # nobody expected it: libraries quote URLs and headers in their errors
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            print(core.visible(f"{rank}error: {str(error.filename)[:80]}...: a path that is too long"), file=sys.stderr)
            sys.exit(2)
        print(core.visible(redact(traceback.format_exc())), end="", file=sys.stderr)
        sys.exit(1)
