"""Operators as PyTorch sees them: registration, torch.compile, allocations."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import carft_kernels as ck
from carft_kernels import _head, _policy_kernels, _row_kernels, _runtime, lcs
from carft_kernels._runtime import use_triton
from carft_kernels.lcs import lcs_mask_reference

from .checks import DEVICE, offsets, randint, randn

T, V, D = 9, 21, 16
IMPLEMENTATIONS = ["torch", "triton"]


def leaf(seed: int, *shape: int) -> Tensor:
    return randn(seed, *shape).float().to(DEVICE).requires_grad_()


def vector(seed: int) -> Tensor:
    return randn(seed, T).float().to(DEVICE)


def calls(impl: Any) -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    """Every public operator, as a function of the tensors that carry gradient."""
    target, cu = randint(0, V, T), offsets([4, 0, 5])
    target[2] = -100
    a, b, w = vector(1), vector(2), vector(3).abs()
    mask = torch.arange(T, device=DEVICE) % 3 > 0
    frozen = leaf(9, T, D + 2), leaf(10, V, D + 2), leaf(11, V)
    return {
        "token_logprob": (
            lambda x: ck.token_logprob(x * 1, target, with_entropy=True, impl=impl),
            (leaf(4, T, V),),
        ),
        "token_logprob, in place": (
            lambda x: ck.token_logprob(x * 1, target, inplace_backward=True, impl=impl)[0],
            (leaf(4, T, V),),
        ),
        "linear_logprob": (
            lambda h, x, c: ck.linear_logprob(h, x, target, bias=c, with_entropy=True, impl=impl),
            (leaf(5, T, D), leaf(6, V, D), leaf(7, V)),
        ),
        "linear_policy_loss": (
            lambda h, x: ck.linear_policy_loss(
                h, x, target, advantage_T=a, old_logprob_T=b, weight_T=w, entropy_coef=0.1, impl=impl
            ),
            (leaf(5, T, D), leaf(6, V, D)),
        ),
        "linear_policy_loss, all tokens": (
            lambda h, x: ck.linear_policy_loss(
                h, x, target, advantage_T=a, old_logprob_T=b, weight_T=w, skip_dead=False, impl=impl
            ),
            (leaf(5, T, D), leaf(6, V, D)),
        ),
        "linear_policy_loss, every term": (
            lambda h, x, c: ck.linear_policy_loss(
                h,
                x,
                target,
                advantage_T=a,
                old_logprob_T=b,
                weight_T=w,
                bias=c,
                dual_clip=3.0,
                correction_T=w,
                reference_hidden_TE=frozen[0],
                reference_weight_VE=frozen[1],
                reference_bias=frozen[2],
                kl_coef=0.1,
                kl_estimate="k2",
                kl_clamp=2.0,
                entropy_coef=0.1,
                z_loss_coef=0.1,
                logit_softcap=5.0,
                top_k=9,
                top_p=0.8,
                impl=impl,
            ),
            (leaf(5, T, D), leaf(6, V, D), leaf(7, V)),
        ),
        "linear_logprob, soft cap and log-sum-exp": (
            lambda h, x: ck.linear_logprob(h, x, target, with_lse=True, logit_softcap=5.0, impl=impl),
            (leaf(5, T, D), leaf(6, V, D)),
        ),
        "token_logprob, soft cap and log-sum-exp": (
            lambda x: ck.token_logprob(x * 1, target, with_lse=True, logit_softcap=5.0, impl=impl),
            (leaf(4, T, V),),
        ),
        "linear_logprob, top-k and top-p": (
            lambda h, x: ck.linear_logprob(h, x, target, with_entropy=True, top_k=9, top_p=0.8, impl=impl),
            (leaf(5, T, D), leaf(6, V, D)),
        ),
        "token_logprob, top-k and top-p": (
            lambda x: ck.token_logprob(x * 1, target, with_entropy=True, top_k=9, top_p=0.8, impl=impl),
            (leaf(4, T, V),),
        ),
        "policy_loss, ratios of sequences": (
            lambda x: ck.policy_loss(x, a, b, weight_T=w, correction_T=w, cu_seqlens=cu, dual_clip=3.0, impl=impl),
            (leaf(8, T),),
        ),
        "linear_policy_loss, ratios of sequences": (
            lambda h, x: ck.linear_policy_loss(
                h, x, target, advantage_T=a, old_logprob_T=b, weight_T=w, cu_seqlens=cu, impl=impl
            ),
            (leaf(5, T, D), leaf(6, V, D)),
        ),
        "policy_loss, cispo": (lambda x: ck.policy_loss(x, a, b, weight_T=w, loss="cispo", impl=impl), (leaf(8, T),)),
        "value_pool": (
            lambda h, v: ck.value_pool(h, v, cu, mask_T=mask, impl=impl),
            (leaf(5, T, D), leaf(8, T)),
        ),
        "masked_infonce": (
            lambda x, y: ck.masked_infonce(x, y, row_mask_N=mask, impl=impl),
            (leaf(5, T, D), leaf(6, T + 3, D)),
        ),
        "policy_loss": (lambda x: ck.policy_loss(x, a, b, weight_T=w, impl=impl), (leaf(8, T),)),
        "value_loss": (lambda x: ck.value_loss(x, a, b, weight_T=w, impl=impl), (leaf(8, T),)),
        "gae": (lambda: ck.gae(a, b, cu, gamma=0.9, lam=0.9, impl=impl), ()),
        "kl_shaped_reward": (lambda: ck.kl_shaped_reward(a[:3], a, b, cu, kl_coef=0.1, impl=impl), ()),
        "whiten": (lambda: ck.whiten(a, mask, eps=0.5, impl=impl), ()),
        "lcs_mask": (lambda: ck.lcs_mask(target, cu, target.flip(0), cu, impl=impl), ()),
    }


NAMES = list(calls("torch"))


class Recorded(TorchDispatchMode):
    """Names every operation and the shapes it returns; inside custom operators too, if asked."""

    def __init__(self, *, inside: bool) -> None:
        super().__init__()
        self.inside = inside
        self.calls: list[tuple[str, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside and func.namespace == "carft":
            with self:
                return OPDEFS[func._name.removesuffix(".default")]._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func.overloadpacket.__name__, args, result))
        return result

    def readbacks(self) -> set[str]:
        """What stops a CUDA stream: numbers read, and boolean indices, whose count is the result's shape."""
        names = {"nonzero", "_local_scalar_dense", "item", "masked_select", "is_nonzero", "equal", "unique_consecutive"}
        found = {name for name, _, _ in self.calls if name in names}
        for name, args, _ in self.calls:
            if name in ("index", "index_put", "index_put_"):
                found |= {f"{name} by bool" for x in args[1] if x is not None and x.dtype == torch.bool}
        return found


def flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = outputs.values()
    return [] if outputs is None else [x for y in outputs for x in flat(y)]


def scalar(outputs: Any) -> Tensor:
    return torch.stack([x.float().sum() for x in flat(outputs) if x.requires_grad]).sum()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All four utilities, on the operator with gradients wanted and on its backward."""
    recorded: list[tuple[Any, tuple[Any, ...]]] = []
    function, inputs = calls(impl)[name]
    operator = type(OPDEFS["carft::gae"])
    original = operator.__call__

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        recorded.append((self, arguments))
        return original(self, *arguments, **options)

    monkeypatch.setattr(operator, "__call__", call)
    with Recorded(inside=False):  # a mode, under which every call goes through the dispatcher
        outputs = function(*inputs)
        if inputs:
            scalar(outputs).backward()
    monkeypatch.undo()
    assert len(recorded) >= (2 if inputs else 1)
    for definition, arguments in recorded:
        # a backward runs without gradient mode
        forward = "backward" not in definition._qualname
        arguments = tuple(
            x.detach().clone().requires_grad_(forward and x.requires_grad) if isinstance(x, Tensor) else x
            for x in arguments
        )
        results = torch.library.opcheck(definition, arguments)
        assert set(results.values()) == {"SUCCESS"}
        assert len(results) == 4


@pytest.mark.parametrize("name", NAMES)
def test_past_the_dispatcher_is_as_through_it(name: str) -> None:
    """A mode sees the operators; without one the same numbers come back, and the same tensors have a gradient."""
    function, inputs = calls("torch")[name]
    found = []
    for through in (True, False):
        with Recorded(inside=False) if through else contextlib.nullcontext() as mode:
            outputs = flat(function(*inputs))
            gradients = torch.autograd.grad(scalar(outputs), inputs) if inputs else ()
        assert mode is None or any(call in str(NAMES) for call, _, _ in mode.calls)
        found.append([x.detach() for x in (*outputs, *gradients)] + [torch.tensor(x.requires_grad) for x in outputs])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_without_a_graph_break(name: str, impl: str) -> None:
    function, inputs = calls(impl)[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, ours = function(*inputs), compiled(*inputs)
    for x, y in zip(flat(ours), flat(expected), strict=True):
        torch.testing.assert_close(x, y)
    if inputs:
        gradients = (torch.autograd.grad(scalar(outputs), inputs) for outputs in (ours, expected))
        for x, y in zip(*gradients, strict=True):
            torch.testing.assert_close(x, y)


@torch.compiler.config.patch(force_disable_caches=True)
def test_compiled_by_inductor() -> None:
    """The default backend, once: a training step around an operator."""
    function, inputs = calls("triton")["linear_policy_loss"]
    compiled = torch.compile(lambda h, x: function(torch.nn.functional.silu(h), x)[0] * 2, fullgraph=True)
    loss = compiled(*inputs)
    gradients = torch.autograd.grad(loss, inputs)
    plain = function(torch.nn.functional.silu(inputs[0]), inputs[1])[0] * 2
    torch.testing.assert_close(loss, plain)
    for x, y in zip(gradients, torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", [n for n in NAMES if calls("torch")[n][1]])
def test_second_derivatives_are_refused(name: str) -> None:
    """Also where the first one depends on the inputs through the loss alone."""
    function, inputs = calls("torch")[name]
    first = torch.autograd.grad(scalar(function(*inputs)).square(), inputs, create_graph=True)
    message = "does not require grad" if "in place" in name else "no autograd formula"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(sum(g.square().sum() for g in first), inputs)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", [n for n in NAMES if calls("torch")[n][1]])
def test_autocast_changes_nothing(name: str, impl: str) -> None:
    """Operators compute in the dtypes they are given; their backward is outside of autocast."""
    function, inputs = calls(impl)[name]
    expected = flat(function(*inputs))
    with torch.autocast(DEVICE, torch.bfloat16):
        found = flat(function(*inputs))
    found += torch.autograd.grad(scalar(found), inputs)
    expected += torch.autograd.grad(scalar(expected), inputs)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_logits_whose_rows_share_memory_are_not_overwritten(impl: Any) -> None:
    gradients = []
    for inplace in (False, True):
        row = leaf(4, 1, V)
        found = ck.token_logprob(
            row.expand(T, V), randint(0, V, T), with_entropy=True, inplace_backward=inplace, impl=impl
        )
        gradients += torch.autograd.grad(scalar(found), row)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["policy_loss", "value_loss", "linear_policy_loss"])
def test_a_token_that_is_nan_has_a_nan_gradient(name: str, impl: str) -> None:
    """And only that token, unless it reaches others through the LM head's weight."""
    function, inputs = calls(impl)[name]
    if name == "linear_policy_loss":  # without entropy: tokens without gradient are left out
        ones, target = torch.ones(T, device=DEVICE), randint(0, V, T)
        function = functools.partial(
            ck.linear_policy_loss, target_T=target, advantage_T=ones, old_logprob_T=None, weight_T=ones, impl=impl
        )
    with torch.no_grad():
        inputs[0][3] = torch.nan
    loss = flat(function(*inputs))[0]
    gradients = torch.autograd.grad(loss, inputs)
    assert loss.isnan()
    rows = gradients[0].isnan().reshape(T, -1)
    assert rows[3].all()
    assert not rows[[t for t in range(T) if t != 3]].any()
    assert all(g.isnan().any() for g in gradients[1:])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_tokens(impl: Any) -> None:
    none, empty = torch.zeros(0, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    hidden, weight = torch.zeros(0, D, device=DEVICE, requires_grad=True), leaf(6, V, D)
    cu = torch.tensor([0, 0, 0], device=DEVICE)
    loss, logprob, metrics = ck.linear_policy_loss(
        hidden, weight, empty, advantage_T=none, old_logprob_T=none, weight_T=none, impl=impl
    )
    outputs = [
        loss,
        *metrics.values(),
        ck.linear_logprob(hidden, weight, empty, impl=impl)[0].sum(),
        ck.token_logprob(torch.zeros(0, V, device=DEVICE, requires_grad=True), empty, impl=impl)[0].sum(),
        ck.value_pool(hidden, none, cu, impl=impl)[0].sum(),
        ck.masked_infonce(hidden, hidden, impl=impl)[0],
        ck.masked_infonce(hidden.bfloat16(), hidden.bfloat16(), impl=impl)[0],
        ck.policy_loss(none.clone().requires_grad_(), none, none, weight_T=none, impl=impl)[0],
        ck.value_loss(none.clone().requires_grad_(), none, none, weight_T=none, impl=impl)[0],
        ck.gae(none, none, cu, gamma=1.0, lam=1.0, impl=impl)[0].sum(),
        ck.kl_shaped_reward(torch.ones(2, device=DEVICE), none, none, cu, kl_coef=1.0, impl=impl).sum(),
        ck.whiten(none, impl=impl).sum(),
        ck.lcs_mask(empty, cu, empty, cu, impl=impl)[0].sum(),
    ]
    assert [float(x) for x in outputs] == [0.0] * len(outputs)
    assert not any(g.any() for g in torch.autograd.grad(sum(x for x in outputs if x.requires_grad), (hidden, weight)))
    assert logprob.shape == (0,)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["linear_logprob", "linear_policy_loss"])
def test_nothing_of_the_size_of_all_logits(
    name: str, impl: Any, largest_tensor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor of T x V elements but the declared scratch of one chunk, in bfloat16 too (no widened weight)."""
    tokens, vocabulary, width, chunk = 80, 1001, 16, 16
    hidden = randn(0, tokens, width).bfloat16().to(DEVICE).requires_grad_()
    weight = randn(1, vocabulary, width).bfloat16().to(DEVICE).requires_grad_()
    target, ones = randint(2, vocabulary, tokens), torch.ones(tokens, device=DEVICE)
    monkeypatch.setattr(_head, "chunk_size", lambda *_: chunk)
    if name == "linear_logprob" and impl == "triton":
        with largest_tensor, torch.no_grad():
            ck.linear_logprob(hidden, weight, target, impl=impl)
        assert largest_tensor.numel <= 3 * weight.numel()  # logits would be 5; the interpreter copies bytes
        return
    with largest_tensor:
        if name == "linear_logprob":
            ck.linear_logprob(hidden, weight, target, impl=impl)[0].sum().backward()
        else:
            policy = {"advantage_T": ones, "old_logprob_T": -10 * ones, "weight_T": ones}
            ck.linear_policy_loss(hidden, weight, target, **policy, impl=impl)[0].backward()
    bytes_each = 4 if impl == "triton" else 1  # the interpreter copies a scratch by its bytes
    assert largest_tensor.numel <= bytes_each * chunk * (vocabulary + 16) < tokens * vocabulary


def test_lcs_mask_of_what_is_too_long_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default torch takes it; asked for, Triton refuses it."""
    monkeypatch.setattr(lcs, "use_triton", lambda *_: True)  # "auto" on CUDA
    monkeypatch.setattr(lcs, "_LONGEST_B", 20)
    arguments = (randint(0, 5, 30), offsets([12, 18]), randint(1, 5, 30), offsets([9, 21]))
    for ours, expected in zip(ck.lcs_mask(*arguments), lcs_mask_reference(*arguments), strict=True):
        assert torch.equal(ours, expected)
    with pytest.raises(ValueError, match=r"b holds a sequence of 21 tokens: impl='triton' takes up to 20; use 'torch'"):
        ck.lcs_mask(*arguments, impl="triton")


@pytest.mark.parametrize("name", [n for n in NAMES if calls("torch")[n][1]])
def test_no_zeros_are_made_for_outputs_without_gradient(name: str) -> None:
    """The linear operators would write the head's size in zeros, once a step."""
    function, inputs = calls("torch")[name]
    outputs = [x for x in flat(function(*inputs)) if x.requires_grad]
    with Recorded(inside=False) as backward:
        torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs])
    made = [tuple(r.shape) for call, _, r in backward.calls if "zero" in call or call in ("full", "new_full", "fill_")]
    assert made == []


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["token_logprob", "linear_logprob", "masked_infonce"])
def test_one_output_alone_has_its_own_gradient(name: str, impl: str) -> None:
    """As if the other's were zero."""
    function, inputs = calls(impl)[name]
    for which in (0, 1):
        one = torch.autograd.grad(flat(function(*inputs))[which].sum(), inputs)
        outputs = flat(function(*inputs))
        both = torch.autograd.grad(outputs, inputs, [torch.full_like(x, float(x is outputs[which])) for x in outputs])
        for x, y in zip(one, both, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("unchecked")
def test_operators_that_read_back_say_so(name: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cudagraph_unsafe` is on what reads a device's numbers in one of its implementations, and on nothing else."""
    unsafe = {"linear_policy_loss", "lcs_mask", "gae"}
    lists: list[Tensor] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda x: (lists.append(x), tolist(x))[1])
    # a CPU takes another way than a GPU's
    monkeypatch.setattr(_row_kernels, "zero_rows_", _zero_rows_of_a_gpu)
    for module in (_policy_kernels, sys.modules["carft_kernels.policy_loss"]):
        monkeypatch.setattr(module, "all_count", lambda *_: False)
    function, inputs = calls(impl)[name]
    with Recorded(inside=True) as inside:
        outputs = function(*inputs)
        if inputs:
            scalar(outputs).backward()
    operator = name.split(",")[0] + ("_of_all" if "all tokens" in name else "")
    if name == "linear_policy_loss, ratios of sequences":  # linear_logprob, then policy_loss
        operator = "linear_logprob"
    tagged = torch.Tag.cudagraph_unsafe in getattr(torch.ops.carft, operator).default.tags
    assert tagged == (operator in unsafe)
    assert tagged or not (inside.readbacks() or lists)
    if operator == "linear_policy_loss":
        assert inside.readbacks() == {"nonzero"}  # that the mode sees what it looks for


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_policy_loss_of_all_tokens_is_that_of_those_with_a_gradient(
    impl: Any, dtype: torch.dtype, entropy_coef: float
) -> None:
    """Also where tokens without gradient hold NaN, and where the gradient overwrites its logits."""
    found = []
    target, share, hidden = randint(0, V, T), vector(3).abs(), randn(5, T, D)
    target[2], share[4], share[7], hidden[4] = -100, 0, 0, torch.nan
    hidden[2] = torch.nan
    for skip_dead in (True, False):
        h = hidden.to(dtype).to(DEVICE).requires_grad_()
        weight = randn(6, V, D).to(dtype).to(DEVICE).requires_grad_()
        loss, logprob, metrics = ck.linear_policy_loss(
            h,
            weight,
            target,
            advantage_T=vector(1),
            old_logprob_T=vector(2) - 5,
            weight_T=share,
            entropy_coef=entropy_coef,
            chunk_tokens=5,
            skip_dead=skip_dead,
            impl=impl,
        )
        gradients = torch.autograd.grad(loss, (h, weight))
        assert all(g.isfinite().all() for g in gradients)
        assert not gradients[0][[2, 4, 7]].any()
        found.append([loss, logprob, *metrics.values(), *gradients])
    for x, y in zip(*found, strict=True):
        tolerance = {"rtol": 1e-6, "atol": 1e-6} if x.dtype == torch.float32 else {"rtol": 2**-8, "atol": 2**-10}
        torch.testing.assert_close(x, y, equal_nan=True, **tolerance)


def _zero_rows_of_a_gpu(x: Tensor, rows: Tensor) -> None:
    x.masked_fill_(rows[:, None], 0.0)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_a_sharded_argument_is_refused_by_name(mesh: Any) -> None:
    """torch's own error, "mixed torch.Tensor and DTensor", says neither which one nor what to do."""
    hidden, weight, bias = randn(1, T, D).float(), randn(2, V, D).float(), randn(4, V).float()
    target, all_V, all_T = randint(3, V, T).cpu(), torch.tensor([0, V]), torch.tensor([0, T])
    policy = {"advantage_T": hidden[:, 0], "old_logprob_T": None, "weight_T": hidden[:, 0].abs()}

    def sharded(x: Tensor) -> Tensor:
        return distribute_tensor(x, mesh, [Shard(0)])

    refused = {
        "weight_VD": [
            lambda: ck.linear_logprob(hidden, sharded(weight), target),
            lambda: ck.linear_policy_loss(hidden, sharded(weight), target, **policy),
        ],
        "hidden_TD": [
            lambda: ck.linear_logprob(sharded(hidden), sharded(weight), target),
            lambda: ck.value_pool(sharded(hidden), hidden[:, 0], all_T),
        ],
        "bias": [
            lambda: ck.linear_logprob(hidden, weight, target, bias=sharded(bias)),
            lambda: ck.cpu_linear(hidden, weight, sharded(bias)),
        ],
        "weight": [lambda: ck.cpu_linear(hidden, sharded(weight))],
        "target_T": [lambda: ck.token_logprob(hidden, sharded(target))],
        "logits_TV": [lambda: ck.token_logprob(sharded(hidden), target)],
        "candidate_MD": [lambda: ck.masked_infonce(hidden, sharded(weight))],
        "weight_T": [lambda: ck.policy_loss(*[hidden[:, 0]] * 3, weight_T=sharded(hidden[:, 0]))],
        "cu_seqlens": [lambda: ck.gae(bias, bias, sharded(all_V), gamma=1.0, lam=1.0)],
        "b": [lambda: ck.lcs_mask(target, all_T, sharded(target), all_T)],
    }
    for name, functions in refused.items():
        for function in functions:
            with pytest.raises(ValueError, match=rf"^{name} is a DTensor: .*pass {name}\.full_tensor\(\)"):
                function()
    whole = ck.linear_logprob(hidden, sharded(weight).full_tensor(), target)[0]
    assert torch.equal(whole, ck.linear_logprob(hidden, weight, target)[0])
    together = ck.cpu_linear(sharded(hidden), sharded(weight).redistribute(placements=[Replicate()]))
    torch.testing.assert_close(together.full_tensor(), hidden @ weight.T)


def test_triton_is_for_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls an AMD device "cuda" too, and the capability of an MI300, (9, 4), looks like Hopper's."""
    with FakeTensorMode():
        x, indices = torch.empty(5, 8, device="cuda"), torch.empty(5, dtype=torch.int64, device="cuda")
        assert use_triton("token_logprob", "auto", x)
        assert use_triton("token_logprob", "triton", x)
        monkeypatch.setattr(torch.version, "hip", "6.4.43482")
        for y in (x, x.bfloat16(), indices):
            assert not use_triton("token_logprob", "auto", y)
            assert not use_triton("token_logprob", "torch", y)
        message = r"^impl = 'triton': \w+ got a tensor on an AMD device, .*; 'auto' or 'torch' work here$"
        for call in (
            lambda: ck.token_logprob(x, indices, impl="triton"),
            lambda: ck.whiten(torch.empty(5, device="cuda"), impl="triton"),
            lambda: ck.lcs_mask(indices, indices, indices, indices, impl="triton"),
        ):
            with pytest.raises(ValueError, match=message):
                call()
    monkeypatch.setattr(_runtime, "INTERPRETED", True)
    assert use_triton("token_logprob", "triton", torch.empty(1))  # interpreted, whatever the GPU
