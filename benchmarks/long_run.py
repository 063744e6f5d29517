"""Does a long run leak? RL steps of the quickstart's model with memory, open files, processes and time of each step.

    python -m benchmarks.long_run --steps 1000 [--engine vllm]

The run is the command line's own, in a process of its own, which is looked at from outside after every step. Of a
step's time, ms_per_token is the wall clock's for its phases, and cpu_ms_per_token the processor's since the record
before (after an evaluation another one begins), which other work on the machine hardly changes. Slopes are least
squares over the steps after a warm-up of a tenth; engine "hf" and "vllm" live in the trainer's process. Writes
benchmarks/results/long_run_<engine>_cpu.json, whose rows are means over a hundredth of the steps, and .md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.rows import COLUMNS, RESULTS, Row, this_machine, write

ENGINES, ROWS = ("hf", "vllm"), 100
FIGURES = ("resident_mb", "open_files", "threads", "children", "ms_per_token", "cpu_ms_per_token")


def look(pid: int) -> dict[str, float]:
    proc = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    children = (proc / "task" / str(pid) / "children").read_text().split()
    return {
        "resident_mb": int(status["VmRSS"].split()[0]) / 1024,
        "open_files": len(os.listdir(proc / "fd")),
        "threads": int(status["Threads"]),
        "children": len(children),
        "cpu_s": cpu_seconds(pid),
    }


def cpu_seconds(pid: int) -> float:
    """In user and kernel mode, of all threads of the process."""
    # fields 14 and 15, counted behind the name, which may hold spaces
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(steps: int, engine: str) -> list[dict[str, float]]:
    settings = {
        "sft.max_steps": 300,
        "rl.max_steps": steps,
        "rl.batch_size": 16,
        "rl.mini_batch_size": 16,
        "rl.save_every": 100,
        "rl.eval_every": 250,
        "data.eval_rows": 50,
        "rollout.max_new_tokens": 48,
        "rollout.engine": engine,
        "rollout.kv_cache_gib": 0.25,
        "output.samples_per_step": 0,
    }
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "carft_fast", "quickstart", "--output-dir", str(run), *options]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        seen: list[dict[str, float]] = []
        position, cpu_s = 0, 0.0
        while process.poll() is None:
            time.sleep(0.02)
            metrics = run / "metrics.jsonl"
            if not metrics.is_file():
                continue
            with metrics.open() as file:
                file.seek(position)
                for line in iter(file.readline, ""):
                    if not line.endswith("\n"):
                        break
                    position += len(line.encode())
                    record = json.loads(line)
                    now = look(process.pid)
                    spent, cpu_s = now["cpu_s"] - cpu_s, now["cpu_s"]
                    if (record["stage"], record["kind"]) == ("rl", "train"):
                        phases = ("rollout", "reward", "forward", "update", "sync")
                        seconds = sum(record["seconds"].get(phase, 0.0) for phase in phases)
                        tokens = record["completion_tokens"]
                        times = {"ms_per_token": 1e3 * seconds / tokens, "cpu_ms_per_token": 1e3 * spent / tokens}
                        seen.append(now | times)
        assert process.returncode == 0, f"the run ended with {process.returncode}"
    return seen


def rows_of(engine: str, seen: Sequence[dict[str, float]]) -> list[Row]:
    """Means over a hundredth of the steps, all of as many but the last; "step" is the last one's number."""
    size = -(-len(seen) // ROWS)
    rows: list[Row] = []
    for start in range(0, len(seen), size):
        block = seen[start : start + size]
        means = {name: round(statistics.fmean(entry[name] for entry in block), 4) for name in FIGURES}
        rows.append({"engine": engine, "step": start + len(block)} | means)
    return rows


class Trend(NamedTuple):
    """Of one figure after the warm-up."""

    first: float
    """Mean of the first tenth."""
    last: float
    highest: float
    slope: float
    """In 1,000 steps."""


def trend(values: Sequence[float], steps_each: float = 1.0) -> Trend:
    """`values` in the order of the run, `steps_each` steps apart."""
    warm = values[len(values) // 10 :]
    tenth = max(1, len(warm) // 10)
    first, last = statistics.fmean(warm[:tenth]), statistics.fmean(warm[-tenth:])
    return Trend(first, last, max(warm), 1000 * statistics.linear_regression(range(len(warm)), warm).slope / steps_each)


def report(engine: str, seen: Sequence[dict[str, float]], machine: dict[str, str]) -> str:
    rows = []
    for name in FIGURES:
        found = trend([entry[name] for entry in seen])
        rows.append(f"| {name} | {found.first:.3f} | {found.last:.3f} | {found.highest:.3f} | {found.slope:.4f} |")
    lines = [
        f"# {len(seen)} RL steps of the quickstart's model, engine {engine!r}",
        "",
        *(f"- {name} ({COLUMNS[name].unit}): {COLUMNS[name].what}" for name in FIGURES),
        "",
        "After a warm-up of a tenth of the steps.",
        "",
        "| of the trainer's process | first tenth | last tenth | highest | slope in 1,000 steps |",
        "| --- | --- | --- | --- | --- |",
        *rows,
    ]
    return "\n".join([*lines, "", ", ".join(f"{name} {value}" for name, value in machine.items()), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--engine", choices=ENGINES, default="hf")
    parser.add_argument("--note", default="", help="goes into the machine's line: what else ran, say")
    arguments = parser.parse_args()
    if arguments.steps < 4:
        parser.error(f"--steps {arguments.steps}: has to be at least 4, for a slope")
    machine = this_machine() | ({"note": arguments.note} if arguments.note else {})
    seen = measure(arguments.steps, arguments.engine)
    file = RESULTS / f"long_run_{arguments.engine}_cpu.json"
    write(file, "long_run", machine, rows_of(arguments.engine, seen))
    text = report(arguments.engine, seen, machine)
    file.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
