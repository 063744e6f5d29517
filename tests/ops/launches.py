"""Run by test_launches.py in a process where Triton compiles: what each kernel's launches would be compiled for.

Nothing is compiled or run. A launch is replaced by a note of its key: types, which integers are 1 or divisible by 16,
which addresses are, and the compile-time constants.
"""

import json
import sys
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import carft_kernels as ck
from carft_kernels import _matmul_kernels, _runtime

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
LAUNCHES: dict[str, set[str]] = {}


def note(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
    bind = create_function_from_signature(self.signature, self.params, BACKEND)
    key = str(bind(*arguments, **named)[1:])
    LAUNCHES.setdefault(self.fn.__name__, set()).add(key)


def every_operator(tokens: int, dtype: torch.dtype) -> None:
    width, vocabulary, impl = 64, 512, "triton"
    hidden = torch.zeros(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.zeros(vocabulary, width, dtype=dtype, requires_grad=True)
    logits = torch.zeros(tokens, vocabulary, dtype=dtype, requires_grad=True)
    target, x = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens, requires_grad=True)
    mask, cu = torch.ones(tokens, dtype=torch.bool), torch.tensor([0, tokens])
    policy: dict[str, Any] = {"advantage_T": x, "old_logprob_T": x, "weight_T": torch.ones(tokens)}
    outputs: list[Tensor | None] = [
        *ck.token_logprob(logits, target, with_lse=True, logit_softcap=3.0, impl=impl),
        *ck.linear_logprob(hidden, weight, target, with_lse=True, logit_softcap=3.0, impl=impl),
        *ck.token_logprob(logits, target, with_entropy=True, impl=impl),
        *ck.linear_logprob(hidden, weight, target, with_entropy=True, impl=impl),
        ck.linear_logprob(hidden, weight, target, impl=impl)[0],
        ck.policy_loss(x, x, x, weight_T=x, impl=impl)[0],
        ck.policy_loss(x, x, x, weight_T=x, correction_T=x, cu_seqlens=cu, impl=impl)[0],
        ck.value_loss(x, x, x, weight_T=x, impl=impl)[0],
        ck.value_pool(hidden, x, cu, mask_T=mask, impl=impl)[0],
    ]
    for chunk in (None, max(1, tokens // 3)):
        loss, *_ = ck.linear_policy_loss(
            hidden, weight, target, **policy, entropy_coef=0.1, chunk_tokens=chunk, skip_dead=False, impl=impl
        )
        outputs.append(loss)
    torch.stack([y.sum() for y in outputs if y is not None]).sum().backward()
    ck.gae(x, x, cu, gamma=1.0, lam=1.0, impl=impl)
    ck.kl_shaped_reward(torch.zeros(1), x, x, cu, kl_coef=0.1, impl=impl)
    ck.whiten(x, mask, impl=impl)
    ck.lcs_mask(target, cu, target, cu, impl=impl)


def main(lengths: list[int]) -> None:
    _runtime.INTERPRETED = True  # so that Triton takes tensors of the CPU, and picks tiles without a GPU
    _matmul_kernels.INTERPRETED = True
    JITFunction.run = note
    ck.set_index_checks(False)
    found = {}
    for length in lengths:
        LAUNCHES.clear()
        for dtype in (torch.float32, torch.bfloat16):
            every_operator(length, dtype)
        found[str(length)] = {name: sorted(keys) for name, keys in LAUNCHES.items()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main([int(x) for x in sys.argv[1:]])
