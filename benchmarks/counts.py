"""What can be counted without a clock, the same on every machine: `python -m benchmarks.counts`.

Kernels: global memory and FLOPs of the Triton kernels, access by access in Triton's interpreter, forward and backward.
Every request counts, also one that a cache would answer: which addresses are the same hangs on the allocator.
Head: bytes that the LM head's operators move at the size of a 7B model, operation by operation on tensors without data.
Steps: FLOPs and bytes of a training step by the cost model. Writes benchmarks/results/counts.json, or --output.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
import triton
from torch import Tensor

import carft_kernels as ck
from benchmarks.head_traffic import count_head
from benchmarks.predict import LENGTHS, MODELS, shape_of
from benchmarks.rows import RESULTS, Row, write
from carft_fast.models import ModelCost, fast_step, published_step
from tests.ops.conftest import LargestTensor
from tests.ops.interpreter import count_traffic, repair

Call = Callable[[], Tensor | None]
"""Forward; what comes back is differentiated."""


def calls() -> dict[tuple[str, str], Call]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return randn(*shape, dtype=dtype).requires_grad_()

    def randint(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    found: dict[tuple[str, str], Call] = {}
    tokens, cu = 3000, torch.tensor([0, 1000, 3000])
    target = randint(256, 32)
    ones = torch.ones(32)
    policy = {"advantage_T": ones, "old_logprob_T": -7 * ones, "weight_T": ones, "clip_high": 1e9}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        logits, rows = leaf(4, 20_011, dtype=dtype), randint(20_011, 4)
        hidden, weight = leaf(32, 32, dtype=dtype), leaf(256, 32, dtype=dtype)
        states, value = leaf(360, 1024, dtype=dtype), leaf(360)
        offsets = torch.tensor([0, 120, 280, 360])
        found |= {
            ("token_logprob", f"{name} T=4 V=20011"): lambda x=logits, t=rows: ck.token_logprob(x, t, impl="triton")[
                0
            ].sum(),
            ("linear_logprob", f"{name} T=32 V=256 D=32"): lambda h=hidden, w=weight: ck.linear_logprob(
                h, w, target, impl="triton"
            )[0].sum(),
            ("linear_policy_loss", f"{name} T=32 V=256 D=32"): lambda h=hidden, w=weight: ck.linear_policy_loss(
                h, w, target, **policy, impl="triton"
            )[0],
            ("value_pool", f"{name} T=360 D=1024"): lambda h=states, v=value, o=offsets: ck.value_pool(
                h, v, o, impl="triton"
            )[0].sum(),
            ("masked_infonce", f"{name} N=32 M=256 D=32"): lambda h=hidden, w=weight: ck.masked_infonce(
                h, w, impl="triton"
            )[0],
        }
    a, b, c, x, weights = leaf(tokens), randn(tokens), randn(tokens), randn(tokens), torch.ones(tokens)
    words = [randint(50, 100) for _ in range(2)]
    cut = torch.tensor([0, 40, 100])
    found |= {
        ("policy_loss", "T=3000"): lambda: ck.policy_loss(a, b, c, weight_T=weights, impl="triton")[0],
        ("value_loss", "T=3000"): lambda: ck.value_loss(a, b, c, weight_T=weights, impl="triton")[0],
        ("kl_shaped_reward", "T=3000"): lambda: _no_gradient(
            ck.kl_shaped_reward(x[:2], b, c, cu, kl_coef=0.1, impl="triton")
        ),
        ("gae", "T=3000"): lambda: _no_gradient(ck.gae(x, b, cu, gamma=1.0, lam=0.95, impl="triton")),
        ("whiten", "T=3000"): lambda: _no_gradient(ck.whiten(x, impl="triton")),
        ("lcs_mask", "T=100"): lambda: _no_gradient(ck.lcs_mask(words[0], cut, words[1], cut, impl="triton")),
    }
    return found


def _no_gradient(result: object) -> None:
    return None


def count_kernels() -> list[Row]:
    repair()
    rows = []
    for (operator, case), call in calls().items():
        for phase in ("forward", "forward and backward"):
            between = LargestTensor()  # the products that torch does between kernels
            with count_traffic() as traffic, between, torch.set_grad_enabled(phase != "forward"):
                loss = call()
                if phase != "forward":
                    if loss is None:
                        continue
                    loss.backward()
            rows.append(
                {
                    "what": f"{operator}, {phase}",
                    "case": case,
                    "loaded_bytes": traffic.loaded,
                    "stored_bytes": traffic.stored,
                    "flops": traffic.dot_flop + between.matmul_flops,
                }
            )
    return rows


def count_steps() -> list[Row]:
    rows = []
    for model, config in MODELS.items():
        cost = ModelCost.of_config(config)
        for task in LENGTHS:
            for path, count in (("fast", fast_step), ("published", published_step)):
                for phase, work in count(cost, shape_of(task)).items():
                    figures = {"flops": round(work.flops), "traffic_bytes": round(work.bytes)}
                    rows.append({"what": f"step, {path}: {phase}", "case": f"{model}, {task}"} | figures)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "counts.json")
    arguments = parser.parse_args()
    rows = count_kernels() + count_head() + count_steps()
    write(arguments.output, "counts", {"torch": torch.__version__, "triton": triton.__version__}, rows)
    print(f"wrote {len(rows)} rows to {arguments.output}")


if __name__ == "__main__":
    main()
