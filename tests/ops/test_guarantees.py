"""What the operators promise beyond their values: memory, skipped work, half precision, hard inputs, error texts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import carft_kernels as ck
from carft_kernels import _runtime
from carft_kernels._runtime import _index_checks_from, chunk_size, token_chunks
from carft_kernels.linear_logprob import linear_logprob_reference
from carft_kernels.linear_policy_loss import linear_policy_loss_reference
from carft_kernels.masked_infonce import masked_infonce_reference
from carft_kernels.token_logprob import token_logprob_reference
from carft_kernels.value_pool import value_pool_reference

from .checks import DEVICE

TOKENS, WIDTH, VOCABULARY = 61, 23, 157


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def targets(tokens: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(tokens))


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves)


def at_ratio_one(hidden: Tensor, weight: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Keyword arguments under which every token has a gradient and none is clipped."""
    tokens = len(target)
    return {
        "advantage_T": torch.ones(tokens, dtype=torch.float64),
        "old_logprob_T": linear_logprob_reference(hidden.double(), weight.double(), target)[0].detach(),
        "weight_T": torch.full((tokens,), 1 / tokens, dtype=torch.float64),
    }


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["linear_logprob", "linear_policy_loss"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(operator: str, largest_tensor: Any) -> None:
    tokens, vocabulary = 400, 70_001
    hidden = randn(0, tokens, 4, dtype=torch.float32).requires_grad_()
    weight = randn(1, vocabulary, 4, dtype=torch.float32).requires_grad_()
    target = targets(tokens, vocabulary)
    flat = torch.zeros(tokens)
    with largest_tensor:
        if operator == "linear_logprob":
            logprob, entropy = ck.linear_logprob(hidden, weight, target, with_entropy=True)
            assert entropy is not None
            (logprob + entropy).sum().backward()
        else:
            ck.linear_policy_loss(
                hidden, weight, target, advantage_T=flat + 1, old_logprob_T=flat, weight_T=flat + 1, entropy_coef=0.1
            )[0].backward()
    assert largest_tensor.numel == 100 * vocabulary, "119 would fit: four equal chunks"
    assert chunk_size(tokens, vocabulary, hidden.device) * vocabulary * 4 <= 32 << 20


@settings(deadline=None, derandomize=True)
@given(tokens=st.integers(0, 20_000), most=st.integers(1, 9_000))
def test_chunks_are_equal_and_as_few_as_it_takes(tokens: int, most: int) -> None:
    chunks = token_chunks(tokens, most)
    sizes, block = [c.stop - c.start for c in chunks], 128 if most >= 1024 else 1
    assert [t for c in chunks for t in (c.start, c.stop)] == sorted(
        [0, tokens] * bool(tokens) + [c.start for c in chunks[1:]] * 2
    )
    assert all(0 < size <= most for size in sizes)
    assert all(c.start % block == 0 for c in chunks)
    assert max(sizes, default=0) - min(sizes, default=0) < 2 * block
    assert len(chunks) == (min(tokens, 1) if tokens <= most else -(-tokens // (most // block * block)))


@pytest.mark.parametrize("vocabulary", [32_000, 128_256, 152_064, 202_048, 262_144])
def test_chunks_of_a_gpu_are_large_enough_for_the_gradient_of_the_weight(vocabulary: int) -> None:
    """By an H100's figures: 8 bytes of d_weight for every chunk but the first, and 6 FLOP a token of three products, of
    the same elements. The smaller the chunks of a call, the fewer of them add to d_weight: what counts is the
    whole. One chunk adds nothing, however few its tokens."""
    n = chunk_size(100_000, vocabulary, torch.device("cuda"))
    assert n % 128 == 0
    for tokens in [*range(1, 20_001, 61), n, n + 1, 2 * n + 1, 3 * n + 1]:
        chunks = token_chunks(tokens, chunk_size(tokens, vocabulary, torch.device("cuda")))
        assert len(chunks) == -(-tokens // n), tokens
        assert (len(chunks) - 1) * 8 / 3.35e12 < 0.15 * 6 * tokens / 989e12, tokens
    assert n * vocabulary * 4 <= 3 << 30
    assert chunk_size(1000, vocabulary, torch.device("cuda")) == 1000
    assert n == {32_000: 8320, 128_256: 4096, 152_064: 4096, 202_048: 3968, 262_144: 3072}[vocabulary]
    assert token_chunks(1500, chunk_size(1500, vocabulary, torch.device("cuda"))) == [slice(0, 1500)]


def test_chunk_tokens_bounds_the_scratch(largest_tensor: Any) -> None:
    hidden, weight, target = randn(0, 200, 4), randn(1, 1001, 4), targets(200, 1001)
    rest = at_ratio_one(hidden, weight, target)
    with largest_tensor:
        ck.linear_policy_loss(hidden.requires_grad_(), weight.requires_grad_(), target, **rest, chunk_tokens=7)
    assert largest_tensor.numel == 7 * 1001  # 29 chunks of 6 or 7


# --- skipped work -----------------------------------------------------------------------------------------------------

CHUNK = 8


def _dead(kind: str, rest: dict[str, Tensor], rows: Tensor) -> None:
    if kind == "zero weight":
        rest["weight_T"][rows] = 0
    elif kind == "zero advantage":
        rest["advantage_T"][rows] = 0
    else:  # ratio e > 1.2 with a positive advantage: past the clip, no gradient
        rest["old_logprob_T"][rows] -= 1


@pytest.mark.parametrize("extra", ["none", "kl", "entropy"])
@pytest.mark.parametrize("kind", ["zero weight", "zero advantage", "clipped"])
@pytest.mark.parametrize("whole_chunks", [True, False])
def test_only_tokens_with_a_gradient_enter_the_backward_matmuls(
    kind: str, extra: str, whole_chunks: bool, largest_tensor: Any
) -> None:
    hidden, weight, target = randn(0, 32, WIDTH), randn(1, VOCABULARY, WIDTH, scale=0.3), targets(32, VOCABULARY)
    rest = at_ratio_one(hidden, weight, target)
    rows = torch.arange(32) < 16 if whole_chunks else torch.arange(32) % 2 == 0
    _dead(kind, rest, rows)
    options: dict[str, Any] = {"chunk_tokens": CHUNK}
    if extra == "kl":
        options |= {"ref_logprob_T": rest["old_logprob_T"] - 0.3, "kl_coef": 0.1}
    elif extra == "entropy":
        options |= {"entropy_coef": 0.1}
    # a KL or entropy term reaches every token with weight, whatever its advantage
    live = 16 if extra == "none" or kind == "zero weight" else 32
    one_token = 2 * VOCABULARY * WIDTH
    hidden.requires_grad_()
    weight.requires_grad_()
    with largest_tensor:
        loss = ck.linear_policy_loss(hidden, weight, target, **rest, **options)[0]
    assert largest_tensor.matmul_flops == one_token * (32 + 2 * live)
    del options["chunk_tokens"]
    expected = linear_policy_loss_reference(hidden, weight, target, **rest, **options)[0]
    for ours, theirs in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("hidden_grad", "weight_grad", "matmuls"), [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)]
)
def test_gradients_nobody_needs_are_not_computed(
    hidden_grad: bool, weight_grad: bool, matmuls: int, largest_tensor: Any
) -> None:
    hidden, weight, target = randn(0, 20, WIDTH), randn(1, VOCABULARY, WIDTH, scale=0.3), targets(20, VOCABULARY)
    rest = at_ratio_one(hidden, weight, target)
    hidden.requires_grad_(hidden_grad)
    weight.requires_grad_(weight_grad)
    with largest_tensor:
        ck.linear_policy_loss(hidden, weight, target, **rest)
    assert largest_tensor.matmul_flops == matmuls * 2 * 20 * VOCABULARY * WIDTH


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dead", [0, 16, 32])
def test_gradients_do_not_hold_what_was_in_their_memory(impl: Any, dtype: torch.dtype, dead: int) -> None:
    """d_weight is not set to zero: the first product overwrites it, whichever chunk that is. There may be none."""
    hidden, weight, target = randn(0, 32, WIDTH), randn(1, VOCABULARY, WIDTH, scale=0.3), targets(32, VOCABULARY)
    rest = at_ratio_one(hidden, weight, target)
    rest["weight_T"][:dead] = 0
    expected = gradients(lambda h, w: linear_policy_loss_reference(h, w, target, **rest)[0], hidden, weight)
    inputs = [x.to(dtype).to(DEVICE) for x in (hidden, weight)]
    rest = {name: x.to(DEVICE) for name, x in rest.items()}

    def loss(h: Tensor, w: Tensor) -> Tensor:
        options: Any = {"old_logprob_T": None, "chunk_tokens": CHUNK, "impl": impl}
        return ck.linear_policy_loss(h, w, target.to(DEVICE), **rest | options)[0]

    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory holds NaN
    try:
        assert torch.empty(1).isnan()
        found = gradients(loss, *inputs)
        none = gradients(
            lambda h, w: ck.linear_logprob(h, w, target[:0].to(DEVICE), impl=impl)[0].sum(), inputs[0][:0], inputs[1]
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(
            ours.double().cpu(),
            exact,
            rtol=0,
            atol=(1e-5 if dtype == torch.float32 else 0.02) * float(exact.abs().max()),
        )
    assert not none[1].any()


# --- half precision ---------------------------------------------------------------------------------------------------


def _half_precision_calls() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Operator, plain torch, inputs: the same scalar made of everything the operator returns."""
    target, up = targets(TOKENS, VOCABULARY), randn(9, 2, TOKENS).float()
    cu = torch.tensor([0, 11, 11, 40, TOKENS])
    up_pool = randn(10, 4, WIDTH).float()
    hidden, weight = randn(0, TOKENS, WIDTH), randn(1, VOCABULARY, WIDTH, scale=0.4)

    def pair(result: tuple[Tensor, Tensor | None]) -> Tensor:
        assert result[1] is not None
        return (result[0] * up[0].to(result[0].dtype) + result[1] * up[1].to(result[0].dtype)).sum()

    def pool(result: tuple[Tensor, Tensor]) -> Tensor:
        return (result[0] * up_pool.to(result[0].dtype)).sum()

    return {
        "token_logprob": (
            lambda x: pair(ck.token_logprob(x, target, with_entropy=True)),
            lambda x: pair(token_logprob_reference(x, target, with_entropy=True)),
            (randn(2, TOKENS, VOCABULARY, scale=3.0),),
        ),
        "linear_logprob": (
            lambda h, w: pair(ck.linear_logprob(h, w, target, with_entropy=True)),
            lambda h, w: pair(linear_logprob_reference(h, w, target, with_entropy=True)),
            (hidden, weight),
        ),
        "value_pool": (
            lambda h, v: pool(ck.value_pool(h, v, cu)),
            lambda h, v: pool(value_pool_reference(h, v, cu)),
            (hidden, randn(3, TOKENS)),
        ),
        "masked_infonce": (
            lambda a, c: ck.masked_infonce(a, c)[0],
            lambda a, c: masked_infonce_reference(a, c)[0],
            (hidden, weight),
        ),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["token_logprob", "linear_logprob", "value_pool", "masked_infonce"])
def test_half_precision_gradients(name: str, dtype: torch.dtype) -> None:
    """Error at most twice that of the plain expression in the same dtype, against float64 on the rounded inputs."""
    operator, plain, inputs = _half_precision_calls()[name]
    low = tuple(x.to(dtype) for x in inputs)
    exact = gradients(plain, *(x.double() for x in low))
    for ours, theirs, truth in zip(gradients(operator, *low), gradients(plain, *low), exact, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - truth).norm() <= 2 * (theirs.double() - truth).norm()


def test_the_upstream_factor_is_not_rounded_to_half_precision() -> None:
    """1.5038 lies almost halfway between two bfloat16 numbers: rounded, it would shift every element the same way."""
    hidden = randn(0, TOKENS, WIDTH, dtype=torch.bfloat16)
    weight = randn(1, VOCABULARY, WIDTH, dtype=torch.bfloat16, scale=0.3)
    target = targets(TOKENS, VOCABULARY)
    rest = at_ratio_one(hidden, weight, target)
    factor = 1.5038
    unscaled, scaled = (
        gradients(lambda h, f=f: f * ck.linear_policy_loss(h, weight, target, **rest)[0], hidden)[0].double()
        for f in (1.0, factor)
    )
    slope = float((scaled * unscaled).sum() / (unscaled * unscaled).sum())
    assert slope == pytest.approx(factor, abs=5e-4)


# --- hard inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["at -300", "times 200", "-inf columns"])
def test_linear_logprob_hard_logits(kind: str) -> None:
    hidden, weight, target = randn(0, 9, 5), randn(1, 31, 5), targets(9, 31)
    bias = torch.zeros(31, dtype=torch.float64)
    if kind == "at -300":
        bias -= 300
    elif kind == "times 200":
        weight *= 200
    else:
        bias[[v for v in range(31) if v not in target.tolist()][::2]] = float("-inf")
    low = [x.float() for x in (hidden, weight, bias)]
    for inputs in ([x.double() for x in low], low):
        h, w, b = inputs
        logprob, entropy = ck.linear_logprob(h, w, target, bias=b, with_entropy=True)
        expected, expected_entropy = linear_logprob_reference(
            h.double(), w.double(), target, bias=b.double(), with_entropy=True
        )
        assert entropy is not None
        assert expected_entropy is not None
        tight = {"rtol": 1e-10, "atol": 1e-10}
        tolerance = tight if h.dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-4}
        assert (logprob <= 0).all()
        torch.testing.assert_close(logprob.double(), expected, **tolerance)
        torch.testing.assert_close(entropy.double(), expected_entropy, **tolerance)
        pair = gradients(
            lambda h, w, b: torch.stack(
                [x.sum() for x in ck.linear_logprob(h, w, target, bias=b, with_entropy=True) if x is not None]
            ).sum(),
            h,
            w,
            b,
        )
        assert all(gradient.isfinite().all() for gradient in pair)
        assert float(pair[2].sum()) == pytest.approx(0, abs=1e-4)  # rows of d_logits sum to 0


@pytest.mark.parametrize("scale", [1.0, 200.0])
@pytest.mark.parametrize("shift", [0.0, -300.0])
def test_linear_policy_loss_hard_logits(scale: float, shift: float) -> None:
    """A constant hidden column shifts every logit alike; scaled weights make the softmax one-hot."""
    hidden, weight, target = randn(0, 12, 6), randn(1, 33, 6, scale=scale), targets(12, 33)
    hidden[:, 0], weight[:, 0] = 1.0, shift
    old = linear_logprob_reference(hidden, weight, target)[0]
    rest = at_ratio_one(hidden, weight, target) | {"old_logprob_T": old + randn(2, 12, scale=0.1)}
    extra: dict[str, Any] = {"entropy_coef": 0.1, "kl_coef": 0.1, "ref_logprob_T": old + randn(3, 12, scale=0.1)}
    fused = gradients(lambda h, w: ck.linear_policy_loss(h, w, target, **rest, **extra)[0], hidden, weight)

    def expected(h: Tensor, w: Tensor) -> Tensor:
        # written out: the reference takes entr(p), whose derivative at p = 0 is infinite, times 0
        logp_TV = (h @ w.T).log_softmax(-1)
        logprob = logp_TV.gather(1, target[:, None])[:, 0]
        ratio, difference = (logprob - rest["old_logprob_T"]).exp(), extra["ref_logprob_T"] - logprob
        advantage = rest["advantage_T"]
        loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
        loss = loss + 0.1 * (difference.exp() - difference - 1) + 0.1 * (logp_TV.exp() * logp_TV).sum(-1)
        return (rest["weight_T"] * loss).sum()

    plain = gradients(expected, hidden, weight)
    for ours, theirs in zip(fused, plain, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_no_tokens() -> None:
    hidden, weight, none = (
        torch.zeros(0, 4, requires_grad=True),
        randn(1, 5, 4).float().requires_grad_(),
        torch.zeros(0),
    )
    target = torch.zeros(0, dtype=torch.int64)
    loss, logprob, metrics = ck.linear_policy_loss(
        hidden, weight, target, advantage_T=none, old_logprob_T=none, weight_T=none
    )
    (d_weight,) = torch.autograd.grad(loss, weight)
    assert not loss.detach().any()
    assert not d_weight.any()
    assert logprob.numel() == 0
    assert {name: float(value) for name, value in metrics.items()} == dict.fromkeys(metrics, 0.0)
    cu = torch.tensor([0, 0, 0])
    pooled, _ = ck.value_pool(hidden, none, cu)
    assert torch.equal(pooled, torch.zeros(2, 4))
    assert ck.kl_shaped_reward(torch.ones(2), none, none, cu, kl_coef=0.1).numel() == 0
    for x in ck.gae(none, none, cu, gamma=1.0, lam=1.0):
        assert x.numel() == 0


def test_infonce_row_losses_follow_the_candidate_mask_on_rows_that_do_not_count() -> None:
    z, y = randn(0, 3, 8), randn(1, 3, 8)
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])
    counted = torch.tensor([True, False, False])
    loss, rows = ck.masked_infonce(z, y, row_mask_N=counted, candidate_mask=mask)
    cosine = torch.cosine_similarity(z[:, None], y[None], dim=-1)
    for row in (0, 2):
        denominator = (cosine[row][mask[row]] / 0.2).logsumexp(0)
        torch.testing.assert_close(rows[row], denominator - cosine[row, row].clamp(max=0.9) / 0.2)
    assert rows[1] == 0
    torch.testing.assert_close(loss, rows[0])
    d_anchor, d_candidate = gradients(
        lambda a, c: ck.masked_infonce(a, c, row_mask_N=counted, candidate_mask=mask)[0], z, y
    )
    assert d_anchor[0].any()
    assert not d_anchor[1:].any()
    assert not d_candidate[1].any()  # allowed only for rows that do not count
    assert d_candidate.isfinite().all()


def test_infonce_with_a_zero_vector_is_finite() -> None:
    z = randn(0, 3, 8)
    z[1] = 0
    loss, _ = ck.masked_infonce(z, z)
    torch.testing.assert_close(loss, masked_infonce_reference(z, z)[0])
    assert all(g.isfinite().all() for g in gradients(lambda a, c: ck.masked_infonce(a, c)[0], z, z))


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 6),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_whitened_values_are_invariant_to_shift_and_scale(rows: int, columns: int, scale: float, seed: int) -> None:
    x = randn(seed, rows * columns)
    whitened = ck.whiten(x * scale + 5 * scale)
    spread = (x.var(correction=1) * scale**2 + 1e-8).sqrt() if x.numel() > 1 else torch.ones(())
    torch.testing.assert_close(whitened * spread, (x - x.mean()) * scale, rtol=1e-9, atol=1e-9)


# --- errors -----------------------------------------------------------------------------------------------------------


def _call_with(impl: str) -> dict[str, Callable[[], Any]]:
    x, w, t, i = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3), torch.tensor([0, 1, 2])
    cu = torch.tensor([0, 3])
    name: Any = impl
    return {
        "token_logprob": lambda: ck.token_logprob(x, i, impl=name),
        "linear_logprob": lambda: ck.linear_logprob(x, w, i, impl=name),
        "linear_policy_loss": lambda: ck.linear_policy_loss(
            x, w, i, advantage_T=t, old_logprob_T=t, weight_T=t, impl=name
        ),
        "value_pool": lambda: ck.value_pool(x, t, cu, impl=name),
        "masked_infonce": lambda: ck.masked_infonce(x, w, impl=name),
        "gae": lambda: ck.gae(t, t, cu, gamma=1.0, lam=1.0, impl=name),
        "kl_shaped_reward": lambda: ck.kl_shaped_reward(t[:1], t, t, cu, kl_coef=0.1, impl=name),
        "whiten": lambda: ck.whiten(t, impl=name),
        "policy_loss": lambda: ck.policy_loss(t, t, t, weight_T=t, impl=name),
        "value_loss": lambda: ck.value_loss(t, t, t, weight_T=t, impl=name),
        "lcs_mask": lambda: ck.lcs_mask(i, cu, i, cu, impl=name),
    }


@pytest.mark.parametrize("operator", _call_with("torch"))
def test_every_operator_says_which_implementations_it_has(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _call_with("torch")[operator]()
    with pytest.raises(ValueError, match=rf"impl = 'cuda': allowed for {operator} are 'auto', 'torch', 'triton'"):
        _call_with("cuda")[operator]()
    monkeypatch.setattr(_runtime, "INTERPRETED", False)
    with pytest.raises(ValueError, match=rf"impl = 'triton': {operator} got a tensor on cpu; Triton needs a CUDA"):
        _call_with("triton")[operator]()


def test_triton_refuses_float64() -> None:
    logits, target = torch.zeros(3, 4, dtype=torch.float64, device=DEVICE), torch.tensor([0, 1, 2], device=DEVICE)
    with pytest.raises(ValueError, match=r"token_logprob got torch.float64; allowed are float32, bfloat16, float16"):
        ck.token_logprob(logits, target, impl="triton")


def test_more_bad_calls_name_the_argument() -> None:
    x, w, t, i = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3), torch.tensor([0, 1, 2])
    rest: dict[str, Any] = {"advantage_T": t, "old_logprob_T": t, "weight_T": t}
    with pytest.raises(ValueError, match=r"bias has dtype torch.float64: expected torch.float32"):
        ck.linear_logprob(x, w, i, bias=torch.zeros(5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"logits_TV has dtype torch.float8_e4m3fn"):
        ck.token_logprob(x.to(torch.float8_e4m3fn), i)
    with pytest.raises(ValueError, match=r"kl_coef = -0.1: expected a finite number of at least 0"):
        ck.linear_policy_loss(x, w, i, **rest, ref_logprob_T=t, kl_coef=-0.1)
    for name in ("advantage_T", "weight_T"):
        with pytest.raises(ValueError, match=rf"{name} is None: expected a tensor of shape \(3,\)"):
            ck.linear_policy_loss(x, w, i, **rest | {name: None})
    with pytest.raises(ValueError, match=r"ref_logprob_T has dtype torch.int64"):
        ck.linear_policy_loss(x, w, i, **rest, ref_logprob_T=i, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"cu_seqlens\[2\] = 1 comes after 2: offsets must not fall"):
        ck.value_pool(x, t, torch.tensor([0, 2, 1, 3]))


def test_the_environment_variable_of_index_checks() -> None:
    assert [_index_checks_from(setting) for setting in (None, "0", "1")] == [None, False, True]
    with pytest.raises(ValueError, match=r"CARFT_KERNELS_CHECK_INDICES = 'yes': allowed are '0', '1' or unset"):
        _index_checks_from("yes")
