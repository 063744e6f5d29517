"""Result files as flat rows: what each one holds, what identifies a row, what its figures mean.

A file is JSON with "benchmark" and "schema"; `read` gives its rows flat, each with the machine it was measured on. The
page, the README's table and `compare` see these rows only.
"""

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"
HARDWARE = ("device", "gpu", "driver", "clocks", "processor", "model", "cores", "threads", "clock")
"""What makes two machines the same one, and times comparable; versions and commit may differ."""
Row = dict[str, Any]


class Column(NamedTuple):
    unit: str
    what: str
    better: str = ""
    """"lower", "higher", or nothing where neither is."""
    exact: bool = False
    """Counted rather than timed: the same on every run."""


COLUMNS: dict[str, Column] = {
    "p50_ms": Column("ms", "median time of one call, forward and backward; of a step, look and update", "lower"),
    "p20_ms": Column("ms", "20th percentile of the same", "lower"),
    "p80_ms": Column("ms", "80th percentile of the same", "lower"),
    "plain_over_this": Column("ratio", "median time of plain torch over this one's, in the same run", "higher"),
    "gb_per_s": Column("GB/s", "bytes that have to move (10^9) over the median time", "higher"),
    "gflop_per_s": Column(
        "GFLOP/s", "FLOPs that have to be done (10^9; a multiply-add is two) over the median", "higher"
    ),
    "ceiling_share": Column(
        "share", "of what this machine did for a copy (bytes) or a square matmul (FLOPs) in the same run", "higher"
    ),
    "peak_mb": Column(
        "MiB", "most memory of one call beyond its inputs, results included; of a step, beyond its state", "lower"
    ),
    "logprobs_s": Column("s", "the no-gradient pass: old log-probs, values, z_1, z_2, reference", "lower"),
    "logprobs_added_s": Column("s", "both phases less an update that makes all its forwards itself", "lower"),
    "update_s": Column("s", "PPO epochs: forward, backward, optimizer", "lower"),
    "step_s": Column("s", "log-probs and update, and sampling and weight sync where a sampler is named", "lower"),
    "samples_per_s": Column("1/s", "rollouts trained on a second", "higher"),
    "utilisation": Column("share", "FLOPs the fast path needs, over time, over the matmul ceiling", "higher"),
    "update_peak_mb": Column("MiB", "peak of log-probs and first epoch beyond model and optimizer state", "lower"),
    "beyond_gradients_mb": Column("MiB", "the same beyond the gradients, which every path holds in full", "lower"),
    "tokens_per_s": Column("1/s", "completion tokens sampled a second, padding not counted", "higher"),
    "sync_ms": Column("ms", "weights from trainer to sampler, median", "lower"),
    "sync_cpu_ms": Column("ms", "processor time of the same, median; other processes disturb it less", "lower"),
    "tokens_per_cpu_s": Column("1/s", "completion tokens sampled a second of processor time", "higher"),
    "over_ours": Column("ratio", "time over that of `linear_policy_loss`, in the same turn", ""),
    "over_before": Column("ratio", "that rate over the one of the sampler before it, in the same turn", "higher"),
    "tokens_per_forward": Column("1", "completion tokens that a forward of a sequence yields", "higher", True),
    "accepted": Column("share", "drafted tokens that stood", "higher", True),
    "seconds_without": Column("s", "the same without drafts", "lower"),
    "wasted_per_token": Column("1", "drafted tokens that did not stand, a completion token", "lower", True),
    "nats_per_token": Column("nats", "mean -log-prob of the sampled tokens", "lower", True),
    "identical": Column("share", "completions that are the same with drafts and without", "higher", True),
    "mean_nats": Column("nats", "mean |trainer's - sampler's log-prob|", "lower"),
    "largest_nats": Column("nats", "largest of them", "lower"),
    "weight_error": Column("share", "of LoRA's update that the sampler's weights miss, Frobenius norm", "lower"),
    "sync_bytes": Column("B", "that a sync sends", "lower", True),
    "programs_per_s": Column("1/s", "programs run a second", "higher"),
    "seconds": Column("s", "best of the repeats", "lower"),
    "memory_mb": Column("MiB", "most memory of log-probs and first epoch beyond model and optimizer state", "lower"),
    "registers": Column("1", "registers a thread", "lower", True),
    "stack_bytes": Column("B", "stack a thread: where spills go", "lower", True),
    "shared_bytes": Column("B", "shared memory a program", "lower", True),
    "spills_in_loops": Column("1", "local loads and stores inside loops", "lower", True),
    "warps_per_sm": Column("1", "warps that fit an SM at once", "higher", True),
    "floor_ms": Column("ms", "vendor's peak memory or matmul rate for what the kernel must do", "", True),
    "bound_over_floor": Column(
        "ratio", "busiest part of the chip, were nothing to wait, over the floor", "lower", True
    ),
    "epilogue_over_product": Column(
        "ratio", "busiest part of the chip outside of the K loop, over the tensor cores inside", "lower", True
    ),
    "loaded_bytes": Column("B", "global memory that kernels ask for", "lower", True),
    "stored_bytes": Column("B", "global memory that kernels write", "lower", True),
    "flops": Column("FLOP", "of matrix products; a multiply-add is two", "lower", True),
    "traffic_bytes": Column("B", "bytes that have to move through device memory", "lower", True),
    "resident_mb": Column("MiB", "resident memory of the trainer's process", "lower"),
    "open_files": Column("1", "its open files, mean over the steps of a row", "lower"),
    "threads": Column("1", "its threads, the same", "lower"),
    "children": Column("1", "its child processes, the same", "lower"),
    "ms_per_token": Column("ms", "wall clock of a step's phases, a completion token", "lower"),
    "cpu_ms_per_token": Column("ms", "processor time since the record before, a completion token", "lower"),
    "agreement": Column("nats", "largest difference of a token's log-prob, trainer against vLLM", "lower"),
}


class Results(NamedTuple):
    benchmark: str
    key: tuple[str, ...]
    rows: list[Row]
    """Flat; "machine" is a dict."""

    def machines(self) -> list[dict[str, str]]:
        found: list[dict[str, str]] = []
        for row in self.rows:
            if row["machine"] not in found:
                found.append(row["machine"])
        return found


@dataclass(frozen=True)
class Schema:
    """How a file of one benchmark is laid out."""

    version: int
    key: tuple[str, ...]
    flatten: Callable[[Any], Iterator[Row]]


def read(file: Path) -> Results:
    from carft_fast.core import InputError  # a bare GPU machine writes rows, and lacks what this imports

    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: is not JSON: {error}") from None
    if isinstance(data, dict) and {"machine_info", "benchmarks"} <= data.keys():  # of pytest-benchmark
        from benchmarks.ops.table import rows_of

        return Results("ops", SCHEMAS["ops"].key, [row | {"machine": data["machine_info"]} for row in rows_of([data])])
    benchmark = data.get("benchmark") if isinstance(data, dict) else None
    if benchmark not in SCHEMAS:
        raise InputError(f'{file}: "benchmark" is {benchmark!r}, has to be one of {", ".join(SCHEMAS)}')
    schema = SCHEMAS[benchmark]
    if data.get("schema") != schema.version:
        raise InputError(
            f'{file}: "schema" of {benchmark} is {data.get("schema")!r}, this version reads {schema.version}'
        )
    rows = [row | {"machine": as_machine(row["machine"])} for row in schema.flatten(data)]
    return Results(benchmark, schema.key, rows)


def read_peers(file: Path) -> list[Row]:
    """Rows of `benchmarks.peers`, each with the work and the machine of its case."""
    data = json.loads(file.read_text(encoding="utf-8"))
    cases = {
        name: {"work": case["work"], "machine": as_machine(case["machine"])} for name, case in data["cases"].items()
    }
    return [row | cases[row["case"]] for row in data["rows"]]


def write(file: Path, benchmark: str, machine: dict[str, str], rows: list[Row]) -> None:
    """A file of flat rows of one machine, which `read` is sure to know."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"benchmark": benchmark, "schema": SCHEMAS[benchmark].version, "machine": machine, "rows": rows})


def write_json(file: Path, data: Any) -> None:
    """All of it or nothing: the process may be killed."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    new.replace(file)


def as_machine(machine: dict[str, Any] | str) -> dict[str, str]:
    """Of "name value, name value"."""
    if isinstance(machine, dict):
        return {name: str(value) for name, value in machine.items()}
    return dict(part.split(" ", 1) for part in machine.split(", "))


def hardware(machine: dict[str, str]) -> dict[str, str]:
    return {"device": "cpu", "clock": "wall"} | {name: machine[name] for name in HARDWARE if name in machine}


def processor_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Its name, and the numbers that tell generations apart: in virtual machines all may be just "AMD EPYC"."""
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    numbers = [f"{name} {found[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in found]
    # the name goes into lists that commas part
    return re.sub(r"[\s,]+", " ", " ".join([found.get("model name", ""), *numbers])).strip() or "unknown"


def this_machine(device: str = "cpu") -> dict[str, str]:
    return {
        "device": device,
        "processor": platform.machine(),
        "model": processor_model(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """CARFT_COMMIT where it is set, for a copy of the files alone; else of the working directory's repository, "-dirty"
    where a file has changed that is no result; "unknown" without either."""
    if given := os.environ.get("CARFT_COMMIT"):
        return given
    if shutil.which("git") is None:
        return "unknown"
    found = _git("describe", "--always").stdout.strip()
    changed = _git("diff", "--quiet", "HEAD", "--", ":(top)", ":(top,exclude)benchmarks/results").returncode
    return f"{found}{'-dirty' if changed else ''}" if found else "unknown"


def commits_of(rows: Iterable[Row]) -> list[str]:
    """The commits that rows were measured on, in the order of the rows. Counts have no machine, so no commit."""
    machines = (row["machine"] for row in rows)
    return list(dict.fromkeys(machine["commit"] for machine in machines if "commit" in machine))


def newest(commits: Iterable[str]) -> str | None:
    """The one that git dates last, a clean tree before a "-dirty" one of the same commit; None if git knows none."""
    dates: dict[str, tuple[int, bool]] = {}
    for commit in commits if shutil.which("git") else ():
        found = _git("log", "-1", "--format=%ct", "--end-of-options", commit.removesuffix("-dirty"), "--")
        if found.returncode == 0:
            dates[commit] = (int(found.stdout), not commit.endswith("-dirty"))
    return max(dates, key=lambda commit: dates[commit]) if dates else None


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)


def _flat(data: Any) -> Iterator[Row]:
    for row in data["rows"]:
        yield {"machine": data.get("machine")} | row


def _step(data: Any) -> Iterator[Row]:
    for case in data["cases"]:
        for row in case["rows"]:
            yield {
                "machine": case["machine"],
                "case": case["case"],
                "path": row["path"],
                "sampler": row["sampler"],
                "logprobs_s": row["seconds"]["log-probs"],
                "logprobs_added_s": row["log_probs_added_seconds"],
                "update_s": row["seconds"]["update"],
                "step_s": row["step_seconds"],
                "samples_per_s": row["samples_per_second"],
                "utilisation": row["utilisation"],
                "update_peak_mb": row["update_peak_extra_mb"],
                "beyond_gradients_mb": row["beyond_gradients_mb"],
                "logprobs_range": row["range"]["log-probs"],
                "update_range": row["range"]["update"],
            }
    for row in data.get("slope", ()):
        case = {"case": "growth with tokens", "path": "fast", "size": row["tokens"]}
        yield case | {"machine": data["growth_machine"], "seconds": row["seconds"]}
    for row in data.get("vocabulary", ()):
        for path in ("fast", "padded"):
            case = {"case": "growth with the vocabulary", "path": path, "size": row["vocabulary"]}
            yield case | {"machine": data["growth_machine"], "memory_mb": row[path]}
    for row in (*data.get("rollouts", ()), *data.get("smollm2_rollouts", ())):
        model = f"{row['model']}, " if "model" in row else ""
        for path in (name for name in row if name not in ("rollouts", "model", "machine")):
            case = {"case": "growth with rollouts", "path": f"{model}{path}", "size": row["rollouts"]}
            yield case | {"machine": row.get("machine", data["growth_machine"]), "memory_mb": row[path]}


def _rollout(data: Any) -> Iterator[Row]:
    for row in data["rows"]:
        found = {
            **{name: row[name] for name in ("machine", "model", "dtype", "engine")},
            "tokens_per_s": row["tokens_per_second"],
            "tokens_per_s_range": row["range"],
        }
        yield found if row["engine"] == "hf" else found | {"sync_ms": 1e3 * row["sync_seconds"]}  # "hf" copies nothing


def _sandbox(data: Any) -> Iterator[Row]:
    for name in ("pool", "fresh interpreter"):
        rates = data[name]
        rate = {"programs_per_s": statistics.median(rates), "programs_per_s_range": [min(rates), max(rates)]}
        yield {"machine": data["machine"], "way": name} | rate


SCHEMAS = {
    "ops": Schema(2, ("case", "variant"), _flat),
    "growth": Schema(1, ("operator", "against", "size", "variant"), _flat),
    "step": Schema(1, ("case", "path", "size"), _step),
    "rollout": Schema(1, ("model", "dtype", "engine"), _rollout),
    "sync": Schema(1, ("model", "dtype", "way"), _flat),
    "drafts": Schema(1, ("model", "dtype", "batch", "sampler"), _flat),
    "draft_run": Schema(2, ("model", "epoch"), _flat),
    "lora_sync": Schema(1, ("model", "way", "updates"), _flat),
    "trl_grpo": Schema(1, ("side",), _flat),
    "sandbox": Schema(1, ("way",), _sandbox),
    "kernels_aot": Schema(1, ("kernel", "configuration", "chip"), _flat),
    "counts": Schema(1, ("what", "case"), _flat),
    "long_run": Schema(1, ("engine", "step"), _flat),
    "gpu": Schema(1, ("part", "what"), _flat),
}
