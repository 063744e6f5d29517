"""The commands. torch, transformers and the trainer load inside them, so that --help and a typo answer at once."""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from carft_fast.config import METHODS, SYNTHETIC, Config, load_config, load_method_config, to_toml, value_origins
from carft_fast.core import EngineError, InputError, RewardError, Stopped, TrainingError, redact

if TYPE_CHECKING:
    from carft_fast.core import Console
    from carft_fast.training import Prepared

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
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")]
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
    resolved = _load(config or str(QUICKSTART_CONFIG), method, overrides)
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
    _train(load_config(config, overrides or ()), ("sft",), dry_run, resume, output_dir)


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
    _train(_load(config, method, overrides), (stage,), dry_run, resume, output_dir)


@app.command()
def compare(
    config: ConfigFile = None,
    methods: Annotated[str | None, typer.Option(help="Names with commas between; see docs/compare.md.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 0,1,2; the config's seed if not given.")] = None,
    vary: Annotated[
        list[str] | None, typer.Option(help="section.key=value,value: every method with each; may be repeated.")
    ] = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    output_dir: Annotated[str | None, typer.Option(help="Folder; runs/<output.name>-compare if not given.")] = None,
) -> None:
    """Methods from one SFT checkpoint per seed, at equal samples and at equal time, with a report."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("compare runs in one process: start it without torchrun or accelerate launch")
    base = load_config(config or str(QUICKSTART_CONFIG), overrides or ())
    from carft_fast.compare import DEFAULT_METHODS, parse_methods, parse_seeds
    from carft_fast.compare import compare as run_comparison
    from carft_fast.core import Console

    run_comparison(
        base,
        parse_methods(methods) if methods else DEFAULT_METHODS,
        parse_seeds(seeds) if seeds else [base.seed],
        vary or (),
        Path(output_dir) if output_dir else Path("runs") / f"{base.output.name}-compare",
        Console(),
        resume=resume,
        dry_run=dry_run,
    )


@app.command("eval")
def evaluate(
    config: ConfigFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    output_dir: OutputDir = None,
) -> None:
    """Greedy accuracy of model.path on data.eval, and maj@k and pass@k with eval.samples; with --output-dir,
    completions and figures are written there.
    """
    from carft_fast.core import is_main
    from carft_fast.training import describe_plan, evaluate_only

    resolved = load_config(config, overrides or ())
    prepared, console = _prepare(resolved, (), False, output_dir, write=bool(output_dir), dry_run=dry_run)
    if dry_run:
        console.show(describe_plan(prepared, ()))
        return
    if output_dir:
        prepared.run.open((), resume=False)
    result = evaluate_only(prepared)
    if output_dir and is_main():
        prepared.run.write_result(result)
    console.log(result.describe())


@app.command()
def report(folder: Annotated[str, typer.Argument(help="A run's folder, finished or not.")]) -> None:
    """Write report.html of a run from what its folder holds: figures, curves, settings, in one file."""
    from carft_fast.reports import rewrite_page

    typer.echo(f"wrote {rewrite_page(Path(folder))}")


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
    from carft_fast.core import Console
    from carft_fast.data import check_data, check_table

    resolved = load_config(config, overrides or ())
    held_out = resolved.data.eval if resolved.data.eval not in ("", SYNTHETIC, file) else None
    tokenizer = None
    if resolved.model.path:
        from carft_fast.data import check_tokenizer
        from carft_fast.models import load_tokenizer

        tokenizer = load_tokenizer(resolved.model)
        check_tokenizer(tokenizer)
    check = check_data(file, resolved, tokenizer, against or held_out)
    if as_json:
        typer.echo(json.dumps(check.as_dict(), indent=2, ensure_ascii=False))
    else:
        Console().show(check_table(check))


@app.command()
def serve(
    config: ConfigFile = None,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 for other machines; needs CARFT_SERVER_TOKEN.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> None:
    """A vLLM server for runs with this config and rollout.engine = "vllm-server"; give its URL in rollout.servers."""
    from carft_fast.rollout.vllm.launch import serve as run_server

    run_server(load_config(config, ['rollout.engine="vllm-server"', *(overrides or ())]), host, port)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Any checkpoint of a run: runs/<name>/checkpoints/<stage>-<step>.")],
    folder: Annotated[str, typer.Argument(help="New or empty folder.")],
) -> None:
    """A checkpoint as a plain Hugging Face folder: LoRA merged, shards put together, heads beside it. Needs no GPU."""
    from carft_fast.training import export_checkpoint

    export_checkpoint(Path(checkpoint), Path(folder))
    typer.echo(f"model: {folder}")


@app.command("config")
def show_config(config: ConfigFile = None, method: Method = None, overrides: Overrides = None) -> None:
    """Print the resolved config as TOML, every field with its meaning and where its value comes from."""
    resolved, preset = load_method_config(config, overrides or (), method)
    typer.echo(to_toml(resolved, origins=value_origins(config, overrides or (), preset)), nl=False)


def _load(config: str | None, method: str | None, overrides: list[str] | None) -> Config:
    return load_method_config(config, overrides or (), method)[0]


def _prepare(
    config: Config,
    stages: tuple[str, ...],
    resume: bool,
    output_dir: str | None,
    *,
    write: bool = True,
    dry_run: bool = False,
) -> "tuple[Prepared, Console]":
    from carft_fast.core import Console, join
    from carft_fast.models import resolve_device
    from carft_fast.training import prepare

    join(resolve_device(config.model.device).type, config.distributed.timeout_s)
    console = Console()
    folder = Path(output_dir) if output_dir else Path("runs") / config.output.name
    return prepare(config, folder, console, stages=stages, resume=resume, write=write, dry_run=dry_run), console


def _train(config: Config, stages: tuple[str, ...], dry_run: bool, resume: bool, output_dir: str | None) -> None:
    from carft_fast.training import describe_plan, train

    prepared, console = _prepare(config, stages, resume, output_dir, dry_run=dry_run)
    if dry_run:
        console.show(describe_plan(prepared, stages))
        return
    train(prepared, stages, resume=resume)


def run_cli() -> None:
    """Exit codes: 0 done, 1 failed, 2 bad input (nothing written), 130 or 143 stopped by Ctrl-C or SIGTERM after
    saving.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        _run_app("")
        return
    from carft_fast.core import leave

    try:
        _run_app(f"[rank {os.environ['RANK']}] ")
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else int(end.code is not None))


def _run_app(rank: str) -> None:
    try:
        app()
    except InputError as error:
        print(redact(f"{rank}error: {error}"), file=sys.stderr)
        sys.exit(2)
    except (EngineError, RewardError, TrainingError) as error:
        print(redact(f"{rank}error: {error}"), file=sys.stderr)
        sys.exit(1)
    except Stopped as stopped:
        sys.exit(stopped.exit_code)
    except ModuleNotFoundError:
        raise  # __main__ knows which extra it is of
    except Exception:  # nobody expected it: libraries quote URLs and headers in their errors
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        sys.exit(1)
