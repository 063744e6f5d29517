"""What is common to all that times operators: clocks, ceilings, a check of the results, memory, rows.

What a variant returns, gradients too, is compared with plain torch before it is timed; one that disagrees or raises is
reported with the reason and is not timed. Ceilings are a copy and a square matmul on the same machine in the same run.
On the CPU pytest-benchmark times the operators (test_operators.py). On a GPU (`benchmarks.gpu`) CUDA events give the
time, the variants of a case take turns, and the L2 cache is overwritten before every call.
"""

import argparse
import ctypes
import gc
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.cases import CHUNKED, MATMULS, PLAIN, Case, Maker, Step, Variants
from benchmarks.rows import COLUMNS, Row
from carft_kernels import cpu_linear

BUDGET_SECONDS, FEWEST, MOST = 10.0, 5, 101
WRONG, FAILED = "wrong", "failed"
BAD = (WRONG, FAILED)
Ceilings = dict[str, Any]
"""Bytes and FLOP a second of this machine, and which device it is."""


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Time of the processor leaves out what other processes took; with one thread on a quiet machine they are equal."""


def seconds(step: Callable[[], Any], device: str = "cpu", clock: str = "wall") -> float:
    """By `clock` on the CPU, by events on a GPU: from where its queue begins with the step to where it ends it."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    now = CLOCKS[clock]
    begin = now()
    step()
    return now() - begin


def flusher(device: str) -> Callable[[], Any]:
    """Overwrites a GPU's L2 cache, three times over: no step finds its inputs there."""
    if device != "cuda":
        return lambda: None
    size = 3 * torch.cuda.get_device_properties(0).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device=device).zero_


def ceilings(device: str, clock: str) -> Ceilings:
    """Bytes a second of a copy, FLOP a second of a square matmul, torch's or oneDNN's; the best of several."""
    wide = device == "cuda"
    x = torch.ones((1 << 30) if wide else (1 << 26), dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    n, dtype = (8192, torch.bfloat16) if wide else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def copy() -> float:
        return 2 * x.numel() * 4 / seconds(lambda: y.copy_(x), device, clock)

    def matmul(multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        return 2 * n**3 / seconds(lambda: multiply(a, b), device, clock)

    products = [torch.matmul] if wide else [torch.matmul, cpu_linear]
    copy(), *map(matmul, products)
    flops = max(matmul(p) for p in products for _ in range(7))
    return {"device": device, "bytes": max(copy() for _ in range(7)), "flops": flops}


def disagreement(found: list[Tensor], wanted: list[Tensor]) -> str:
    """Empty where they agree: within 1e-3 of the largest value, 3% where a result is in half precision."""
    half = any(x.dtype in (torch.float16, torch.bfloat16) for x in (*found, *wanted))
    share = 3e-2 if half else 1e-3
    for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
        if not x.is_floating_point():
            if not torch.equal(x, y):
                return f"{WRONG}: result {i} differs in {(x != y).sum()} places"
            continue
        difference, largest = (x.double() - y.double()).abs().max().item(), y.double().abs().max().item()
        if not difference <= share * largest + 1e-6:
            return f"{WRONG}: result {i} is off by {difference:.2g} where the largest value is {largest:.2g}"
    return ""


def checked(variants: Variants, wanted: list[Tensor] | None = None) -> tuple[dict[str, Step], dict[str, str]]:
    """Those that ran and agree with plain torch's results, and why the others are left out."""
    plain = variants[PLAIN]
    assert callable(plain)
    wanted = plain() if wanted is None else wanted
    good: dict[str, Step] = {}
    left_out: dict[str, str] = {}
    for name, step in variants.items():
        if isinstance(step, str):
            left_out[name] = step
        elif name in (PLAIN, MATMULS):
            good[name] = step
        else:
            try:
                why = disagreement(step(), wanted)
            except Exception as error:  # of another library, a compiler or a kernel: its row says so
                why = failure(error)
            if why:
                left_out[name] = why
            else:
                good[name] = step
    return good, left_out


def failure(error: Exception) -> str:
    """For a row. Raises the error where the GPU answers nothing any more: all that follows would fail by it."""
    if not gpu_answers():
        raise error
    return reason(error)


def reason(error: Exception) -> str:
    return f"{FAILED}: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def gpu_answers() -> bool:
    """False after a kernel has read where it must not: then no call of this process succeeds any more."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def share_off(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference of a result from what is wanted, as a share of its largest value."""
    pairs = [(x.detach().double(), y.detach().double()) for x, y in zip(found, wanted, strict=True)]
    return max(float((x - y).abs().max() / y.abs().max().clamp(min=1e-30)) for x, y in pairs)


def against_float64(case: Case, device: str, dtype: torch.dtype) -> dict[str, str]:
    """For each variant of our own, how far it and plain torch are from plain torch in float64 on the same inputs."""
    oracle = case.build(Maker(device, dtype, exact=True), **case.shape)[PLAIN]
    variants = case.build(Maker(device, dtype), **case.shape)
    plain = variants[PLAIN]
    assert callable(oracle)
    assert callable(plain)
    wanted = oracle()
    plain_off = share_off(plain(), wanted)
    found: dict[str, str] = {}
    for name, step in variants.items():
        if callable(step) and name.startswith((case.operator, CHUNKED)):
            try:
                results = step()
                off = f"off by {share_off(results, wanted):.2g} of the largest value, plain torch by {plain_off:.2g}"
                found[name] = disagreement(results, wanted) or off
            except Exception as error:  # of a compiler or a kernel: its row says so
                found[name] = failure(error)
    return found


def timed(steps: dict[str, Step], device: str, clock: str, budget: float = BUDGET_SECONDS) -> dict[str, list[float]]:
    """Seconds of every call: rounds in which each variant has its turn, until the budget is spent."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    flush = flusher(device)
    for step in steps.values():
        seconds(step, device, clock)
    start = CLOCKS[clock]()
    rounds = 0
    while rounds < FEWEST or (rounds < MOST and CLOCKS[clock]() - start < budget):
        for name, step in steps.items():
            flush()
            found[name].append(seconds(step, device, clock))
        rounds += 1
    return found


def row_of(case: Case, variant: str, times: list[float], peak: float | None, plain: float, ceiling: Ceilings) -> Row:
    cuts = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times
    p50 = statistics.median(times)
    size = 4 if ceiling["device"] == "cpu" else 2
    work = {"bytes": case.bytes(size=size, **case.shape), "flops": case.flops(**case.shape)}
    row: Row = {
        "case": case.name,
        "variant": variant,
        "p20_ms": 1e3 * cuts[0],
        "p50_ms": 1e3 * p50,
        "p80_ms": 1e3 * cuts[-1],
        "rounds": len(times),
        "plain_over_this": plain / p50,
    }
    if peak is not None:
        row["peak_mb"] = peak
    if work["bytes"]:
        row["gb_per_s"] = work["bytes"] / p50 / 1e9
    if work["flops"]:
        row["gflop_per_s"] = work["flops"] / p50 / 1e9
    if any(work.values()):
        row["ceiling_share"] = sum(work[kind] / ceiling[kind] for kind in work) / p50
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}


def resident_kb(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1))


def _peaks_in_child(case: Case, names: list[str], pipe: Any) -> None:
    variants = case.variants("cpu")
    peaks = {}
    for name in names:
        step = variants[name]
        assert callable(step)
        step()  # imports and compiles
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of what came before
        before = resident_kb("VmRSS")
        result = step()
        peaks[name] = (resident_kb("VmHWM") - before) / 1024
        del result
    pipe.send(peaks)


def peaks_mb(case: Case, steps: dict[str, Step], device: str) -> dict[str, float]:
    """Most memory of one call of each beyond its inputs; on the CPU in another process."""
    if device == "cuda":
        return {name: _peak_on_gpu(step) for name, step in steps.items()}
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_peaks_in_child, args=(case, list(steps), sender))
    child.start()
    child.join()
    if not receiver.poll():
        raise RuntimeError(f"{case.name}: the process that measures memory ended with {child.exitcode}")
    peaks: dict[str, float] = receiver.recv()
    return peaks


def _peak_on_gpu(step: Step) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure_case(
    case: Case, device: str, ceiling: Ceilings, clock: str = "wall", budget: float = BUDGET_SECONDS
) -> list[Row]:
    """A row for each variant: its figures, or why it has none."""
    variants = case.variants(device)
    plain = variants[PLAIN]
    assert callable(plain)
    wanted: list[Tensor] = []
    once = seconds(lambda: wanted.extend(plain()), device, clock)
    steps, left_out = checked(variants, wanted)
    wanted.clear()
    times = {PLAIN: [once]}
    if case.slow_oracle and device == "cuda":
        del steps[PLAIN]
    times |= timed(steps, device, clock, budget)
    peaks = peaks_mb(case, steps, device)
    rows: list[Row] = []
    for variant in variants:
        if variant in left_out:
            rows.append({"case": case.name, "variant": variant, "why": left_out[variant]})
            continue
        rows.append(row_of(case, variant, times[variant], peaks.get(variant), statistics.median(times[PLAIN]), ceiling))
        print(f"{case.name}, {variant}: {rows[-1]['p50_ms']:g} ms", flush=True)
    torch.compiler.reset()
    return rows


def ceiling_rows(ceiling: Ceilings) -> Iterator[Row]:
    for kind, name, variant in (("bytes", "gb_per_s", "copy"), ("flops", "gflop_per_s", "square matmul")):
        yield {"case": "ceiling of this run", "variant": variant, name: round(ceiling[kind] / 1e9, 1)}


def bad_rows(rows: list[Row]) -> list[Row]:
    """Of variants that disagree with plain torch, or raised."""
    return [row for row in rows if row.get("why", "").startswith(BAD)]


FIGURES = ("p50_ms", "p20_ms", "p80_ms", "plain_over_this", "gb_per_s", "gflop_per_s", "ceiling_share", "peak_mb")


def report(rows: list[Row], machine: dict[str, str]) -> str:
    dtype = "float32" if machine["device"] == "cpu" else "bfloat16"
    lines = [
        f"# Operators on {'the CPU' if machine['device'] == 'cpu' else machine['gpu']}, {dtype}",
        "",
        *(f"- {name} ({COLUMNS[name].unit}): {COLUMNS[name].what}" for name in FIGURES),
        "",
        f"| case | variant | {' | '.join(FIGURES)} |",
        "| --- | --- |" + " --- |" * len(FIGURES),
    ]
    for row in rows:
        cells = [f"{row[name]:g}" if name in row else "" for name in FIGURES]
        cells[0] = row.get("why", cells[0])
        lines.append(f"| {row['case']} | {row['variant']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", ", ".join(f"{name} {value}" for name, value in machine.items()), ""])


def add_clock(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: on a machine with other work, 1 thread"
    )


def clock_of(arguments: argparse.Namespace) -> dict[str, str]:
    if arguments.clock == "cpu" and torch.get_num_threads() != 1:
        sys.exit(f"--clock cpu: has to be with OMP_NUM_THREADS=1, there are {torch.get_num_threads()} threads")
    return {"clock": arguments.clock}
