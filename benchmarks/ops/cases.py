"""The operators, each with a plain expression, torch.compile of it, and other libraries' ways; read by `measure`.

Bytes and FLOPs are what the task cannot do without, whoever does it: a variant that recomputes is not credited for it.
"""

import importlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import carft_kernels as ck
from carft_kernels._runtime import chunk_size
from carft_kernels.gae import gae_reference, kl_shaped_reward_reference, whiten_reference
from carft_kernels.lcs import lcs_mask_reference
from carft_kernels.linear_logprob import linear_logprob_reference
from carft_kernels.linear_policy_loss import linear_policy_loss_reference
from carft_kernels.policy_loss import policy_loss_reference, value_loss_reference
from carft_kernels.token_logprob import token_logprob_reference
from carft_kernels.value_pool import value_pool_reference

PLAIN = "plain torch"
Step = Callable[[], list[Tensor]]
"""One call: the loss and its gradients, or the results of what has none."""
Variants = dict[str, Step | str]
"""Ours first, then plain torch, then the rest; a text says why that one cannot run."""


def nothing(**_: int) -> float:
    return 0.0


@dataclass(frozen=True)
class Case:
    operator: str
    shape: dict[str, int]
    build: Callable[..., Variants]
    flops: Callable[..., float] = nothing
    bytes: Callable[..., float] = nothing
    """Bytes, with `size` bytes an element of the large tensors."""
    devices: tuple[str, ...] = ("cpu",)
    note: str = ""
    slow_oracle: bool = False
    """Plain torch is called once, to compare with, and that call is its time."""

    @property
    def name(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.shape.items())
        return f"{self.operator}, {sizes}{f', {self.note}' if self.note else ''}"

    def variants(self, device: str) -> Variants:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return self.build(Maker(device, dtype), **self.shape)


class Maker:
    """Tensors of one case; the same at every call."""

    def __init__(self, device: str, dtype: torch.dtype, *, exact: bool = False) -> None:
        """`exact`: the values of `dtype`, held in float64."""
        self.device, self.dtype, self.exact = torch.device(device), dtype, exact
        self.generator = torch.Generator(self.device).manual_seed(0)

    def randn(self, *shape: int, scale: float = 1.0, wide: bool = False) -> Tensor:
        """Normal, in `dtype`; float32 where `wide`."""
        x = torch.randn(shape, generator=self.generator, device=self.device) * scale
        x = x if wide else x.to(self.dtype)
        return x.double() if self.exact else x

    def randint(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def offsets(self, tokens: int, length: int) -> Tensor:
        return torch.arange(0, tokens + 1, length, device=self.device)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any] | str:
        if self.device.type == "cpu" and shutil.which("g++") is None:
            return "not applicable: no C++ compiler here"
        return torch.compile(function, dynamic=False)

    def other(self, module: str, name: str, *, cuda: bool) -> Any:
        """What another library calls `name`, or a text why it cannot run here."""
        if cuda and self.device.type != "cuda":
            return "not applicable: runs on a GPU only"
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            return f"not installed: {error.name}"


def with_gradients(function: Callable[..., Tensor] | str, *leaves: Tensor) -> Step | str:
    """Forward and backward: the loss and the gradients of its leaves."""
    if isinstance(function, str):
        return function
    inputs = [x.detach().requires_grad_() for x in leaves]

    def step() -> list[Tensor]:
        loss = function(*inputs)
        return [loss, *torch.autograd.grad(loss, inputs)]

    return step


def using(found: Any, call: Callable[[Any], Callable[..., Tensor]]) -> Callable[..., Tensor] | str:
    """`call(found)`, unless `found` is the reason why there is nothing."""
    return found if isinstance(found, str) else call(found)


def without_gradient(function: Callable[[], Any] | str) -> Step | str:
    if isinstance(function, str):
        return function

    def step() -> list[Tensor]:
        with torch.no_grad():
            found = function()
        return list(found) if isinstance(found, tuple | list) else [found]

    return step


def token_logprob(make: Maker, T: int, V: int) -> Variants:
    logits, target = make.randn(T, V), make.randint(V, T)

    def plain(x: Tensor) -> Tensor:
        return token_logprob_reference(x, target)[0].sum()

    trl = make.other("trl.trainer.utils", "selective_log_softmax", cuda=False)
    liger = make.other("liger_kernel.transformers.functional", "liger_cross_entropy", cuda=True)
    flash = make.other("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss", cuda=True)
    return {
        "token_logprob": with_gradients(lambda x: ck.token_logprob(x, target)[0].sum(), logits),
        PLAIN: with_gradients(plain, logits),
        "torch.compile": with_gradients(make.compiled(plain), logits),
        "trl selective_log_softmax": with_gradients(using(trl, lambda f: lambda x: f(x, target).sum()), logits),
        "liger-kernel cross entropy": with_gradients(
            using(liger, lambda f: lambda x: -f(x, target, reduction="sum")), logits.clone()
        ),
        "flash-attn cross entropy": with_gradients(
            using(flash, lambda f: lambda x: -f(x, target)[0].sum()), logits.clone()
        ),
    }


CHUNKED = "chunks by cuBLAS"
"""Logits of a chunk of tokens in memory, by cuBLAS: what a fused kernel has to beat on a GPU."""


def linear_logprob(make: Maker, T: int, V: int, D: int) -> Variants:
    hidden, weight, target = make.randn(T, D), make.randn(V, D, scale=D**-0.5), make.randint(V, T)

    def plain(h: Tensor, w: Tensor) -> Tensor:
        return linear_logprob_reference(h, w, target)[0].sum()

    cut = make.other("cut_cross_entropy", "linear_cross_entropy", cuda=True)
    liger = make.other("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", cuda=True)
    own = make.other("torch.nn.functional", "linear_cross_entropy", cuda=False)  # from torch 2.13 on
    in_chunks = {"reduction": "sum", "options": getattr(torch.nn, "LinearCrossEntropyOptions", lambda: None)()}
    both = hidden, weight
    return {
        "linear_logprob": with_gradients(lambda h, w: ck.linear_logprob(h, w, target)[0].sum(), *both),
        PLAIN: with_gradients(plain, *both),
        **in_torch(make, lambda h, w: ck.linear_logprob(h, w, target, impl="torch")[0].sum(), *both),
        "torch.compile": with_gradients(make.compiled(plain), *both),
        "cut-cross-entropy": with_gradients(
            using(cut, lambda f: lambda h, w: -f(h, w, target, reduction="sum", filter_eps=None)), *both
        ),
        "liger-kernel fused linear cross entropy": with_gradients(
            using(liger, lambda f: lambda h, w: -f(h, w, target, reduction="sum")), *both
        ),
        "torch linear_cross_entropy": with_gradients(
            using(own, lambda f: lambda h, w: -f(h, w, target, **in_chunks)), *both
        ),
    }


def in_torch(make: Maker, function: Callable[..., Tensor], *leaves: Tensor) -> Variants:
    """On a GPU, the operator without Triton; elsewhere that is the operator itself."""
    return {f"{CHUNKED}, no Triton": with_gradients(function, *leaves)} if make.device.type == "cuda" else {}


def linear_logprob_forward(make: Maker, T: int, V: int, D: int) -> Variants:
    """The log-prob pass: the fused forward against cuBLAS and a pass over each chunk's logits."""
    hidden, weight, target = make.randn(T, D), make.randn(V, D, scale=D**-0.5), make.randint(V, T)
    tokens = chunk_size(T, V, torch.device("cuda"))

    def plain() -> Tensor:
        return linear_logprob_reference(hidden, weight, target)[0]

    def chunks() -> Tensor:
        pairs = zip(hidden.split(tokens), target.split(tokens), strict=True)
        return torch.cat([ck.token_logprob(h @ weight.T, t)[0] for h, t in pairs])

    return {
        "linear_logprob": without_gradient(lambda: ck.linear_logprob(hidden, weight, target)[0]),
        PLAIN: without_gradient(plain),
        f"{CHUNKED}, then token_logprob": without_gradient(chunks),
        f"{CHUNKED}, no Triton": without_gradient(lambda: ck.linear_logprob(hidden, weight, target, impl="torch")[0]),
        "torch.compile": without_gradient(make.compiled(plain)),
    }


def linear_policy_loss(make: Maker, T: int, V: int, D: int, half: bool = False) -> Variants:
    """Advantages of a sequence of 64 tokens are one number, which is all that the other library takes.

    No ratio is near a clip bound, 0.8 or 1.2: there a rounding decides whether a token has a gradient. The loss is no
    small difference of large numbers.
    """
    length = 64
    hidden, weight, target = make.randn(T, D), make.randn(V, D, scale=D**-0.5), make.randint(V, T)
    advantage_B = make.randn(T // length, wide=True) + 1
    if half:
        advantage_B *= torch.arange(T // length, device=make.device) % 2
    with torch.no_grad():
        pairs = zip(hidden.split(512), target.split(512), strict=True)
        old = torch.cat([linear_logprob_reference(h.float(), weight.float(), t)[0] for h, t in pairs])
    log_ratio = (0.05 * make.randn(T, wide=True)).clamp(-0.1, 0.1)
    old = old - log_ratio - 0.4 * log_ratio.sign() * (torch.arange(T, device=make.device) % 4 == 0)
    options = {
        "advantage_T": advantage_B.repeat_interleave(length),
        "old_logprob_T": old,
        "weight_T": torch.full((T,), 1 / T, device=make.device),
    }

    def plain(h: Tensor, w: Tensor) -> Tensor:
        return linear_policy_loss_reference(h, w, target, **options)[0]

    def liger(loss_class: Any) -> Callable[..., Tensor]:
        loss = loss_class(beta=0.0, use_ref_model=False, loss_type="bnpo")
        mask = torch.ones(T // length, length, device=make.device)

        def call(h: Tensor, w: Tensor) -> Tensor:
            rows = (h.view(-1, length, D), w, target.view(-1, length), mask, advantage_B)
            return loss(*rows, old_per_token_logps=old.view(-1, length))[0]

        return call

    def matmuls() -> list[Tensor]:
        logits = hidden @ weight.T
        return [logits @ weight, logits.T @ hidden]

    both = hidden, weight
    found: Variants = {
        "linear_policy_loss": with_gradients(lambda h, w: ck.linear_policy_loss(h, w, target, **options)[0], *both),
        PLAIN: with_gradients(plain, *both),
        **in_torch(make, lambda h, w: ck.linear_policy_loss(h, w, target, **options, impl="torch")[0], *both),
        "torch.compile": with_gradients(make.compiled(plain), *both),
        "liger-kernel fused linear GRPO": with_gradients(
            using(make.other("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss", cuda=False), liger), *both
        ),
    }
    return found if half else found | {MATMULS: without_gradient(matmuls)}


MATMULS = "its three matmuls alone"
"""A floor, not a way of computing the loss: the one variant whose results are not compared."""


def policy_loss(make: Maker, T: int) -> Variants:
    logprob, old, advantage = (make.randn(T, wide=True) for _ in range(3))
    weight = torch.full((T,), 1 / T, device=make.device)

    def plain(x: Tensor) -> Tensor:
        return policy_loss_reference(x, old, advantage, weight_T=weight)

    return {
        "policy_loss": with_gradients(lambda x: ck.policy_loss(x, old, advantage, weight_T=weight)[0], logprob),
        PLAIN: with_gradients(plain, logprob),
        "torch.compile": with_gradients(make.compiled(plain), logprob),
    }


def value_loss(make: Maker, T: int) -> Variants:
    value, old, return_ = (make.randn(T, wide=True) for _ in range(3))
    weight = torch.full((T,), 1 / T, device=make.device)

    def plain(x: Tensor) -> Tensor:
        return value_loss_reference(x, old, return_, weight_T=weight)

    return {
        "value_loss": with_gradients(lambda x: ck.value_loss(x, old, return_, weight_T=weight)[0], value),
        PLAIN: with_gradients(plain, value),
        "torch.compile": with_gradients(make.compiled(plain), value),
    }


LOOP = "not applicable: a Python loop over data"


def cpu_linear(make: Maker, N: int, K: int, M: int) -> Variants:
    both = make.randn(N, K), make.randn(M, K)

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, w).square().sum()

    return {
        "cpu_linear": with_gradients(lambda x, w: ck.cpu_linear(x, w).square().sum(), *both),
        PLAIN: with_gradients(plain, *both),
        "torch.compile": with_gradients(make.compiled(plain), *both),
    }


def value_pool(make: Maker, T: int, D: int, length: int) -> Variants:
    cu, hidden, value = make.offsets(T, length), make.randn(T, D), make.randn(T, wide=True)

    def loss(pool: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda h, v: pool(h, v, cu)[0].square().sum()

    return {
        "value_pool": with_gradients(loss(ck.value_pool), hidden, value),
        PLAIN: with_gradients(loss(value_pool_reference), hidden, value),
        "torch.compile": LOOP,
    }


def masked_infonce(make: Maker, N: int, D: int) -> Variants:
    anchors, candidates = make.randn(N, D), make.randn(N, D)

    def plain(z_1: Tensor, z_2: Tensor) -> Tensor:
        similarity = torch.nn.functional.normalize(z_1.float()) @ torch.nn.functional.normalize(z_2.float()).T
        return ((similarity / 0.2).logsumexp(1) - similarity.diagonal().clamp(max=0.9) / 0.2).mean()

    # margin 2 switches its mask of false negatives off, stable=False its own scale of the gradient
    memeff = make.other("memeff", "MemoryEfficientQwen3Loss", cuda=True)
    both = anchors, candidates
    return {
        "masked_infonce": with_gradients(lambda a, c: ck.masked_infonce(a, c)[0], *both),
        PLAIN: with_gradients(plain, *both),
        "torch.compile": with_gradients(make.compiled(plain), *both),
        "memeff InfoNCE": with_gradients(
            using(memeff, lambda loss: loss(temperature=0.2, margin=2.0, stable=False)), *both
        ),
    }


def gae(make: Maker, T: int, length: int) -> Variants:
    cu, reward, value = make.offsets(T, length), make.randn(T, wide=True), make.randn(T, wide=True)
    return {
        "gae": without_gradient(lambda: ck.gae(reward, value, cu, gamma=1.0, lam=0.95)),
        PLAIN: without_gradient(lambda: gae_reference(reward, value, cu, gamma=1.0, lam=0.95)),
        "torch.compile": LOOP,
    }


def kl_shaped_reward(make: Maker, T: int, length: int) -> Variants:
    cu, old, ref = make.offsets(T, length), make.randn(T, wide=True), make.randn(T, wide=True)
    score = make.randn(T // length, wide=True)
    return {
        "kl_shaped_reward": without_gradient(lambda: ck.kl_shaped_reward(score, old, ref, cu, kl_coef=0.1)),
        PLAIN: without_gradient(lambda: kl_shaped_reward_reference(score, old, ref, cu, kl_coef=0.1)),
        "torch.compile": LOOP,
    }


def whiten(make: Maker, T: int) -> Variants:
    x = make.randn(T, wide=True)

    def plain() -> Tensor:
        return whiten_reference(x)

    return {
        "whiten": without_gradient(lambda: ck.whiten(x)),
        PLAIN: without_gradient(plain),
        "torch.compile": without_gradient(make.compiled(plain)),
    }


def lcs_mask(make: Maker, T: int, length: int) -> Variants:
    cu = torch.tensor([*range(0, T, length), T])  # on the host, where the trainer has them
    a, b = make.randint(300, T), make.randint(300, T)
    return {
        "lcs_mask": without_gradient(lambda: ck.lcs_mask(a, cu, b, cu)),
        PLAIN: without_gradient(lambda: lcs_mask_reference(a, cu, b, cu)),
        "torch.compile": LOOP,
    }


def three_products(T: int, V: int, D: int, **_: int) -> float:
    return 6.0 * T * V * D


def one_product(T: int, V: int, D: int, **_: int) -> float:
    return 2.0 * T * V * D


def half_of_the_gradients(**sizes: int) -> float:
    """Forward for every token, two gradients for half of them."""
    return three_products(**sizes) * 2 / 3


def three_matmuls(N: int, K: int, M: int) -> float:
    return 6.0 * N * K * M


def three_similarities(N: int, D: int) -> float:
    return 6.0 * N * N * D


def passes_over_logits(size: int, T: int, V: int) -> float:
    return 3.0 * size * T * V


def passes_over_hidden(size: int, T: int, D: int, **_: int) -> float:
    return 3.0 * size * T * D


def floats_a_token(size: int, T: int, count: int, **_: int) -> float:
    """Whatever the dtype: these hold float32."""
    return 4.0 * count * T


CPU, GPU, BOTH = ("cpu",), ("cuda",), ("cpu", "cuda")
SMOLLM2 = {"T": 512, "V": 49_152, "D": 576}
PAPER = {"T": 8192, "V": 32_016, "D": 4096}
QWEN = {"T": 8192, "V": 152_064, "D": 3584}


def _cases() -> list[Case]:
    cases = []
    for sizes, devices in ((SMOLLM2, CPU), (PAPER, GPU), (QWEN, GPU)):
        tokens_by_vocabulary = {name: sizes[name] for name in ("T", "V")}
        cases += [
            Case("token_logprob", tokens_by_vocabulary, token_logprob, bytes=passes_over_logits, devices=devices),
            Case("linear_logprob", sizes, linear_logprob, three_products, devices=devices),
            Case("linear_policy_loss", sizes, linear_policy_loss, three_products, devices=devices),
            Case(
                "linear_policy_loss",
                sizes,
                partial(linear_policy_loss, half=True),
                half_of_the_gradients,
                devices=devices,
                note="half of the advantages 0",
            ),
        ]
    for width, devices in ((512, CPU), (3584, GPU), (4096, GPU)):
        pooled = {"T": 8192, "D": width, "length": 128}
        cases.append(Case("value_pool", pooled, value_pool, bytes=passes_over_hidden, devices=devices))
    for n, width, devices in ((256, 64, BOTH), (4096, 64, CPU), (64, 4096, GPU), (4096, 4096, GPU)):
        sizes = {"N": n, "D": width}
        cases.append(Case("masked_infonce", sizes, masked_infonce, three_similarities, devices=devices))
    for operator, build, count in (
        ("policy_loss", policy_loss, 5),
        ("value_loss", value_loss, 5),
        ("whiten", whiten, 2),
    ):
        cases.append(Case(operator, {"T": 8192}, build, bytes=partial(floats_a_token, count=count), devices=BOTH))
    for operator, build, count in (("gae", gae, 4), ("kl_shaped_reward", kl_shaped_reward, 3)):
        cases.append(
            Case(operator, {"T": 8192, "length": 128}, build, bytes=partial(floats_a_token, count=count), devices=BOTH)
        )
    cases.append(Case("cpu_linear", {"N": 1310, "K": 576, "M": 1536}, cpu_linear, three_matmuls))
    cases.append(Case("lcs_mask", {"T": 8192, "length": 1024}, lcs_mask, devices=BOTH, slow_oracle=True))
    for sizes in (PAPER, QWEN):
        note = "without gradient"
        cases.append(Case("linear_logprob", sizes, linear_logprob_forward, one_product, devices=GPU, note=note))
    return cases


CASES = _cases()


def check_cases() -> list[tuple[Case, torch.dtype]]:
    """Every operator in each dtype it treats differently, at sizes that no tile divides, small enough for float64."""
    head, pooled = {"T": 1024, "V": 32_003, "D": 1000}, {"T": 1040, "length": 130}
    sizes = {
        "token_logprob": {"T": 1003, "V": 32_003},
        "linear_logprob": head,
        "linear_policy_loss": head,
        "value_pool": pooled | {"D": 1000},
        "masked_infonce": {"N": 250, "D": 1000},
        "gae": pooled,
        "kl_shaped_reward": pooled,
        "lcs_mask": pooled,
    }
    float32_only = ("policy_loss", "value_loss", "whiten", "gae", "kl_shaped_reward", "lcs_mask")
    chosen: dict[tuple[str, str], Case] = {}
    for case in CASES:
        if "cuda" in case.devices:
            smaller = replace(case, shape=sizes.get(case.operator, {"T": 5003}))
            chosen.setdefault((case.operator, case.note), smaller)
    return [
        (case, dtype)
        for case in chosen.values()
        for dtype in (torch.bfloat16, torch.float32)
        if dtype == torch.float32 or case.operator not in float32_only
    ]
