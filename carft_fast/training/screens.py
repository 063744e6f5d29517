"""The first and the last screen of a run: what it does, and what came of it."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.text import Text

from carft_fast.config import SYNTHETIC, Config, method_name
from carft_fast.core import Table, duration, visible, world_size, wrapped
from carft_fast.models import ModelCost
from carft_fast.reports import change_in_words, result_table
from carft_fast.training.expected import UNCERTAINTY, expected_seconds, measure_speed
from carft_fast.training.extension import stage_total_steps
from carft_fast.training.optim import learning_rate
from carft_fast.training.parallel import strategy
from carft_fast.training.run import CONFIG_FILE, Run


def describe_schedule(config: Config, stage: str, rows: int) -> str:
    """Steps, epochs and learning rates of a stage over `rows` training rows."""
    stage_config = config.sft if stage == "sft" else config.rl
    steps, batch = stage_total_steps(config, stage, rows), stage_config.batch_size
    per_prompt = 1 if stage == "sft" else config.rollout.samples_per_prompt
    rates = [learning_rate(step, steps, stage_config) for step in (0, steps // 2, steps - 1)]
    text = f"{steps} steps of {batch} sequences, {steps * batch / per_prompt / rows:.2f} epochs of {rows} rows"
    if stage == "rl":
        updates = config.rl.ppo_epochs * -(-batch // config.rl.mini_batch_size)
        text = f"{method_name(config)}: {text}, {per_prompt} per question, {updates} optimizer steps each"
    return text + "; lr {:.3g} at the start, {:.3g} half-way, {:.3g} at the end".format(*rates)


def first_screen(run: Run, stages: Sequence[str], *, resume: bool) -> Table:
    """What the run is about to do. It measures the device for about a tenth of a second."""
    config, device = run.config, run.device
    cost = ModelCost.of_config(run.lm_config, trust_remote_code=config.model.trust_remote_code)
    methods = ", then ".join("SFT" if stage == "sft" else method_name(config) for stage in stages)
    table = Table("run", "", title=f"{config.output.name}: {methods}, seed {config.seed}")
    trained = f", adapters of rank {config.lora.rank} are trained" * bool(config.lora.rank)
    table.add_row("model", f"{config.model.path}: {_count(cost.all_weights)} weights{trained}")
    trained_on = ["training data"] * (len(config.data.mix) or 1)
    for name, report in zip([*trained_on, "held-out data", "validation loss"], run.reports, strict=False):
        table.add_row(name, report.summary())
    for stage in stages:
        table.add_row(stage.upper(), describe_schedule(config, stage, len(run.train_rows)))
    on_gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' * (count > 1)}" * (device.type == "cpu")
    several = f", {world_size()} processes, {strategy(config)}" * (world_size() > 1)
    dtype: str = config.model.compute_dtype
    if dtype == "bfloat16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtype += ", which this CPU computes many times slower than float32"
    table.add_row("device", f"{device}{on_gpu}{threads}{several}, {dtype}")
    if "rl" in stages:
        table.add_row("sampling", f"{run.engine_name}, at most {config.rollout.max_new_tokens} tokens")
    table.add_row("run folder", str(run.folder))
    if resume:
        table.add_row("expected time", "the bar shows what is left, once it is known")
    else:
        speed = measure_speed(device, getattr(torch, config.model.compute_dtype))
        found = [expected_seconds(config, stage, cost, run.train_rows, len(run.eval_rows), speed) for stage in stages]
        low, high = (sum(seconds) for seconds in zip(*found, strict=True))
        shown = f"{rough_time(low)} to {rough_time(UNCERTAINTY * high)}"
        table.add_row("expected time", f"{shown}, a rough guess; the ETA beside the bar is measured")
    return table


def _count(weights: int) -> str:
    """Three digits, with a unit: `134 million`."""
    for size, name in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if weights >= size:
            return f"{weights / size:.3g} {name}"
    return str(weights)


def rough_time(seconds: float) -> str:
    """A rough time, in the unit that suits it."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{max(1, round(seconds))} s"


def last_screen(run: Run, summary: dict[str, Any], model: Path, *, width: int) -> Group:
    """What the run changed, where its files are, and what to type next, in lines of at most `width`.

    A path that is longer than a line is left whole, to be copied.
    """
    columns, rows = result_table(summary)
    title = f"{summary['method']}, seed {summary['seed']}, {summary['eval_rows']} held-out rows"
    figures = Table(*columns, title=title)
    for row in rows:
        figures.add_row(*row)
    example = summary["example"]
    answers = Table("one question", example["question"].strip())
    for name, text in zip(("right answer", *columns[1:3]), ("target", "before", "after"), strict=True):
        answers.add_row(name, example[text].strip())
    total, in_rl = summary["seconds_total"], summary["start"]["stage"] == "rl"
    phases = sorted(summary["seconds_by_phase"].items(), key=lambda item: -item[1])
    shares = ", ".join(f"{phase} {seconds / total:.0%}" for phase, seconds in phases if seconds >= total / 100)
    sampled = f"; {summary['completion_tokens']:,} tokens sampled in RL" * in_rl
    paths = [f"Report: {run.folder / 'report.html'}", f"Model: {model}"]
    commands = [f"# {why}\n{broken(words, width)}" for why, words in next_commands(run.config, run.folder, model)]
    said = [
        *(
            wrapped(visible(text), width)
            for text in (change_in_words(summary), f"Time {duration(total)}: {shares}{sampled}")
        ),
        *map(visible, paths),
        *(["", "What to type next:", *map(visible, commands)] if commands else []),
    ]
    return Group(figures, answers, Text("\n".join(said), no_wrap=True, overflow="ignore"))


def next_commands(config: Config, folder: Path, model: Path) -> list[tuple[str, list[str]]]:
    """What for, and the words of the command. None for a run on rows of Python, which no command can read."""
    if not (config.data.trained_on and config.data.eval):
        return []
    on_model = ["--config", str(folder / CONFIG_FILE), "--set", f"model.path={model}"]
    evaluate = ["carft-fast", "eval", *on_model, "--set", "eval.samples=8"]
    found = [("evaluate the model, with 8 answers to each question", evaluate)]
    if model.name == "sft":
        rl = ["carft-fast", "rl", *on_model, "--output-dir", f"{folder}-rl"]
        found.append(("reinforce it", rl))
    if (best := folder / "checkpoints" / "best").exists():
        export = ["carft-fast", "export", str(best), f"{folder}-best"]
        found.append(("the best checkpoint, as a model folder", export))
    if config.data.train == SYNTHETIC:
        own = ["model.path=MODEL", "data.train=train.json", "data.eval=test.json"]
        found.append(("look at your own data", ["carft-fast", "data", "check", "train.json"]))
        found.append(("train a model on it", ["carft-fast", "sft", *(w for value in own for w in ("--set", value))]))
    return found


def broken(words: Sequence[str], width: int) -> str:
    """A command for a shell, in lines of at most `width`, but for a word that is longer."""
    parts: list[str] = []
    for word in map(shlex.quote, words):
        if parts and parts[-1].startswith("--") and " " not in parts[-1]:
            parts[-1] += f" {word}"  # an option and its value
        else:
            parts.append(word)
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 3 <= width:  # " \\" may follow
            lines[-1] += f" {part}"
        else:
            lines.append(f"    {part}")
    return " \\\n".join(lines)
