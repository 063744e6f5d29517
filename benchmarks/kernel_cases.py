"""The kernels in every configuration that ships, and the chips they are compiled for; read by `kernels_aot`."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch

from carft_kernels import _matmul_kernels as matmul
from carft_kernels import _policy_kernels as policy
from carft_kernels import _row_kernels as rows
from carft_kernels.gae import WHITEN_CONFIG, gae_kernel, kl_shaped_reward_kernel, whiten_kernel
from carft_kernels.lcs import lcs_table_kernel, lcs_walk_kernel, table_config
from carft_kernels.masked_infonce import NORM_CONFIG, infonce_gradient_kernel, inverse_norm_kernel
from carft_kernels.policy_loss import sequence_mean_kernel, value_kernel
from carft_kernels.value_pool import (
    backward_config,
    backward_splits,
    forward_config,
    value_pool_bwd_kernel,
    value_pool_fwd_kernel,
    value_pool_weight_kernel,
)

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
    most_mufu: float = 1.2  # per element
    most_bound: float = 1.10  # over the floor, of a streaming kernel
    tensor_rate: float = 1.0  # of the half-precision peak
    depth: int = 0  # of the matrix product


def row_cases() -> list[Case]:
    cases = []
    for dtype, entropy, vocabulary in itertools.product((*HALF, torch.float32), (False, True), (ALIGNED, ODD)):
        cases.append(row_forward_case(dtype, entropy, vocabulary))
        outputs = [(dtype, False)]
        if dtype == torch.float32:  # the linear operators' float32 logits; a half-precision gradient is over its own
            outputs = [(out, compact) for out in (*HALF, dtype) for compact in (False, True)]
        cases += [row_backward_case(dtype, out, compact, entropy, vocabulary) for out, compact in outputs]
    for dtype in (torch.bfloat16, torch.float32):  # of given logits, and of the linear operators'
        cases.append(row_forward_case(dtype, True, ALIGNED, softcap=True))
        cases.append(row_backward_case(dtype, torch.bfloat16, False, True, ALIGNED, softcap=True))
    return cases


# tanh takes an exponential and a reciprocal of its own: where memory is fast or logits are narrow they bound the kernel
SOFT_CAP_LINES = {"most_mufu": 3.2, "most_bound": 3.0}


def row_forward_case(dtype: torch.dtype, entropy: bool, vocabulary: int, softcap: bool = False) -> Case:
    return Case(
        rows.logprob_fwd_kernel,
        f"{NAMES[dtype]}{', entropy' * entropy}{', soft cap' * softcap}, V={vocabulary}",
        "streaming",
        {
            "logits": f"*{NAMES[dtype]}",
            "target": "*i64",
            **dict.fromkeys(("logprob", "entropy", "row_top", "log_total"), "*fp32"),
            "vocabulary": "i32",
            "stride": "i32",
            "scale": "fp32",
            "ignore_index": "i32",
            "softcap": "fp32" if softcap else None,
            "ENTROPY": entropy,
        },
        rows.row_config(dtype),
        ("vocabulary", "stride") if vocabulary == ODD else (),
        grid=TOKENS,
        loop_bytes=vocabulary * dtype.itemsize,
        floor_bytes=TOKENS * vocabulary * dtype.itemsize,
        elements=vocabulary,
        **SOFT_CAP_LINES if softcap else {},
    )


def row_backward_case(
    dtype: torch.dtype, out: torch.dtype, compact: bool, entropy: bool, vocabulary: int, softcap: bool = False
) -> Case:
    unaligned: tuple[str, ...] = ()
    if vocabulary == ODD:
        # the scratch of the linear operators has padded rows, whatever the vocabulary
        padded = compact or out != dtype
        unaligned = ("vocabulary",) if padded else ("vocabulary", "stride", "out_stride")
    return Case(
        rows.logprob_bwd_kernel,
        f"{NAMES[dtype]} -> {NAMES[out]}{', compact' * compact}{', entropy' * entropy}"
        f"{', soft cap and z loss' * softcap}, V={vocabulary}",
        "streaming",
        {
            "logits": f"*{NAMES[dtype]}",
            "out": f"*{NAMES[out]}",
            "row_index": "*i64" if compact else None,
            "target": "*i64",
            **dict.fromkeys(("row_top", "log_total", "d_logprob", "entropy"), "*fp32"),
            "d_entropy": "*fp32" if entropy else None,
            "d_lse": "*fp32" if softcap else None,
            "softcap": "fp32" if softcap else None,
            **dict.fromkeys(("vocabulary", "stride", "out_stride", "ignore_index"), "i32"),
            **dict.fromkeys(("scale", "inverse_temperature"), "fp32"),
            "NARROW": not compact and out != dtype,
        },
        rows.row_config(dtype, group=8),
        unaligned,
        grid=TOKENS,
        loop_bytes=vocabulary * dtype.itemsize,
        floor_bytes=TOKENS * vocabulary * (dtype.itemsize + out.itemsize),
        elements=vocabulary,
        **SOFT_CAP_LINES if softcap else {},
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
    (m, n, k), name = size, NAMES[dtype]
    matrix = {
        operand: f"tensordesc<{name}[{block},{config.block_k}]>" if config.tma else f"*{name}"
        for operand, block in (("a", config.block_m), ("b", config.block_n))
    }
    sizes = dict.fromkeys(("m", "n", "k", "stride_a", "stride_b"), "i32")
    return Case(
        kernel,
        f"{label}, {name}{', TMA' * tma}, N={n}",
        "matmul",
        matrix | sizes | {"scale": "fp32"} | own,
        config.launch(dtype),
        unaligned=("m", "n") if n % 16 else (),
        grid=math.ceil(m / config.block_m) * math.ceil(n / config.block_n),
        floor_bytes=4.0 * n * m if own.get("logits") else 0,
        flop=2.0 * n * m * k * (3 if dtype == torch.float32 else 1),
        tensor_rate=0.5 if dtype == torch.float32 else 1.0,
        depth=k,
    )


STATISTICS = dict.fromkeys(("top", "total", "target_logit"), "*fp32")


def lm_head_cases(cc: int, dtype: torch.dtype, tma: bool) -> list[Case]:
    cases = []
    options = itertools.product((False, True), repeat=3)
    configurations = [(v, stored, *rest, False) for stored, *rest in options for v in (ALIGNED, ODD)]
    for vocabulary, stored, entropy, bias, softcap in (*configurations, (ALIGNED, True, True, True, True)):
        own = {
            "bias": f"*{NAMES[dtype]}" if bias else None,
            "target": "*i64",
            "softcap": "fp32" if softcap else None,
            "MASK": 0,
            "spread": "*fp32" if entropy else None,
            "logits": "*fp32" if stored else None,
            "stride_logits": "i32",
            **dict.fromkeys(("row_factor", "column_factor", "mask")),
        }
        label = f"LM head{', logits' * stored}{', entropy' * entropy}{', bias' * bias}{', soft cap' * softcap}"
        size = (TOKENS, vocabulary, WIDTH)
        cases.append(matmul_case(cc, matmul.matmul_lse_kernel, label, dtype, tma, not bias, size, **STATISTICS, **own))
    return cases


def similarity_cases(cc: int, dtype: torch.dtype, tma: bool) -> list[Case]:
    cases = []
    for candidates, mask in itertools.product((65_536, 65_535), (0, 1, 2)):
        own = {"row_factor": "*fp32", "column_factor": "*fp32", "mask": "*u8" if mask else None, "MASK": mask}
        forward = {"bias": None, "target": "*i64", **STATISTICS}
        forward |= dict.fromkeys(("spread", "softcap", "logits")) | {"stride_logits": "i32"}
        backward = {
            **dict.fromkeys(("row_top", "log_total", "row_scale", "column_scale"), "*fp32"),
            "positive_clamp": "fp32",
            "positive": "*i64",
            "out": f"*{NAMES[dtype]}",
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
    splits = backward_splits(tokens, sequences)
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
                    "tokens": "i32",
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
                        "tokens": "i32",
                        "width": "i32",
                        "stride": "i32",
                    },
                    backward_config(width),
                    grid=sequences * splits,
                    loop_bytes=length / splits * backward_config(width)["BLOCK_D"] * size,
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
                {"value": vector, "mask": mask, "cu_seqlens": "*i64", "weight": vector} | {"tokens": "i32"},
                rows.SEQUENCE_CONFIG,
            ),
            Case(
                whiten_kernel,
                f"masked={masked}",
                "small",
                {"x": vector, "mask": mask, "out": vector, "tokens": "i32", "eps": "fp32"},
                WHITEN_CONFIG,
            ),
        ]
    cases += [
        Case(
            gae_kernel,
            "",
            "small",
            dict.fromkeys(("reward", "value", "advantage", "return_"), vector)
            | {"cu_seqlens": "*i64", "tokens": "i32", "gamma": "fp32", "decay": "fp32"},
            rows.SEQUENCE_CONFIG,
        ),
        Case(
            kl_shaped_reward_kernel,
            "",
            "small",
            dict.fromkeys(("score", "old_logprob", "ref_logprob", "reward"), vector)
            | {"cu_seqlens": "*i64", "tokens": "i32", "kl_coef": "fp32"},
            rows.SEQUENCE_CONFIG,
        ),
        Case(
            value_kernel,
            "",
            "small",
            dict.fromkeys(("value", "old_value", "return_", "weight", "d_value", "stats"), vector)
            | {"tokens": "i32", "clip": "fp32"},
            policy.TOKEN_CONFIG,
        ),
        Case(
            lcs_walk_kernel,
            "",
            "small",
            dict.fromkeys(("a", "a_cu", "b", "b_cu", "tables"), "*i64")
            | {"rows_of_bits": "*i32", "first": "i32", "mask_a": "*u8", "mask_b": "*u8"},
            {"num_warps": 1},
        ),
    ]
    plain: dict[str, Any] = dict.fromkeys(("correction", "dual_clip", "kl_clamp")) | {"CISPO": False, "K2": False}
    bounded = {"correction": vector, "dual_clip": "fp32", "kl_clamp": "fp32"}
    for ref, entropy, name, variant in (
        (False, False, "", {}),
        (False, True, "", {}),
        (True, True, "", {}),
        (True, True, ", correction, dual clip, KL bound", bounded),
        (True, True, ", correction, CISPO, k2", {"correction": vector, "CISPO": True, "K2": True}),
    ):
        cases.append(
            Case(
                policy.policy_kernel,
                f"ref={ref} entropy={entropy}{name}",
                "small",
                dict.fromkeys(("logprob", "old_logprob", "advantage", "weight", "d_logprob", "stats"), vector)
                | {"ref_logprob": vector if ref else None, "entropy": vector if entropy else None}
                | {"tokens": "i32"}
                | dict.fromkeys(("clip_low", "clip_high", "kl_coef", "entropy_coef"), "fp32")
                | plain
                | variant,
                policy.TOKEN_CONFIG,
            )
        )
    for less in (False, True):
        cases.append(
            Case(
                sequence_mean_kernel,
                "of a difference" if less else "",
                "small",
                dict.fromkeys(("x", "weight", "out"), vector)
                | {"less": vector if less else None, "cu_seqlens": "*i64", "tokens": "i32"},
                rows.SEQUENCE_CONFIG,
            )
        )
    for entropy in (False, True):
        cases.append(
            Case(
                matmul.combine_kernel,
                f"entropy={entropy}",
                "small",
                dict.fromkeys(("top", "total", "target_logit", "logprob", "entropy"), vector)
                | {"spread": vector if entropy else None}
                | {"target": "*i64", "row_top": vector, "log_total": vector, "scale": "fp32"}
                | dict.fromkeys(("m", "n", "blocks", "ignore_index"), "i32")
                | {"target_limit": "fp32", "logprob_limit": "fp32"},
                matmul.COMBINE_CONFIG,
                ("n", "blocks", "ignore_index"),
            )
        )
    for longest in (1, 512, 1024, 4096, 8192):
        cases.append(
            Case(
                lcs_table_kernel,
                f"up to {longest} tokens",
                "small",
                dict.fromkeys(("a", "a_cu", "b", "b_cu", "tables"), "*i64") | {"rows_of_bits": "*i32", "first": "i32"},
                table_config(longest),
            )
        )
    return cases


def all_cases() -> list[tuple[Case, int]]:
    shared = [*row_cases(), *other_cases()]
    return [(case, cc) for cc in CHIPS for case in [*shared, *matmul_cases(cc)]]
