"""From a config to a finished run: check everything, then the stages, then the summary and the report."""

import gc
import json
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

from transformers.utils.logging import disable_progress_bar

from carft_fast.config import Config, method_name
from carft_fast.core import (
    Console,
    InputError,
    StopRequest,
    Table,
    lock_holder,
    on_main,
    read_json_lines,
    read_json_object,
    world_size,
    write_folder,
    write_text,
)
from carft_fast.data import (
    EncodedExample,
    LoadReport,
    PromptFormat,
    Source,
    check_tokenizer,
    encode_examples,
    load_set,
    mix_rows,
)
from carft_fast.models import (
    ModelCost,
    check_heads,
    check_weights,
    load_lm_config,
    load_model,
    load_tokenizer,
    resolve_device,
)
from carft_fast.reports import write_report
from carft_fast.rewards import Grader, RewardFunction
from carft_fast.rollout import RolloutEngine, check_engine
from carft_fast.training.checkpoint import made_by, model_folder
from carft_fast.training.evaluation import EvalResult, add_samples, paired_interval
from carft_fast.training.loop import StageLoop
from carft_fast.training.memory import estimate_memory
from carft_fast.training.parallel import check_strategy, strategy
from carft_fast.training.rl import train_rl
from carft_fast.training.run import SUMMARY_FILE, Run, check_run_folder, versions
from carft_fast.training.screens import describe_schedule, first_screen, last_screen
from carft_fast.training.sft import train_sft


def prepare(
    config: Config,
    folder: Path,
    console: Console,
    *,
    stages: Sequence[str],
    resume: bool = False,
    write: bool = True,
    dry_run: bool = False,
    train: Source | None = None,
    eval: Source | None = None,
    reward: RewardFunction | None = None,
    engine: RolloutEngine | None = None,
    callbacks: Sequence[Any] = (),
) -> Run:
    """Check folder, model, tokenizer and data, cheapest first; writes nothing. Raises InputError.

    A dry run needs no weights: a folder with config and tokenizer will do. The last five arguments are `Trainer`'s.
    """
    if write:
        on_main(lambda: _check_folder(folder, config, stages, resume=resume))
    grader = Grader(config.reward, reward, config.data.answer_phrase)
    disable_progress_bar()  # transformers' own bars would write over ours
    device = resolve_device(config.model.device)
    tokenizer = load_tokenizer(config.model)
    if not dry_run:
        check_weights(config.model.path, training=bool(stages))
    check_tokenizer(tokenizer)
    check_heads(config.model.path, config.model)
    prompt_format = PromptFormat.of(config, tokenizer)
    lm_config = load_lm_config(config.model)
    _check_max_length(config, lm_config)
    if engine is None:
        check_engine(config, lm_config, device.type)
    if stages:
        check_strategy(config, stages)
        if config.model.attention == "flex_attention" and device.type == "cpu":
            raise InputError(
                'model.attention = "flex_attention": torch cannot train with it on a CPU; allowed: "packed", "sdpa" or '
                '"eager"'
            )
    train_rows, eval_rows, reports = _read_rows(config, prompt_format, console, stages, train, eval)
    _check_vocabulary(config, lm_config, tokenizer, [*train_rows, *eval_rows])
    run = Run(
        config=config,
        folder=folder,
        console=console,
        device=device,
        lm_config=lm_config,
        tokenizer=tokenizer,
        prompt_format=prompt_format,
        grader=grader,
        train_rows=train_rows,
        eval_rows=eval_rows,
        reports=reports,
        given_engine=engine,
        callbacks=callbacks,
        stop=StopRequest(several=world_size() > 1),
    )
    run.check_same_data(resume=resume)
    return run


def _read_rows(
    config: Config,
    prompt_format: PromptFormat,
    console: Console,
    stages: Sequence[str],
    train: Source | None,
    eval: Source | None,
) -> tuple[list[EncodedExample], list[EncodedExample], list[LoadReport]]:
    """Rows to train on (none without stages) and to evaluate on, and what became of those of each source."""
    data = config.data
    sources: list[tuple[Literal["train", "eval"], Source]] = [("eval", data.eval if eval is None else eval)]
    if stages:
        given = data.train if train is None else train
        sources = [*(("train", source) for source in data.mix or [given]), *sources]
    for name, source in sources:
        if source == "":
            raise InputError(f'data.{name} is not set: give a file, a Hub id or "synthetic"')
    loaded = [(name, *load_set(config, name, source)) for name, source in sources]
    rows: list[list[EncodedExample]] = []
    for name, examples, report in loaded:
        longest = config.rollout.max_new_tokens if name == "train" else config.eval_max_new_tokens
        with console.track(f"tokenise {report.source}", len(examples), "rows") as tracker:
            encoded = encode_examples(
                examples,
                prompt_format,
                max_length=data.max_length,
                max_prompt_length=data.max_length - longest,
                report=report,
                require_cot=name == "train",
                on_row=tracker.advance,
            )
        rows.append(encoded)
    *train_rows, eval_rows = rows
    reports = [report for _, _, report in loaded]
    if stages and data.mix:
        return mix_rows(dict(zip(data.mix, train_rows, strict=True)), data.mix, data.train_rows), eval_rows, reports
    return [row for part in train_rows for row in part], eval_rows, reports


def _check_folder(folder: Path, config: Config, stages: Sequence[str], *, resume: bool) -> None:
    if holder := lock_holder(folder):
        raise InputError(f"--output-dir: {holder}")
    check_run_folder(folder, config, stages, resume=resume)


def _check_max_length(config: Config, lm_config: Any) -> None:
    positions = getattr(lm_config.get_text_config(), "max_position_embeddings", None)
    if positions and config.data.max_length > positions:
        raise InputError(
            f"data.max_length = {config.data.max_length}: the model at {config.model.path} has {positions} positions"
        )


def _check_vocabulary(config: Config, lm_config: Any, tokenizer: Any, rows: Sequence[EncodedExample]) -> None:
    """Tokens that were added to a tokenizer may have no embedding."""
    size = getattr(lm_config.get_text_config(), "vocab_size", None)
    used = (max(ids) for row in rows for ids in (row.prompt_ids, *row.completions) if ids)
    largest = max([tokenizer.eos_token_id, tokenizer.pad_token_id, *used])
    if size and largest >= size:
        raise InputError(
            f'model.path = "{config.model.path}": its tokenizer makes token {largest} '
            f"({tokenizer.convert_ids_to_tokens(largest)}), its embedding has {size} rows: resize it, or use the "
            "tokenizer it came with"
        )


def describe_plan(run: Run, stages: Sequence[str]) -> Table:
    """What a run would do, for --dry-run."""
    config, rollout = run.config, run.config.rollout
    table = Table("plan", "", title="dry run: nothing was written")
    for report in run.reports:
        table.add_row("data", report.summary())
    if stages and config.data.mix:
        table.add_row("mix", f"{len(run.train_rows)} rows of {config.data.trained_on}")
    for stage in stages:
        table.add_row(stage, describe_schedule(config, stage, len(run.train_rows)))
    samples = f", {config.eval.samples} samples each" * (not stages and config.eval.samples > 1)
    table.add_row("evaluation", f"{len(run.eval_rows)} rows{samples}")
    servers = f", {len(rollout.servers or rollout.server_devices) or 1} server(s)" * (run.engine_name == "vllm-server")
    table.add_row("sampling", f"{run.engine_name}{servers}, at most {rollout.max_new_tokens} tokens")
    table.add_row("device", f"{run.device}, {config.model.compute_dtype}")
    table.add_row("output", str(run.folder))
    table.add_section()
    row = (run.train_rows or run.eval_rows)[0]
    table.add_row(f"prompt of row {row.example.item_id}", run.prompt_format.shown(row.prompt_ids))
    if row.completions:
        table.add_row("its annotated completion", run.prompt_format.shown(row.completion_ids))
    if stages:
        table.add_section()
        cost = ModelCost.of_config(run.lm_config, trust_remote_code=config.model.trust_remote_code)
        how, devices = strategy(config), world_size()
        memory = estimate_memory(config, cost, run.lm_config, stages[-1], how, devices)
        shared = f"each of {devices} devices, {how}" if devices > 1 else "one device"
        table.add_row("memory, an estimate", f"of the trainer on {shared}; {cost.all_weights:,} weights")
        for what, (size, formula) in memory.items():
            table.add_row(f"  {what}", f"{size / 2**30:.1f} GiB = {formula}")
    return table


def train(run: Run, stages: Sequence[str], *, resume: bool) -> dict[str, Any]:
    """Run the stages; returns the summary, which is also in summary.json. A finished run returns it at once."""
    summary_path = run.folder / SUMMARY_FILE
    if resume and on_main(summary_path.is_file):
        run.console.log(f"{run.folder}: this run is finished")
        return on_main(lambda: read_json_object(summary_path))
    model_path = run.config.model.path
    trainers = {"sft": train_sft, "rl": train_rl}

    def finish() -> dict[str, Any]:
        summary = summarise(run, stages)
        write_report(run.folder, run.config, run.metrics.records, summary)
        write_text(summary_path, json.dumps(summary, indent=2) + "\n")  # last: its presence says the run is finished
        return summary

    with run.stop.installed(), run.opened(stages, resume=resume):
        with closing(run):
            run.console.show(first_screen(run, stages, resume=resume))
            for stage in stages:
                final = model_folder(run.folder, stage)
                if not run.store.has_model(final):  # else a resumed run that was past this stage
                    _export(run, trainers[stage](run, model_path), final, stage)
                    gc.collect()  # the next stage needs the room
                model_path = str(final)
        summary = on_main(finish)
        run.console.show(last_screen(run, summary, Path(model_path), width=run.console.width))
        run.tell("on_end", summary)
    return summary


def _export(run: Run, loop: StageLoop, final: Path, stage: str) -> None:
    model = loop.learner.model
    gathered = model.gather()

    def write(folder: Path) -> None:
        model.save(folder, gathered)
        run.tokenizer.save_pretrained(folder)

    on_main(lambda: write_folder(final, write, made_by(run.config, stage)))
    loop.learner.close()


def evaluate_only(run: Run, *, write: bool = False) -> EvalResult:
    """Evaluate the model as it is, greedily and with eval.samples. `write` puts the result into the run's folder."""
    with ExitStack() as ends:
        if world_size() == 1:  # several processes end together by the signals' own effect
            ends.enter_context(run.stop.installed())
        if write:
            ends.enter_context(run.opened((), resume=False))
        result = _evaluated(run)
        if write:
            run.write_samples("eval", result.samples)
            figures = json.dumps({**result.metrics, "versions": versions()}, indent=2) + "\n"
            on_main(lambda: write_text(run.folder / SUMMARY_FILE, figures))
    run.console.log(result.describe())
    return result


def _evaluated(run: Run) -> EvalResult:
    with closing(run):
        run.log_reports()
        model = load_model(run.config, run.config.model.path, run.device, heads=False)
        engine = run.sampler(model)
        result = run.answer(engine, "eval")
        samples = run.config.eval.samples
        if samples > 1:
            with run.console.track("eval samples", samples * len(run.eval_rows), "completions") as tracker:
                result = add_samples(
                    result, engine, run.eval_rows, run.prompt_format, run.config, run.grader, run.on_progress(tracker)
                )
    return result


def summarise(run: Run, stages: Sequence[str]) -> dict[str, Any]:
    """The run's figures; see docs/runs.md for the fields."""
    records = run.metrics.records
    evals = [record for record in records if record["kind"] == "eval"]
    first, last = evals[0], evals[-1]
    sft_evals = [record for record in evals if record["stage"] == "sft"]
    after_sft = sft_evals[-1] if "sft" in stages else first
    start = after_sft if "rl" in stages else first
    example, change = _before_and_after(run, start, last)
    by_phase = run.metrics.seconds_by_phase()
    return {
        "method": method_name(run.config) if "rl" in stages else "sft",
        "seed": run.config.seed,
        "initial_accuracy": first["accuracy"],
        "sft_accuracy": after_sft["accuracy"],
        "final_accuracy": last["accuracy"],
        "eval_rows": last["rows"],
        "accuracy_ci95": last["accuracy_ci95"],
        "sft_accuracy_ci95": after_sft["accuracy_ci95"],
        "start": {
            "stage": "rl" if "rl" in stages else "sft",
            **{name: start[name] for name in ("accuracy", "accuracy_ci95", "step_by_step", "completion_length")},
        },
        "change": change,
        "step_by_step": {"sft": after_sft["step_by_step"], "final": last["step_by_step"]},
        "completion_length": {"sft": after_sft["completion_length"], "final": last["completion_length"]},
        "completion_tokens": sum(
            r["completion_tokens"] for r in records if r["kind"] == "train" and r["stage"] == "rl"
        ),
        "seconds_total": round(sum(by_phase.values()), 2),
        "seconds_by_phase": by_phase,
        "example": example,
        "versions": versions(),
    }


def _before_and_after(run: Run, before: dict[str, Any], after: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """From the answers of two evaluations: one question with both answers, the first that went from wrong to right,
    else the first; and how many rows changed, with the interval of the difference."""

    def samples(record: dict[str, Any]) -> list[dict[str, Any]]:
        return read_json_lines(run.folder / "samples" / f"{record['stage']}-eval-{record['step']:06d}.jsonl")

    pairs = list(zip(samples(before), samples(after), strict=True))
    gains = [pair for pair in pairs if pair[1]["correct"] and not pair[0]["correct"]]
    lost = sum(old["correct"] and not new["correct"] for old, new in pairs)
    old, new = gains[0] if gains else pairs[0]
    example = {
        "question": new["question"],
        "target": new["target"],
        "before": old["completion"],
        "after": new["completion"],
    }
    change = {
        "accuracy": after["accuracy"] - before["accuracy"],
        "ci95": list(paired_interval(len(gains), lost, before["correct"], len(pairs))),
        "gained": len(gains),
        "lost": lost,
    }
    return example, change
