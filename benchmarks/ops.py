"""Operators on the CPU against plain torch, by pytest-benchmark: `make bench`, or `pytest benchmarks/ops.py`.

Each group computes one thing in several ways. Our loss and gradients are compared with the plain ones before they are
timed; a variant that disagrees fails and is not timed. `python -m benchmarks.ops` writes
benchmarks/results/ops_cpu.json and .md with machine, versions and commit.
"""

import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carft_kernels import gae, lcs_mask, linear_policy_loss, masked_infonce, value_pool
from carft_kernels.gae import gae_reference
from carft_kernels.lcs import lcs_mask_reference
from carft_kernels.linear_policy_loss import linear_policy_loss_reference
from carft_kernels.value_pool import value_pool_reference

RESULTS = Path(__file__).parent / "results"
ROUNDS = 5
Step = Callable[[], list[Tensor]]
Group = Callable[[], dict[str, Step]]  # the first variant is ours, "plain torch" what the others are compared with


def with_gradients(function: Callable[..., Tensor], *leaves: Tensor) -> Step:
    """Forward and backward: the loss and the gradients of its leaves."""
    inputs = [x.requires_grad_() for x in leaves]

    def step() -> list[Tensor]:
        loss = function(*inputs)
        return [loss, *torch.autograd.grad(loss, inputs)]

    return step


def policy(zero_advantages: bool) -> dict[str, Step]:
    """SmolLM2-135M's head: V = 49,152, D = 576; 2,048 tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens, vocabulary, width = 2048, 49_152, 576
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    with torch.no_grad():
        old = (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None])[:, 0]
    advantage = torch.randn(tokens, generator=generator)
    if zero_advantages:
        advantage *= torch.arange(tokens) % 2
    options = {"advantage_T": advantage, "old_logprob_T": old, "weight_T": torch.full((tokens,), 1 / tokens)}

    def matmuls() -> list[Tensor]:
        logits = hidden @ weight.T
        return [logits @ weight, logits.T @ hidden]

    def without_gradient() -> list[Tensor]:
        with torch.no_grad():
            return matmuls()

    return {
        "linear_policy_loss": with_gradients(
            lambda h, w: linear_policy_loss(h, w, target, **options, impl="torch")[0], hidden, weight
        ),
        "plain torch": with_gradients(
            lambda h, w: linear_policy_loss_reference(h, w, target, **options)[0], hidden, weight
        ),
        "its three matmuls alone": without_gradient,
    }


def pooling() -> dict[str, Step]:
    cu = torch.arange(0, 8193, 128)
    hidden, value = torch.randn(8192, 512), torch.randn(8192)
    return {
        "value_pool": with_gradients(lambda h, v: value_pool(h, v, cu)[0].square().sum(), hidden, value),
        "plain torch": with_gradients(lambda h, v: value_pool_reference(h, v, cu)[0].square().sum(), hidden, value),
    }


def infonce(n: int, width: int) -> dict[str, Step]:
    def plain(z_1: Tensor, z_2: Tensor) -> Tensor:
        similarity = torch.nn.functional.normalize(z_1) @ torch.nn.functional.normalize(z_2).T
        return ((similarity / 0.2).logsumexp(1) - similarity.diagonal().clamp(max=0.9) / 0.2).mean()

    z_1, z_2 = torch.randn(n, width), torch.randn(n, width)
    return {
        "masked_infonce": with_gradients(lambda a, c: masked_infonce(a, c)[0], z_1, z_2),
        "plain torch": with_gradients(plain, z_1, z_2),
    }


def advantages() -> dict[str, Step]:
    cu, value = torch.arange(0, 8193, 128), torch.randn(8192)
    return {
        "gae": lambda: list(gae(value, value, cu, gamma=1.0, lam=0.95)),
        "plain torch": lambda: list(gae_reference(value, value, cu, gamma=1.0, lam=0.95)),
    }


def common_tokens() -> dict[str, Step]:
    cu = torch.arange(0, 8193, 1024)
    a, b = (torch.randint(2000, (8192,), generator=torch.Generator().manual_seed(i)) % 300 for i in (0, 1))
    return {
        "lcs_mask": lambda: list(lcs_mask(a, cu, b, cu, impl="torch")),
        "plain torch": lambda: list(lcs_mask_reference(a, cu, b, cu)),
    }


GROUPS: dict[str, tuple[Group, str]] = {
    "linear_policy_loss, T=2048 V=49152 D=576": (partial(policy, False), "all logits at once"),
    "linear_policy_loss, half of the advantages zero": (partial(policy, True), "all logits at once"),
    "value_pool, 64 x 128 tokens, D=512": (pooling, "a loop over sequences"),
    "masked_infonce, 256 x 256, D=64": (partial(infonce, 256, 64), "all rows at once"),
    "masked_infonce, 4096 x 4096, D=64": (partial(infonce, 4096, 64), "all rows at once"),
    "gae, 64 x 128 tokens": (advantages, "a loop over tokens"),
    "lcs_mask, 8 x 1024 x 1024 tokens": (common_tokens, "a Python dynamic programme"),
}
VARIANTS = [
    (group, variant)
    for group, (_, plain) in GROUPS.items()
    for variant in (
        group.split(",")[0],
        "plain torch",
        *(["its three matmuls alone"] if group.startswith("linear_policy_loss, T") else []),
    )
]


def _peak_in_child(group: str, variant: str, pipe: Any) -> None:
    steps = GROUPS[group][0]()
    steps = {variant: steps[variant]}
    with_gradients(lambda x: masked_infonce(x, x)[0], torch.ones(1, 1))()  # the first call of an operator imports

    def kilobytes(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return int(found.group(1))

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the inputs
    before = kilobytes("VmRSS")
    result = steps[variant]()
    pipe.send((kilobytes("VmHWM") - before) / 1024)
    del result


def peak_extra_mb(group: str, variant: str) -> float:
    """Largest resident memory of one step beyond its inputs, in a process of its own; results included."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_peak_in_child, args=(group, variant, sender))
    child.start()
    child.join()
    return float(receiver.recv())


@pytest.mark.parametrize(("group", "variant"), VARIANTS)
def test_operator(benchmark: Any, group: str, variant: str) -> None:
    steps = GROUPS[group][0]()
    step = steps[variant]
    if variant == group.split(",")[0]:
        for ours, plain in zip(step(), steps["plain torch"](), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)
    benchmark.group = group
    benchmark.extra_info.update(group=group, variant=variant, peak_extra_mb=round(peak_extra_mb(group, variant), 1))
    slow = group.startswith("lcs_mask") and variant == "plain torch"
    benchmark.pedantic(step, rounds=3 if slow else ROUNDS, warmup_rounds=1)


# --- report -----------------------------------------------------------------------------------------------------------


def commit() -> str:
    result = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def rows_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for entry in report["benchmarks"]:
        stats, info = entry["stats"], entry["extra_info"]
        rows.append(
            {
                **info,
                "median_ms": round(stats["median"] * 1e3, 2),
                "range_ms": [round(stats["min"] * 1e3, 2), round(stats["max"] * 1e3, 2)],
            }
        )
    plain = {row["group"]: row for row in rows if row["variant"] == "plain torch"}
    for row in rows:
        base = plain[row["group"]]
        row["plain_over_this"] = round(base["median_ms"] / row["median_ms"], 2)
        row["plain_torch_is"] = GROUPS[row["group"]][1]
    return rows


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.json"
        code = pytest.main([__file__, "-q", "-p", "no:cacheprovider", f"--benchmark-json={output}", *sys.argv[1:]])
        if code != 0:
            sys.exit(int(code))
        rows = rows_of(json.loads(output.read_text()))
    machine = {
        "device": "cpu",
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ops_cpu.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    lines = [
        "# Operators on the CPU, torch implementation",
        "",
        f"Forward and backward, float32, median of {ROUNDS} rounds and their range. Peak: resident memory of one step",
        "beyond its inputs, gradients included, in a process of its own. Nothing here ran on a GPU.",
        "",
        "| case | variant | median, ms | range, ms | plain torch / this | peak, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        variant = f"plain torch: {row['plain_torch_is']}" if row["variant"] == "plain torch" else row["variant"]
        low, high = row["range_ms"]
        lines.append(
            f"| {row['group']} | {variant} | {row['median_ms']} | {low} to {high} | {row['plain_over_this']} "
            f"| {row['peak_extra_mb']} |"
        )
    lines += ["", ", ".join(f"{key} {value}" for key, value in machine.items())]
    (RESULTS / "ops_cpu.md").write_text("\n".join(lines) + "\n")
    print(f"wrote {RESULTS / 'ops_cpu.md'}")


if __name__ == "__main__":
    main()
