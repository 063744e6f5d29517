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
import itertools
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

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.ops import commit
from carft_kernels import _matmul_kernels as matmul
from carft_kernels import _row_kernels as rows
from carft_kernels.gae import SEQUENCE_CONFIG, WHITEN_CONFIG, gae_kernel, kl_shaped_reward_kernel, whiten_kernel
from carft_kernels.lcs import lcs_table_kernel, lcs_walk_kernel, table_config
from carft_kernels.masked_infonce import NORM_CONFIG, infonce_gradient_kernel, inverse_norm_kernel
from carft_kernels.policy_loss import value_kernel
from carft_kernels.value_pool import (
    WEIGHT_CONFIG,
    backward_config,
    forward_config,
    value_pool_bwd_kernel,
    value_pool_fwd_kernel,
    value_pool_weight_kernel,
)

RESULTS = Path(__file__).parent / "results"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

TOKENS, WIDTH, ALIGNED, ODD = 32_768, 3_584, 152_064, 151_643  # Qwen2.5-7B: padded vocabulary, and its tokens
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Chip:
    """Per SM and clock: dense half-precision FLOP, lanes of the other pipes; vendor's peak figures."""

    name: str
    sms: int
    clock: float
    flop: int
    fma: int
    memory: float  # bytes a second
    shared_limit: int
    capability: tuple[int, int]
    mufu: int = 16
    alu: int = 64


CHIPS = {
    80: Chip("A100", 108, 1.410e9, 2048, 64, 2.039e12, 163 << 10, (8, 0)),
    90: Chip("H100", 132, 1.830e9, 4096, 128, 3.35e12, 227 << 10, (9, 0)),
    100: Chip("B200", 148, 1.850e9, 8192, 128, 8.0e12, 227 << 10, (10, 0)),
}


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration. Arguments are types ("*bf16", "i32"), constants or None (absent)."""

    kernel: Any
    label: str
    kind: str  # "streaming", "matmul" or "small"
    arguments: dict[str, Any]
    options: dict[str, Any]
    unaligned: tuple[str, ...] = ()  # integers not divisible by 16
    grid: int = 1
    loop_bytes: float = 0  # what one program loads in its loops
    floor_bytes: float = 0
    flop: float = 0
    elements: float = 0  # of one program, for MUFU per element
    tensor_rate: float = 1.0  # of the half-precision peak
    depth: int = 0  # of the matrix product


# --- the configurations that ship -------------------------------------------------------------------------------------


def row_cases() -> list[Case]:
    cases = []
    for dtype, entropy, vocabulary in itertools.product((*HALF, torch.float32), (False, True), (ALIGNED, ODD)):
        cases.append(row_forward_case(dtype, entropy, vocabulary))
        outputs = [(dtype, False)]
        if dtype == torch.float32:  # the linear operators' float32 logits
            outputs = [(out, compact) for out in (*HALF, dtype) for compact in (False, True)]
        cases += [row_backward_case(dtype, out, compact, entropy, vocabulary) for out, compact in outputs]
    return cases


def row_forward_case(dtype: torch.dtype, entropy: bool, vocabulary: int) -> Case:
    return Case(
        rows.logprob_fwd_kernel,
        f"{NAMES[dtype]}{', entropy' * entropy}, V={vocabulary}",
        "streaming",
        {
            "logits": f"*{NAMES[dtype]}",
            "target": "*i64",
            **dict.fromkeys(("logprob", "entropy", "row_top", "log_total"), "*fp32"),
            "vocabulary": "i32",
            "stride": "i32",
            "scale": "fp32",
            "ENTROPY": entropy,
        },
        rows.row_config(dtype),
        ("vocabulary", "stride") if vocabulary == ODD else (),
        grid=TOKENS,
        loop_bytes=vocabulary * dtype.itemsize,
        floor_bytes=TOKENS * vocabulary * dtype.itemsize,
        elements=vocabulary,
    )


def row_backward_case(dtype: torch.dtype, out: torch.dtype, compact: bool, entropy: bool, vocabulary: int) -> Case:
    unaligned: tuple[str, ...] = ()
    if vocabulary == ODD:
        # the scratch of the linear operators has padded rows, whatever the vocabulary
        padded = compact or out != dtype
        unaligned = ("vocabulary",) if padded else ("vocabulary", "stride", "out_stride")
    return Case(
        rows.logprob_bwd_kernel,
        f"{NAMES[dtype]} -> {NAMES[out]}{', compact' * compact}{', entropy' * entropy}, V={vocabulary}",
        "streaming",
        {
            "logits": f"*{NAMES[dtype]}",
            "out": f"*{NAMES[out]}",
            "row_index": "*i64" if compact else None,
            "target": "*i64",
            **dict.fromkeys(("row_top", "log_total", "d_logprob", "entropy"), "*fp32"),
            "d_entropy": "*fp32" if entropy else None,
            **dict.fromkeys(("vocabulary", "stride", "out_stride"), "i32"),
            **dict.fromkeys(("scale", "inverse_temperature"), "fp32"),
            "COMPACT": compact,
            "ENTROPY": entropy,
        },
        rows.row_config(dtype, group=8),
        unaligned,
        grid=TOKENS,
        loop_bytes=vocabulary * dtype.itemsize,
        floor_bytes=TOKENS * vocabulary * (dtype.itemsize + out.itemsize),
        elements=vocabulary,
    )


def matmul_cases(cc: int) -> list[Case]:
    cases = []
    for dtype in (*HALF, torch.float32):
        engine = dtype in HALF and CHIPS[cc].capability[0] in (9, 10)
        for tma in (False, True) if engine else (False,):
            cases += lm_head_cases(cc, dtype, tma) + similarity_cases(cc, dtype, tma)
    return cases


def matmul_case(
    cc: int, kernel: Any, label: str, dtype: torch.dtype, tma: bool, plain: bool, size: tuple[int, int, int], **own: Any
) -> Case:
    config = matmul.tile_config(CHIPS[cc].capability, dtype, tma=tma, plain=plain)
    (n, m, k), name = size, NAMES[dtype]
    matrix = {
        operand: f"tensordesc<{name}[{block},{config.block_k}]>" if config.tma else f"*{name}"
        for operand, block in (("a", config.block_n), ("b", config.block_m))
    }
    sizes = dict.fromkeys(("n", "m", "k", "stride_a", "stride_b"), "i32")
    return Case(
        kernel,
        f"{label}, {name}{', TMA' * tma}, M={m}",
        "matmul",
        matrix | sizes | {"scale": "fp32"} | own,
        config.launch(dtype),
        unaligned=("n", "m") if m % 16 else (),
        grid=math.ceil(n / config.block_n) * math.ceil(m / config.block_m),
        flop=2.0 * n * m * k * (3 if dtype == torch.float32 else 1),
        tensor_rate=0.5 if dtype == torch.float32 else 1.0,
        depth=k,
    )


STATISTICS = dict.fromkeys(("top", "total", "spread", "target_logit"), "*fp32")


def lm_head_cases(cc: int, dtype: torch.dtype, tma: bool) -> list[Case]:
    cases = []
    for vocabulary, entropy, bias in itertools.product((ALIGNED, ODD), (False, True), (False, True)):
        own = {
            "bias": f"*{NAMES[dtype]}" if bias else None,
            "target": "*i64",
            "NORMS": False,
            "BIAS": bias,
            "MASK": 0,
            "ENTROPY": entropy,
            **dict.fromkeys(("row_factor", "column_factor", "mask")),
        }
        label = f"LM head{', entropy' * entropy}{', bias' * bias}"
        size = (TOKENS, vocabulary, WIDTH)
        cases.append(matmul_case(cc, matmul.matmul_lse_kernel, label, dtype, tma, not bias, size, **STATISTICS, **own))
    return cases


def similarity_cases(cc: int, dtype: torch.dtype, tma: bool) -> list[Case]:
    cases = []
    out = "*fp32" if dtype == torch.float16 else f"*{NAMES[dtype]}"
    for candidates, mask in itertools.product((65_536, 65_535), (0, 1, 2)):
        own = {"row_factor": "*fp32", "column_factor": "*fp32", "mask": "*u8" if mask else None, "MASK": mask}
        forward = {"bias": None, "target": "*i64", "NORMS": True, "BIAS": False, "ENTROPY": False, **STATISTICS}
        backward = {
            **dict.fromkeys(("row_top", "log_total", "d_row"), "*fp32"),
            **dict.fromkeys(("inverse_temperature", "positive_clamp"), "fp32"),
            "positive": "*i64",
            "out": out,
            "stride_out": "i32",
        }
        for kernel, more in ((matmul.matmul_lse_kernel, forward), (infonce_gradient_kernel, backward)):
            size = (65_536, candidates, 4_096)
            cases.append(matmul_case(cc, kernel, f"similarity, mask {mask}", dtype, tma, False, size, **own, **more))
    return cases


def other_cases() -> list[Case]:
    cases = []
    sequences, length = 64, 512
    tokens = sequences * length
    for dtype in (*HALF, torch.float32):
        name, size = NAMES[dtype], dtype.itemsize
        forward = forward_config(dtype)
        slices = math.ceil(WIDTH / forward["BLOCK_D"])
        cases.append(
            Case(
                value_pool_fwd_kernel,
                f"{name}, D={WIDTH}",
                "streaming",
                {
                    "hidden": f"*{name}",
                    "weight": "*fp32",
                    "cu_seqlens": "*i64",
                    "pooled": "*fp32",
                    "width": "i32",
                    "stride": "i32",
                },
                forward,
                grid=sequences * slices,
                loop_bytes=length * forward["BLOCK_D"] * size,
                floor_bytes=tokens * WIDTH * size,
            )
        )
        for width in (256, 1024, WIDTH, 8192):
            cases.append(
                Case(
                    value_pool_bwd_kernel,
                    f"{name}, D={width}",
                    "streaming",
                    {
                        "hidden": f"*{name}",
                        "weight": "*fp32",
                        "d_pooled": "*fp32",
                        "pooled": "*fp32",
                        "cu_seqlens": "*i64",
                        "d_hidden": f"*{name}",
                        "d_value": "*fp32",
                        "width": "i32",
                        "stride": "i32",
                    },
                    backward_config(width),
                    grid=sequences,
                    loop_bytes=length * backward_config(width)["BLOCK_D"] * size,
                    floor_bytes=2 * tokens * width * size,
                )
            )
        cases.append(
            Case(
                inverse_norm_kernel,
                name,
                "small",
                {"x": f"*{name}", "out": "*fp32", "n": "i32", "width": "i32", "stride": "i32", "eps": "fp32"},
                NORM_CONFIG,
            )
        )
    vector = "*fp32"
    for masked in (False, True):
        mask = "*u8" if masked else None
        cases += [
            Case(
                value_pool_weight_kernel,
                f"masked={masked}",
                "small",
                {"value": vector, "mask": mask, "cu_seqlens": "*i64", "weight": vector, "MASKED": masked},
                WEIGHT_CONFIG,
            ),
            Case(
                whiten_kernel,
                f"masked={masked}",
                "small",
                {"x": vector, "mask": mask, "out": vector, "tokens": "i32", "eps": "fp32", "MASKED": masked},
                WHITEN_CONFIG,
            ),
        ]
    cases += [
        Case(
            gae_kernel,
            "",
            "small",
            dict.fromkeys(("reward", "value", "advantage", "return_"), vector)
            | {"cu_seqlens": "*i64", "gamma": "fp32", "decay": "fp32"},
            SEQUENCE_CONFIG,
        ),
        Case(
            kl_shaped_reward_kernel,
            "",
            "small",
            dict.fromkeys(("score", "old_logprob", "ref_logprob", "reward"), vector)
            | {"cu_seqlens": "*i64", "kl_coef": "fp32"},
            SEQUENCE_CONFIG,
        ),
        Case(
            value_kernel,
            "",
            "small",
            dict.fromkeys(("value", "old_value", "return_", "weight", "d_value", "stats"), vector)
            | {"tokens": "i32", "clip": "fp32"},
            rows.TOKEN_CONFIG,
        ),
        Case(
            lcs_walk_kernel,
            "",
            "small",
            dict.fromkeys(("a", "a_cu", "b", "b_cu", "steps_offset"), "*i64")
            | {"steps": "*i8", "first": "i32", "mask_a": "*u8", "mask_b": "*u8"},
            {"num_warps": 1},
        ),
    ]
    for ref, entropy in ((False, False), (False, True), (True, True)):
        cases.append(
            Case(
                rows.policy_kernel,
                f"ref={ref} entropy={entropy}",
                "small",
                dict.fromkeys(("logprob", "old_logprob", "advantage", "weight", "d_logprob", "stats"), vector)
                | {"ref_logprob": vector if ref else None, "entropy": vector if entropy else None}
                | {"tokens": "i32", "HAS_REF": ref, "HAS_ENTROPY": entropy}
                | dict.fromkeys(("clip_low", "clip_high", "kl_coef", "entropy_coef"), "fp32"),
                rows.TOKEN_CONFIG,
            )
        )
    for entropy in (False, True):
        cases.append(
            Case(
                matmul.combine_kernel,
                f"entropy={entropy}",
                "small",
                dict.fromkeys(("top", "total", "spread", "target_logit", "logprob", "entropy"), vector)
                | {"row_top": vector, "log_total": vector, "n": "i32", "blocks": "i32", "scale": "fp32"}
                | {"target_limit": "fp32", "logprob_limit": "fp32", "ENTROPY": entropy},
                matmul.COMBINE_CONFIG,
                ("blocks",),
            )
        )
    for longest in (1, 512, 1024, 4096, 8192):
        cases.append(
            Case(
                lcs_table_kernel,
                f"up to {longest} tokens",
                "small",
                dict.fromkeys(("a", "a_cu", "b", "b_cu", "steps_offset"), "*i64") | {"steps": "*i8", "first": "i32"},
                table_config(longest),
            )
        )
    return cases


# --- compiling and reading machine code -------------------------------------------------------------------------------


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
    source = ASTSource(
        fn=case.kernel,
        signature=types,
        constexprs={(i,): values[n] for i, n in enumerate(names) if types[n] == "constexpr"},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(names)
            if types[n].startswith("*") or (types[n] == "i32" and n not in case.unaligned)
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
        if mufu > 1.2:
            failed.append(f"{mufu:.3f} MUFU per element")
        if narrow:
            failed.append(f"{narrow} of {wide + narrow} loads in the loop are narrower than 128 bits")
    if row["warps_per_sm"] < 24:
        failed.append(f"{row['warps_per_sm']} warps an SM")
    if bound > 1.10 * floor:
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
    bound = max(busy.values())
    row |= {
        "floor_ms": floor * 1e3,
        "bound_ms": bound * 1e3,
        "bound_over_floor": bound / floor,
        "busiest": max(busy, key=lambda pipe: busy[pipe]),
    }
    if bound > 1.15 * floor:
        failed.append(f"bound {bound / floor:.3f} of the floor")
    return failed


# --- report -----------------------------------------------------------------------------------------------------------


def all_cases() -> list[tuple[Case, int]]:
    shared = [*row_cases(), *other_cases()]
    return [(case, cc) for cc in CHIPS for case in [*shared, *matmul_cases(cc)]]


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
        "128-bit loads, 24 warps an SM, at most 1.2 MUFU an element, bound within 1.10 of the floor. Matmul: tensor",
        "cores in the K loop (HGMMA with N >= 128 on sm_90, UTCHMMA on sm_100), bound within 1.15 (sm_80, sm_90).",
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
    crossed = [row for row in found if row["failed"]]
    for row in crossed:
        print(f"{row['kernel']} ({row['configuration']}) {row['chip']}: {'; '.join(row['failed'])}")
    print(f"{len(found)} compiled, {len(crossed)} cross a line")
    if not arguments.only:
        machine = {"triton": triton.__version__, "python": platform.python_version(), "commit": commit()}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "kernels_aot.json").write_text(json.dumps({"machine": machine, "rows": found}, indent=1) + "\n")
        (RESULTS / "kernels_aot.md").write_text(markdown(found, machine))
        print(f"wrote {RESULTS / 'kernels_aot.md'}")
    sys.exit(1 if crossed else 0)


if __name__ == "__main__":
    main()
