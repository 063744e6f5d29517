"""The rule that picks tokens: its noise bit by bit, its distribution, and that a token depends on nothing else."""

import ast
import dataclasses
import itertools
import math
import operator
import os
import re
import runpy
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from carft_fast.core.errors import EngineError
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.load import load_model
from carft_fast.rollout import coupled, pick_kernel
from carft_fast.rollout.base import SamplingParams
from carft_fast.rollout.hf import HFEngine
from carft_fast.rollout.vllm.engine import VLLMEngine

from .checks import CPU, EOS, PROMPTS, attention, make_config, perturb

KEYS = [(5, 7), (2**62 + 3, 0), (0, 300), (5, 8)]
SEEDS, POSITIONS = map(list, zip(*KEYS, strict=True))
SAMPLES = 20_000
UNSURE = PROMPTS[3]
"""At temperature 0.4, too, its likeliest three tokens are but 3% of its completions."""
LIMIT = 1e-4
"""Probability under which a chi-square is a failure."""


def test_the_noise_is_that_of_the_published_generator() -> None:
    """Philox 4x64-10 by hand, in whole numbers of Python: Salmon et al. 2011, counters from 1, key (seed, position)."""

    def block(counter: int, key: tuple[int, int]) -> list[int]:
        words, (k0, k1) = [counter, 0, 0, 0], key
        for _ in range(10):
            p0, p1 = words[0] * 0xD2E7470EE14C6C93, words[2] * 0xCA5A826395121157
            words = [p1 >> 64 ^ words[1] ^ k0, p1 % 2**64, p0 >> 64 ^ words[3] ^ k1, p0 % 2**64]
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) % 2**64, (k1 + 0xBB67AE8584CAA73B) % 2**64
        return [half for word in words for half in (word % 2**32, word >> 32)]

    size = 21
    noise = coupled.gumbel_noise(SEEDS, POSITIONS, size)
    for row, key in zip(noise.tolist(), KEYS, strict=True):
        bits = [half for counter in (1, 2, 3) for half in block(counter, key)][:size]
        expected = [-math.log(-math.log1p(-(b + 0.5) / 2**32)) for b in bits]
        assert row == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_kernel_draws_the_same_noise_and_picks_the_same_tokens() -> None:
    """Interpreted. Rows that allow one token each show its noise, one by one."""
    for size, tokens in ((1, [0]), (1030, [*range(9), 1016, 1023, 1024, 1029])):
        one_each = torch.full((len(tokens), size), -torch.inf)
        one_each[range(len(tokens)), tokens] = 0.0
        for seed, position in KEYS[:2]:
            best_NP, token_NP = pick_kernel.best_of_parts(one_each, [seed] * len(tokens), [position] * len(tokens))
            part = best_NP.argmax(-1, keepdim=True)
            assert token_NP.gather(1, part)[:, 0].tolist() == tokens
            expected = coupled.gumbel_noise([seed], [position], size)[0, tokens]
            torch.testing.assert_close(best_NP.gather(1, part)[:, 0], expected, rtol=5e-7, atol=5e-7)
    logits = 2 * torch.randn(20, 2501, generator=torch.Generator().manual_seed(0))
    logits[:, 2000:] = -torch.inf
    seeds, positions = list(range(20)), list(range(7, 27))
    assert torch.equal(pick_kernel.pick_on_gpu(logits, seeds, positions), coupled.pick(logits, seeds, positions))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernel_compiles_without_spills(capability: int) -> None:
    """In a process of its own, where Triton compiles."""
    script = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from carft_fast.rollout.pick_kernel import _pick_kernel as kernel
types = dict(logits="*fp32", key="*i64", best="*fp32", token="*i32", vocabulary="i32", stride="i32", PARTS="i32")
source = ASTSource(fn=kernel, signature={{**types, "COUNTERS": "constexpr"}}, constexprs={{(7,): 128}})
compiled = triton.compile(source, target=GPUTarget("cuda", {capability}, 32))
code = compiled.asm["ptx"]
print("local" if ".local " in code else "registers only", "mul.hi.u64" in code)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.stdout.split("\n")[-2] == "registers only True", found.stderr


def test_the_smallest_and_the_largest_bits_make_finite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = np.array([[0, 1, 2**24, 2**31, 2**32 - 2, 2**32 - 1]], dtype="<u4")
    monkeypatch.setattr(coupled, "_philox", lambda *_: bits)
    noise = coupled.gumbel_noise([0], [0], 6)[0].tolist()
    assert noise == sorted(noise, reverse=True)
    assert noise[0] == pytest.approx(33 * math.log(2), rel=1e-6)
    assert math.isfinite(noise[-1])


def exact_cut(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities in float64, token by token."""
    probability = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(probability)), key=lambda token: -probability[token])[: top_k or None]
    whole, before = sum(probability[token] for token in order), 0.0
    result = torch.zeros(len(probability), dtype=torch.float64)
    for token in order:
        if before < top_p * whole:
            result[token] = probability[token]
        before += probability[token]
    return result / result.sum()


def test_top_p_and_top_k_row_by_row() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [(1.0, 40, 1.0), (0.4, 40, 0.9), (1.7, 7, 1.0), (1.0, 12, 0.5), (2.0, 1, 1.0), (0.7, 40, 1e-9)]
    logits = 3 * torch.randn(len(rows), 40, generator=generator)
    temperature, top_k, top_p = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = coupled.processed_logits(logits, temperature, top_k, top_p).softmax(-1)
    expected = torch.stack([exact_cut(row, *setting) for row, setting in zip(logits, rows, strict=True)])
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    for row in range(len(rows)):  # each row is cut by its own setting alone, with either cut left out
        one = slice(row, row + 1)
        alone = coupled.processed_logits(logits[one], temperature[one], top_k[one], top_p[one])
        torch.testing.assert_close(alone.softmax(-1)[0], found[row], rtol=1e-6, atol=1e-8)
    for k, p in ((top_k, None), (None, top_p)):
        found = coupled.processed_logits(logits, temperature, k, p).softmax(-1)
        for row, logit, (t, rank, mass) in zip(found, logits, rows, strict=True):
            exact = exact_cut(logit, t, 0 if k is None else rank, 1.0 if p is None else mass)
            torch.testing.assert_close(row.double(), exact, rtol=1e-5, atol=1e-7)


def chi_square_tail(found: Sequence[tuple[int, ...]], probability: dict[tuple[int, ...], float]) -> float:
    """Probability of a chi-square as large or larger; sequences expected less than 5 times are counted together.

    0 where something was sampled that has no probability, 1 where all are counted together. Wilson and Hilferty's
    approximation.
    """
    expected = {sequence: len(found) * p for sequence, p in probability.items()}
    counts = Counter(found)
    if any(expected.get(sequence) == 0 for sequence in counts):
        return 0.0
    pairs = [(counts[sequence], times) for sequence, times in expected.items() if times >= 5]
    rare = len(found) - sum(n for n, _ in pairs), len(found) - sum(e for _, e in pairs)
    if rare[1] >= 5:
        pairs.append(rare)
    freedom = len(pairs) - 1
    if not freedom:
        return 1.0
    chi_square = sum((n - e) ** 2 / e for n, e in pairs)
    z = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


Setting = tuple[float, int, float]
"""Temperature, top-k (0: off), top-p."""


def enumerated(
    logits_of: Callable[[list[tuple[int, ...]]], Tensor], setting: Setting, floor: float = 0.0
) -> dict[tuple[int, ...], float]:
    """Probability of every sequence of three tokens whose first and second token have more than `floor`."""
    probability: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        prefixes = [prefix for prefix, p in probability.items() if p > floor]
        probability = {
            (*prefix, token): probability[prefix] * q
            for prefix, logits in zip(prefixes, logits_of(prefixes), strict=True)
            for token, q in enumerate(exact_cut(logits, *setting).tolist())
        }
    return probability


@pytest.mark.parametrize("setting", [(1.0, 0, 1.0), (0.4, 0, 1.0), (1.0, 0, 0.8), (0.7, 5, 0.9)])
def test_three_tokens_follow_the_distribution_and_a_bias_of_two_percent_is_found(
    setting: Setting,
) -> None:
    generator = torch.Generator().manual_seed(1)
    size = 8
    table = {
        prefix: 1.5 * torch.randn(size, generator=generator)
        for length in range(3)
        for prefix in itertools.product(range(size), repeat=length)
    }
    temperature, top_k, top_p = setting
    probability = enumerated(lambda prefixes: torch.stack([table[prefix] for prefix in prefixes]), setting)

    def sample(pick: Any) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = [()] * SAMPLES
        for position in range(3):
            processed = coupled.processed_logits(
                torch.stack([table[prefix] for prefix in found]),
                torch.full((SAMPLES,), temperature),
                torch.full((SAMPLES,), top_k) if top_k else None,
                torch.full((SAMPLES,), top_p) if top_p < 1 else None,
            )
            tokens = pick(processed, range(SAMPLES), [position] * SAMPLES).tolist()
            found = [(*prefix, token) for prefix, token in zip(found, tokens, strict=True)]
        return found

    def biased(processed: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Takes the most likely token in 2% of all cases."""
        tokens = coupled.pick(processed, seeds, positions)
        tokens[7::50] = processed[7::50].argmax(-1)
        return tokens

    assert chi_square_tail(sample(coupled.pick), probability) > LIMIT
    assert chi_square_tail(sample(biased), probability) < LIMIT


def follow_tail(found: Sequence[tuple[int, ...]], probability: dict[tuple[int, ...], float]) -> float:
    """The smaller of two tails: of all sequences, and of which of their tokens are the likeliest at their place.

    The second has few bins, so it sees a sampler that takes likeliest tokens a little too often.
    """
    best = likeliest(probability)

    def which(sequence: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(int(best[sequence[:n]] == sequence[n]) for n in range(3))

    coarse = dict.fromkeys(itertools.product((0, 1), repeat=3), 0.0)
    for sequence, p in probability.items():
        coarse[which(sequence)] += p
    # what is not enumerated counts as one
    marked = [which(sequence) if sequence in probability else () for sequence in found]
    assert sum(len(found) * p >= 5 for p in coarse.values()) > 2, "bins"
    return min(chi_square_tail(found, probability), chi_square_tail(marked, coarse))


def likeliest(probability: dict[tuple[int, ...], float]) -> dict[tuple[int, ...], int]:
    """The likeliest token after every prefix of the sequences."""
    mass = defaultdict[tuple[int, ...], float](float)
    for sequence, p in probability.items():
        for length in range(1, 4):
            mass[sequence[:length]] += p
    best = dict[tuple[int, ...], int]()
    for beginning, p in mass.items():
        before = beginning[:-1]
        if before not in best or p > mass[(*before, best[before])]:
            best[before] = beginning[-1]
    return best


def with_bias(found: Sequence[tuple[int, ...]], probability: dict[tuple[int, ...], float]) -> list[tuple[int, ...]]:
    """2% of the sequences as a sampler leaves them that takes the likeliest token there."""
    best, greedy = likeliest(probability), tuple[int, ...]()
    for _ in range(3):
        greedy = (*greedy, best[greedy])
    return [greedy if index % 50 == 7 else sequence for index, sequence in enumerate(found)]


def next_logits(model: CarftModel, prompt: list[int], prefixes: list[tuple[int, ...]]) -> Tensor:
    """[prefixes, V]: transformers' logits after prompt and prefix."""
    lm: Any = model.lm
    with attention(lm, "sdpa"), torch.no_grad():
        return lm(torch.tensor([[*prompt, *prefix] for prefix in prefixes])).logits[:, -1]


@pytest.mark.parametrize("setting", [(1.0, 0, 1.0), (0.4, 0, 1.0), (1.0, 0, 0.8), (0.4, 0, 0.9)])
def test_three_tokens_of_an_engine_follow_the_model_and_a_bias_of_two_percent_is_found(
    base_model: CarftModel, setting: Setting
) -> None:
    draws, (temperature, _, top_p) = 10_000, setting
    engine = HFEngine(base_model, build_tokenizer(), batch_size=5000)
    sampling = SamplingParams(3, temperature=temperature, top_p=top_p, samples_per_prompt=draws, seed=8)
    found = [tuple(rollout.completion_ids) for rollout in engine.generate([UNSURE], sampling)]
    probability = enumerated(lambda prefixes: next_logits(base_model, UNSURE, prefixes), setting, 5 / draws)
    assert follow_tail(found, probability) > LIMIT
    assert follow_tail(with_bias(found, probability), probability) < LIMIT


def test_a_token_does_not_depend_on_the_rows_beside_it() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(64, 3000, generator=generator)
    seeds, positions = [1000 + row % 7 for row in range(64)], [row // 7 for row in range(64)]
    whole = coupled.pick(logits, seeds, positions)
    assert len(set(whole.tolist())) > 60
    order = torch.randperm(64, generator=generator).tolist()
    shuffled = coupled.pick(logits[order], [seeds[i] for i in order], [positions[i] for i in order])
    assert shuffled.tolist() == whole[order].tolist()
    alone = [coupled.pick(logits[i : i + 1], seeds[i : i + 1], positions[i : i + 1]) for i in range(64)]
    assert torch.cat(alone).tolist() == whole.tolist()


@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0, 300.0])
def test_among_many_tokens_the_same_one_is_picked_as_with_noise_for_all(scale: float) -> None:
    """Flat and steep rows, ties, some cut to -inf; one with nothing else, and one with NaN."""
    logits = (scale * torch.randn(48, 40_000, generator=torch.Generator().manual_seed(5))).round()
    logits[::3, 100:] = -torch.inf
    seeds, positions = list(range(48)), list(range(300, 348))
    expected = (coupled.gumbel_noise(seeds, positions, 40_000) + logits).argmax(-1)
    assert coupled.pick(logits, seeds, positions).tolist() == expected.tolist()
    logits[0], logits[1, 7] = -torch.inf, torch.nan
    assert coupled.pick(logits[:2], seeds[:2], positions[:2]).tolist() == [0, 7]


@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    reason="needs AVX-512's bfloat16 instructions, and no AMX: vLLM has other kernels there",
)
def test_in_bfloat16_a_completion_is_the_same_alone_in_a_batch_and_with_drafts(
    tmp_path: Path, at_the_end: ExitStack
) -> None:
    """Log-probs to the bit. With one row oneDNN rounds a sum of 1,536 products differently than with several."""
    sizes = {"hidden_size": 64, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 100}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    config = make_config("rollout.engine=vllm", "rollout.dtype=bfloat16", "rollout.draft_budget=32")
    model = load_model(config, str(tmp_path), CPU, heads=False)
    perturb(model, 1)
    engine = VLLMEngine(config, model, [EOS])
    at_the_end.callback(engine.close)
    engine.sync(model)
    sampling = SamplingParams(24, seed=3)
    together = engine.generate(PROMPTS[:4], sampling)
    assert len({tuple(rollout.completion_ids) for rollout in together}) == 4
    first = [engine.generate(PROMPTS[:1], sampling), together[:1]]
    drafts = [[rollout.completion_ids] for rollout in together]
    drafted = engine.generate(PROMPTS[:4], dataclasses.replace(sampling, drafts=drafts))
    assert sum(rollout.accepted for rollout in drafted) > 40
    for some, others in (first, (drafted, together)):
        for one, other in zip(some, others, strict=True):
            assert one.completion_ids == other.completion_ids
            assert one.sampled_logprobs == other.sampled_logprobs


def test_another_vllm_is_refused_with_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from carft_fast.rollout.vllm import worker

    with pytest.raises(EngineError, match=r"vLLM 0\.32\.0 runs builtins\.object; .*unset VLLM_USE_V2_MODEL_RUNNER"):
        worker.check_internals(object())

    def _sample(self: Any, hidden: Any) -> None: ...

    monkeypatch.setattr(worker.GPUModelRunner, "_sample", _sample)
    with pytest.raises(
        EngineError,
        match=r"vLLM 0\.32\.0 has GPUModelRunner\._sample\(self, hidden\); rollouts need GPUModelRunner\._sample"
        r"\(self, logits, spec_decode_metadata\) of vLLM 0\.32: install vLLM 0\.32",
    ):
        worker.check_internals(object())
    monkeypatch.delattr(worker.GPUModelRunner, "_sample")
    with pytest.raises(EngineError, match=r"has no GPUModelRunner\._sample; rollouts need"):
        worker.check_internals(object())


def a_runner(worker: Any, *, drafter: bool) -> Any:
    """One without a model."""
    runner = object.__new__(worker.GPUModelRunner)
    runner.requests = {}
    runner.input_batch = SimpleNamespace(
        num_reqs=0, req_ids=[], num_tokens_no_spec=None, token_ids_cpu=None, sampling_metadata=None
    )
    if drafter:
        runner.drafter = object.__new__(worker.DraftProposer)
        runner.effective_drafter_max_model_len = 96
    return runner


def test_what_a_runner_lacks_is_said_at_the_start() -> None:
    from carft_fast.rollout.vllm import worker

    for drafter in (False, True):
        worker.check_internals(a_runner(worker, drafter=drafter))
    runner = a_runner(worker, drafter=True)
    del runner.effective_drafter_max_model_len
    said = r"vLLM 0\.32\.0 has no GPUModelRunner\.{0}; rollouts need GPUModelRunner\.{0} of vLLM 0\.32: install"
    with pytest.raises(EngineError, match=said.format("effective_drafter_max_model_len")):
        worker.check_internals(runner)
    for name in vars(a_runner(worker, drafter=True).input_batch):
        runner = a_runner(worker, drafter=True)
        delattr(runner.input_batch, name)
        with pytest.raises(EngineError, match=said.format(rf"input_batch\.{name}")):
            worker.check_internals(runner)


def test_another_call_of_the_proposer_is_refused_where_there_are_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    from carft_fast.rollout.vllm import worker

    def propose_draft_token_ids(self: Any, sampled_token_ids: Any) -> Any:
        if self.method == "ngram":
            return self.drafter.propose(sampled_token_ids, self.input_batch.token_ids_cpu)
        if self.method == "custom_class":
            return self.drafter.propose(8, sampled_token_ids, self.input_batch.num_tokens_no_spec, slot_mappings=None)
        return None

    monkeypatch.setattr(worker.GPUModelRunner, "propose_draft_token_ids", propose_draft_token_ids)
    with pytest.raises(
        EngineError,
        match=r"vLLM 0\.32\.0 has propose\(8, sampled_token_ids, self\.input_batch\.num_tokens_no_spec\) for drafts; "
        r"they need propose\(sampled_token_ids, .*\) of vLLM 0\.32: .*rollout\.drafts = \"off\"",
    ):
        worker.check_internals(a_runner(worker, drafter=True))
    worker.check_internals(a_runner(worker, drafter=False))
    monkeypatch.delattr(worker.GPUModelRunner, "propose_draft_token_ids")
    with pytest.raises(EngineError, match=r"has no call of propose for drafts"):
        worker.check_internals(a_runner(worker, drafter=True))


def imports(file: str) -> set[tuple[str, str]]:
    """Module and name of what a file of the vLLM room imports of vLLM."""
    from carft_fast.rollout.vllm import worker

    tree = ast.parse(Path(worker.__file__).with_name(file).read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return {(str(n.module), name.name) for n in nodes for name in n.names if str(n.module).startswith("vllm.")}


def test_what_is_imported_of_vllm_is_checked_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name, missing, is the sentence with both versions; in worker.py itself when it is loaded."""
    from carft_fast.rollout.vllm import worker

    at_load = imports("worker.py")
    checked = {(module, name) for name, (module, _) in worker.KNOWN.items()} | at_load
    assert imports("in_place.py") | imports("plugin.py") <= checked
    for name, (module, _) in worker.KNOWN.items():
        *owner, last = name.split(".")
        with monkeypatch.context() as patch:
            patch.delattr(operator.attrgetter(owner[0])(sys.modules[module]) if owner else sys.modules[module], last)
            with pytest.raises(
                EngineError, match=rf"^vLLM 0\.32\.0 has no {re.escape(name)}; rollouts need .*vLLM 0\.32"
            ):
                worker.check_internals(object())
    for module, name in [("vllm.v1.outputs", "SamplerOutput"), ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner")]:
        with monkeypatch.context() as patch:
            patch.delattr(sys.modules[module], name)
            with pytest.raises(EngineError, match=rf"^vLLM 0\.32\.0 lacks what rollouts need of vLLM 0\.32 .*'{name}'"):
                runpy.run_path(worker.__file__)
