"""Does a long run leak? RL steps of the quickstart's model with memory, open files, processes and seconds of each step.

    python -m benchmarks.long_run --steps 1000 [--engine vllm]

The run is the command line's own, in a process of its own, which is looked at from outside after every step. Slopes are
least squares over the steps after a warm-up of a tenth; engine "hf" and "vllm" live in the trainer's process.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.rows import RESULTS, commit
from carft_fast.run import versions


def look(pid: int) -> dict[str, float]:
    proc = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    children = (proc / "task" / str(pid) / "children").read_text().split()
    return {
        "resident_mb": int(status["VmRSS"].split()[0]) / 1024,
        "open_files": len(os.listdir(proc / "fd")),
        "threads": int(status["Threads"]),
        "children": len(children),
    }


def slope(values: list[float]) -> float:
    """Of the least-squares line, per 1,000 steps."""
    n = len(values)
    mean_x, mean_y = (n - 1) / 2, sum(values) / n
    return (
        1000 * sum((x - mean_x) * (y - mean_y) for x, y in enumerate(values)) / sum((x - mean_x) ** 2 for x in range(n))
    )


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
        position = 0
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
                    if (record["stage"], record["kind"]) == ("rl", "train"):
                        phases = ("rollout", "reward", "forward", "update", "sync")
                        seconds = sum(record["seconds"].get(phase, 0.0) for phase in phases)
                        tokens = record["completion_tokens"]
                        seen.append(look(process.pid) | {"ms_per_token": 1000 * seconds / tokens})
        assert process.returncode == 0, f"the run ended with {process.returncode}"
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--engine", choices=["hf", "vllm"], default="hf")
    parser.add_argument("--note", default="")
    options = parser.parse_args()
    seen = measure(options.steps, options.engine)
    warm = seen[len(seen) // 10 :]
    rows = []
    for name in warm[0]:
        values = [entry[name] for entry in warm]
        tenth = max(1, len(values) // 10)
        first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
        rows.append(f"| {name} | {first:.3f} | {last:.3f} | {max(values):.3f} | {slope(values):.4f} |")
    machine = f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {versions()['torch']}"
    lines = [
        f"# {len(seen)} RL steps of the quickstart's model, engine {options.engine!r}",
        "",
        f"`python -m benchmarks.long_run --steps {options.steps} --engine {options.engine}`",
        f"Commit {commit()}, {machine}.",
        f"After a warm-up of a tenth of the steps. {options.note}".strip(),
        "",
        "| of the trainer's process | first tenth | last tenth | highest | slope in 1,000 steps |",
        "| --- | --- | --- | --- | --- |",
        *rows,
    ]
    (RESULTS / f"long_run_{options.engine}_cpu.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
