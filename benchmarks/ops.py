"""Operators against the plain torch expression, interleaved in one process: `make bench`.

Each pair computes the same loss and gradients; they are compared before they are timed, and a pair that disagrees is
not timed. Writes benchmarks/results/ops_cpu.json and .md with the machine, versions and commit.
"""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from carft_kernels import gae, linear_policy_loss, masked_infonce, value_pool
from carft_kernels.gae import gae_reference
from carft_kernels.linear_policy_loss import linear_policy_loss_reference
from carft_kernels.value_pool import value_pool_reference

RESULTS = Path(__file__).parent / "results"
REPEATS = 5
Step = Callable[[], list[Tensor]]


def with_gradients(function: Callable[..., Tensor], *leaves: Tensor) -> Step:
    """Forward and backward: the loss and the gradients of its leaves."""
    inputs = [x.requires_grad_() for x in leaves]

    def step() -> list[Tensor]:
        loss = function(*inputs)
        return [loss, *torch.autograd.grad(loss, inputs)]

    return step


def plain_infonce(z_1: Tensor, z_2: Tensor) -> Tensor:
    """All rows at once, as one would write it."""
    similarity = torch.nn.functional.normalize(z_1) @ torch.nn.functional.normalize(z_2).T
    return ((similarity / 0.2).logsumexp(1) - similarity.diagonal().clamp(max=0.9) / 0.2).mean()


def cases() -> dict[tuple[str, str], tuple[Step, Step]]:
    """(name with its shape, what plain torch is) -> (ours, plain torch)."""
    torch.manual_seed(0)
    tokens, vocabulary, width = 1024, 16_384, 256
    hidden, weight = torch.randn(tokens, width), torch.randn(vocabulary, width) / width**0.5
    target = torch.randint(vocabulary, (tokens,))
    with torch.no_grad():
        old = (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None])[:, 0]
    live = {"advantage_T": torch.randn(tokens), "old_logprob_T": old, "weight_T": torch.full((tokens,), 1 / tokens)}
    half = live | {"advantage_T": live["advantage_T"] * (torch.arange(tokens) % 2)}

    def policy(options: dict[str, Tensor]) -> tuple[Step, Step]:
        return (
            with_gradients(lambda h, w: linear_policy_loss(h, w, target, **options)[0], hidden, weight),
            with_gradients(lambda h, w: linear_policy_loss_reference(h, w, target, **options)[0], hidden, weight),
        )

    cu = torch.arange(0, 8193, 128)
    states, values = torch.randn(8192, 512), torch.randn(8192)
    z_1, z_2 = torch.randn(256, 64), torch.randn(256, 64)
    shape = f"T={tokens} V={vocabulary} D={width}"
    return {
        (f"linear_policy_loss {shape}", "all logits at once"): policy(live),
        (f"linear_policy_loss, half of the advantages zero, {shape}", "all logits at once"): policy(half),
        ("value_pool 64 x 128 tokens, D=512", "a loop over sequences"): (
            with_gradients(lambda h, v: value_pool(h, v, cu)[0].square().sum(), states, values),
            with_gradients(lambda h, v: value_pool_reference(h, v, cu)[0].square().sum(), states, values),
        ),
        ("masked_infonce 256 x 256, D=64", "all rows at once"): (
            with_gradients(lambda a, c: masked_infonce(a, c)[0], z_1, z_2),
            with_gradients(lambda a, c: plain_infonce(a, c), z_1, z_2),
        ),
        ("gae 64 x 128 tokens", "a loop over tokens"): (
            lambda: list(gae(values.detach(), values.detach(), cu, gamma=1.0, lam=0.95)),
            lambda: list(gae_reference(values.detach(), values.detach(), cu, gamma=1.0, lam=0.95)),
        ),
    }


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(name: str, baseline: str, ours: Step, plain: Step) -> dict[str, object]:
    for a, b in zip(ours(), plain(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m: f"{name}: not timed, results differ: {m}")
    pairs = [(seconds(ours), seconds(plain)) for _ in range(REPEATS)]
    mine, theirs = (sorted(times) for times in zip(*pairs, strict=True))
    return {
        "case": name,
        "plain_torch": baseline,
        "ours_ms": round(statistics.median(mine) * 1e3, 2),
        "ours_ms_range": [round(mine[0] * 1e3, 2), round(mine[-1] * 1e3, 2)],
        "plain_torch_ms": round(statistics.median(theirs) * 1e3, 2),
        "plain_torch_ms_range": [round(theirs[0] * 1e3, 2), round(theirs[-1] * 1e3, 2)],
        "plain_over_ours": round(statistics.median(theirs) / statistics.median(mine), 2),
    }


def commit() -> str:
    result = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def main() -> None:
    machine = {
        "device": "cpu",
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "repeats": REPEATS,
    }
    rows = []
    for (name, baseline), (ours, plain) in cases().items():
        rows.append(measure(name, baseline, ours, plain))
        print(json.dumps(rows[-1]))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ops_cpu.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    lines = [
        "# Operators on the CPU, torch implementation",
        "",
        f"Forward and backward, float32, median of {REPEATS} interleaved repeats. Nothing here ran on a GPU.",
        "",
        "| case | plain torch is | ours, ms | plain torch, ms | plain / ours |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {r['case']} | {r['plain_torch']} | {r['ours_ms']} | {r['plain_torch_ms']} | {r['plain_over_ours']} |"
            for r in rows
        ),
        "",
        ", ".join(f"{key} {value}" for key, value in machine.items()),
    ]
    (RESULTS / "ops_cpu.md").write_text("\n".join(lines) + "\n")
    print(f"wrote {RESULTS / 'ops_cpu.md'}")


if __name__ == "__main__":
    main()
