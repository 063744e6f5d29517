"""Static evidence about the Triton kernels, on a machine without a GPU: `make kernels-aot`.

Compiles every kernel, in every configuration that ships, for sm_80, sm_90 and sm_100, with an aligned and an odd
vocabulary; reads the machine code; writes benchmarks/results/kernels_aot.md and .json; exits 1 when a line is crossed.

The bound is no measurement. It is the time the busiest part of the chip needs if nothing else ever waits: global memory
for the bytes a kernel must move, or an SM's tensor, special-function, multiply-add, integer or issue slots for the
instructions in the machine code. The ratio to the floor says what the instructions cost beyond the bytes (streaming)
or the matrix product (matmul).
"""

import argparse
import collections
import json
import math
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.kernel_cases import ALIGNED, CHIPS, ODD, TOKENS, WIDTH, Case, Chip, all_cases

RESULTS = Path(__file__).parent / "results"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


# By version of Triton: lines that its code crosses and that are accepted there, and why. No other line is.
ACCEPTED = {
    "3.9": (
        (
            r"matmul_lse_kernel \(LM head, logits.*\) sm_(80|100): stack of 1?\d\d bytes",
            "registers kept in memory outside of the K loop, once a tile; inside it there is none",
        ),
        (
            r"lcs_table_kernel \(up to 8192 tokens\) sm_(90|100): 1 local loads or stores inside a loop",
            "one for a row of 8,192 columns, which takes 1,700 cycles",
        ),
    ),
    "3.6": (
        (
            r"logprob_fwd_kernel \(fp32.*\) sm_\d+: [13]\.250 MUFU per element",
            "three rescalings more for 16 logits; memory bounds the kernel all the same",
        ),
        (
            r"logprob_fwd_kernel \(bf16, entropy.*\) sm_100: bound 1\.131 of the floor",
            "more instructions than later versions make; Triton 3.9 stays within 1.10",
        ),
        (
            r"matmul_lse_kernel \(.*\) sm_(80|100): stack of [12]\d\d bytes",
            "registers kept in memory outside of the K loop, once a tile; inside it there is none",
        ),
    ),
}


def accepted(line: str) -> str | None:
    """Why a line may be crossed with this version of Triton; None where it may not."""
    known = ACCEPTED.get(".".join(triton.__version__.split(".")[:2]), ())
    return next((why for pattern, why in known if re.fullmatch(pattern, line)), None)


@dataclass
class Code:
    """Machine code of one kernel."""

    instructions: list[tuple[str, str]] = field(default_factory=list)  # opcode, operands
    loops: list[tuple[int, int]] = field(default_factory=list)  # first and last instruction


_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P[T0-9]+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;")


def read_code(disassembly: str) -> Code:
    code, labels, waiting = Code(), {}, []
    last_exit = 0
    for line in disassembly.splitlines():
        label = re.match(r"^(\.L_x_\d+):", line)
        if label:
            waiting.append(label.group(1))
        elif found := _INSTRUCTION.match(line):
            for name in waiting:
                labels[name] = len(code.instructions)
            waiting = []
            predicate, opcode, operands = found.groups()
            if opcode == "EXIT" and not predicate:
                last_exit = len(code.instructions)
            code.instructions.append((opcode, operands))
    for i, (opcode, operands) in enumerate(code.instructions):
        target = re.search(r"\.L_x_\d+", operands) if opcode.startswith("BRA") else None
        start = labels.get(target.group(0), i) if target else i
        # shorter ones wait for a barrier; what lies behind the last exit retries such a wait
        if start < i - 6 and i < last_exit:
            code.loops.append((start, i))
    return code


PIPES = (
    ("tensor", ("HGMMA", "HMMA", "UTCHMMA")),
    ("mufu", ("MUFU",)),
    ("fma", ("FFMA", "FADD", "FMUL", "IMAD", "HFMA2", "HADD2", "HMUL2")),
    ("spill", ("LDL", "STL")),
    ("memory", ("LDG", "STG", "LDS", "STS", "ATOM", "RED", "SHFL", "UTMA", "UBLKCP", "LDTM", "STTM")),
    (
        "control",
        ("BAR", "SYNCS", "DEPBAR", "WARPGROUP", "MEMBAR", "FENCE", "WARPSYNC", "B", "NOP", "EXIT", "CALL", "RET"),
    ),
)


def pipe_of(opcode: str) -> str:
    for pipe, prefixes in PIPES:
        if opcode.startswith(prefixes):
            return pipe
    return "uniform" if opcode.startswith("U") else "alu"


def mma_flop(opcode: str) -> int:
    """Of one instruction of a group of four warps; UTCHMMA keeps its shape in a descriptor."""
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
        return 2 * math.prod(map(int, shape.groups()))
    if shape := re.match(r"HMMA\.16(8)(16|8)", opcode):
        return 2 * 4 * 16 * 8 * int(shape.group(2))
    return 0


def cycles(code: list[tuple[str, str]], chip: Chip, warps: int, tensor_rate: float) -> dict[str, float]:
    """What one program asks of each pipe of its SM."""
    counts = collections.Counter(pipe_of(opcode) for opcode, _ in code)
    packed = sum(opcode.startswith(("FFMA2", "FADD2", "FMUL2")) for opcode, _ in code)  # two lanes' work in one issue
    flop = sum(mma_flop(opcode) for opcode, _ in code) * warps / 4
    return {
        "tensor": flop / (chip.flop * tensor_rate),
        "mufu": counts["mufu"] * warps * 32 / chip.mufu,
        "fma": (counts["fma"] + packed) * warps * 32 / chip.fma,
        "alu": counts["alu"] * warps * 32 / chip.alu,
        "issue": len(code) * warps / 4,
    }


def wide_loads(code: list[tuple[str, str]]) -> tuple[int, int]:
    """128-bit and narrower global loads."""
    loads = [opcode for opcode, _ in code if opcode.startswith("LDG") and not opcode.startswith("LDGDEPBAR")]
    wide = sum(".128" in opcode for opcode in loads)
    return wide, len(loads) - wide


def compile_case(case: Case, cc: int) -> tuple[bytes, int]:
    names = list(case.kernel.arg_names)
    options = dict(case.options)
    launch = {k: options.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion") if k in options}
    values = {**case.arguments, **options}
    types = {n: v if isinstance(v := values[n], str) and n not in options else "constexpr" for n in names}
    changing = [*case.kernel.do_not_specialize, *case.kernel.do_not_specialize_on_alignment]  # names
    source = ASTSource(
        fn=case.kernel,
        signature=types,
        constexprs={(i,): values[n] for i, n in enumerate(names) if types[n] == "constexpr"},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(names)
            if (types[n].startswith("*") or types[n] == "i32") and n not in {*case.unaligned, *changing}
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32), options={"enable_fp_fusion": True, **launch})
    return compiled.asm["cubin"], compiled.metadata.shared


def run_tool(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def inspect(case: Case, cc: int) -> dict[str, Any]:
    """One row of the report; `failed` lists the lines it crosses."""
    chip, warps = CHIPS[cc], case.options["num_warps"]
    cubin, shared = compile_case(case, cc)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = read_code(run_tool("nvdisasm", "-c", file.name))
        usage = run_tool("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    registers, stack = map(int, found.groups())
    per_warp = math.ceil(max(registers, 24) * 32 / 256) * 256
    resident = min(65_536 // per_warp // warps, 64 // warps, 32)
    if shared:
        resident = min(resident, (chip.shared_limit + 1024) // (shared + 1024))
    in_loops = [code.instructions[s : e + 1] for s, e in code.loops]
    spills = sum(pipe_of(opcode) == "spill" for body in in_loops for opcode, _ in body)
    row: dict[str, Any] = {
        "kernel": case.kernel.__name__,
        "configuration": case.label,
        "kind": case.kind,
        "chip": f"sm_{cc}",
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": shared,
        "warps_per_sm": resident * warps,
        "spills_in_loops": spills,
    }
    failed = []
    if spills:
        failed.append(f"{spills} local loads or stores inside a loop")
    if stack > 64:
        failed.append(f"stack of {stack} bytes")
    if shared > chip.shared_limit:
        failed.append(f"{shared} bytes of shared memory")
    if case.kind == "streaming":
        failed += streaming_lines(case, code, chip, row)
    if case.kind == "matmul":
        failed += matmul_lines(case, code, chip, cc, row)
    row["failed"] = failed
    return row


def innermost(code: Code) -> list[list[tuple[str, str]]]:
    """Bodies of the loops that hold no other."""
    inner = [(s, e) for s, e in code.loops if not any((s, e) != (a, b) and s <= a and b <= e for a, b in code.loops)]
    return [code.instructions[s : e + 1] for s, e in inner]


def streaming_lines(case: Case, code: Code, chip: Chip, row: dict[str, Any]) -> list[str]:
    # the main loop: the first with wide loads (the compiler may add one for what its unrolling leaves over)
    bodies = [body for body in innermost(code) if wide_loads(body)[0]]
    if not bodies:
        return ["no 128-bit load in a loop"]
    body, warps = max(bodies, key=len), case.options["num_warps"]
    wide, narrow = wide_loads(body)
    trips = case.loop_bytes / (wide * 16 * 32 * warps)
    inside = cycles(body, chip, warps, 1.0)
    loops = {id(instruction) for other in innermost(code) for instruction in other}
    outside = cycles([i for i in code.instructions if id(i) not in loops], chip, warps, 1.0)
    busy = {pipe: (inside[pipe] * trips + outside[pipe]) * case.grid / chip.sms / chip.clock for pipe in inside}
    floor = case.floor_bytes / chip.memory
    bound = max(floor, *busy.values())
    row |= {
        "bits_per_load": 128 if not narrow else "mixed",
        "floor_ms": floor * 1e3,
        "bound_ms": bound * 1e3,
        "bound_over_floor": bound / floor,
        "busiest": max(busy, key=lambda pipe: busy[pipe]) if bound > floor else "memory",
    }
    failed = []
    if case.elements:
        mufu = sum(opcode.startswith("MUFU") for opcode, _ in body) * 32 * warps * trips / case.elements
        row["mufu_per_element"] = mufu
        if mufu > case.most_mufu:
            failed.append(f"{mufu:.3f} MUFU per element")
        if narrow:
            failed.append(f"{narrow} of {wide + narrow} loads in the loop are narrower than 128 bits")
    if row["warps_per_sm"] < 24:
        failed.append(f"{row['warps_per_sm']} warps an SM")
    if bound > case.most_bound * floor:
        failed.append(f"bound {bound / floor:.3f} of the floor")
    return failed


def matmul_lines(case: Case, code: Code, chip: Chip, cc: int, row: dict[str, Any]) -> list[str]:
    bodies = [body for body in innermost(code) if any(pipe_of(opcode) == "tensor" for opcode, _ in body)]
    if not bodies:
        return ["no tensor-core instruction in a loop"]
    body, warps = max(bodies, key=len), case.options["num_warps"]
    mma = collections.Counter(opcode for opcode, _ in body if pipe_of(opcode) == "tensor")
    row["mma"] = max(mma, key=lambda opcode: mma[opcode])
    failed = []
    if cc == 90:
        narrow = [opcode for opcode in mma if not (s := re.match(r"HGMMA\.\d+x(\d+)", opcode)) or int(s.group(1)) < 128]
        if narrow:
            failed.append(f"{narrow[0]} in the K loop")
    if cc == 100:
        return failed if all("UTC" in opcode for opcode in mma) else [*failed, "no UTCHMMA in the K loop"]
    tile = 2.0 * case.options["BLOCK_N"] * case.options["BLOCK_M"]
    floor = case.flop / (chip.flop * case.tensor_rate * chip.sms * chip.clock)
    inside = cycles(body, chip, warps, case.tensor_rate)
    per_trip = inside["tensor"] * chip.flop * case.tensor_rate
    trips = tile * case.depth * (3 if case.options["PRECISION"] == "tf32x3" else 1) / per_trip
    loop = {id(instruction) for instruction in body}
    outside = cycles([i for i in code.instructions if id(i) not in loop], chip, warps, case.tensor_rate)
    outside["tensor"] = 0.0  # peeled iterations are among the trips
    busy = {pipe: (inside[pipe] * trips + outside[pipe]) * case.grid / chip.sms / chip.clock for pipe in inside}
    busy["memory"] = case.floor_bytes / chip.memory  # of the logits that it writes
    bound = max(busy.values())
    row |= {
        "floor_ms": floor * 1e3,
        "bound_ms": bound * 1e3,
        "bound_over_floor": bound / floor,
        "busiest": max(busy, key=lambda pipe: busy[pipe]),
        "epilogue_over_product": max(outside.values()) / (inside["tensor"] * trips),
    }
    if bound > 1.15 * floor:
        failed.append(f"bound {bound / floor:.3f} of the floor")
    return failed


def _inspect_index(index: int) -> dict[str, Any]:
    case, cc = all_cases()[index]
    try:
        return inspect(case, cc)
    except Exception as error:
        raise RuntimeError(f"{case.kernel.__name__} ({case.label}) for sm_{cc}: {error}") from error


def markdown(rows_: list[dict[str, Any]], machine: dict[str, str]) -> str:
    def number(row: dict[str, Any], key: str, digits: int) -> str:
        return f"{row[key]:.{digits}f}" if key in row else ""

    lines = [
        "# Kernels, compiled ahead of time",
        "",
        "Machine code for sm_80, sm_90 and sm_100, read and not run: nothing here is a measurement. A bound is the",
        "time of the busiest part of the chip if nothing ever waits; real kernels take longer. Floors are vendor peak",
        f"figures: {TOKENS:,} tokens of {ALIGNED:,} (or {ODD:,}, odd) logits, hidden size {WIDTH:,}; contrastive",
        "products of 65,536 by 65,536 (or 65,535) embeddings of 4,096. `small` kernels are bound by their launch.",
        "",
        "Lines: no local memory access in a loop; stack at most 64 bytes; shared memory within the chip's. Streaming:",
        "128-bit loads, 24 warps an SM, at most 1.2 MUFU an element, bound within 1.10 of the floor (with a soft cap,",
        "whose tanh takes two more, 3.2 and 3.0). Matmul: tensor cores in the K loop (HGMMA with N >= 128 on sm_90,",
        "UTCHMMA on sm_100), bound within 1.15 (sm_80, sm_90).",
        "",
        "| kernel | configuration | chip | registers | stack | shared | warps/SM | MUFU/element | MMA | floor, ms "
        "| bound / floor | busiest | crossed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows_:
        lines.append(
            f"| {r['kernel']} | {r['configuration']} | {r['chip']} | {r['registers']} | {r['stack_bytes']} "
            f"| {r['shared_bytes']} | {r['warps_per_sm']} | {number(r, 'mufu_per_element', 3)} | {r.get('mma', '')} "
            f"| {number(r, 'floor_ms', 3)} | {number(r, 'bound_over_floor', 3)} | {r.get('busiest', '')} "
            f"| {'; '.join(r['failed'])} |"
        )
    lines += ["", ", ".join(f"{key} {value}" for key, value in machine.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose name and configuration contain this; writes nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: nothing compiles in the interpreter")
    cases = all_cases()
    chosen = [i for i, (c, cc) in enumerate(cases) if arguments.only in f"{c.kernel.__name__} {c.label} sm_{cc}"]
    # spawned, not forked: the compiler's threads do not survive a fork
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        found = pool.map(_inspect_index, chosen, chunksize=4)
    crossed = [f"{r['kernel']} ({r['configuration']}) {r['chip']}: {line}" for r in found for line in r["failed"]]
    refused = [line for line in crossed if accepted(line) is None]
    for line in crossed:
        print(line if line in refused else f"{line} (accepted: {accepted(line)})")
    print(
        f"triton {triton.__version__}: {len(found)} compiled, {len(crossed)} lines crossed, "
        f"{len(crossed) - len(refused)} of them accepted"
    )
    if not arguments.only:
        from benchmarks.rows import commit  # needs more packages than compiling does

        machine = {"triton": triton.__version__, "python": platform.python_version(), "commit": commit()}
        RESULTS.mkdir(exist_ok=True)
        data = {"benchmark": "kernels_aot", "schema": 1, "machine": machine, "rows": found}
        (RESULTS / "kernels_aot.json").write_text(json.dumps(data, indent=1) + "\n")
        (RESULTS / "kernels_aot.md").write_text(markdown(found, machine))
        print(f"wrote {RESULTS / 'kernels_aot.md'}")
    sys.exit(1 if refused else 0)


if __name__ == "__main__":
    main()
