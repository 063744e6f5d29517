"""Models, prompts and the check that completions are a model's own."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config.schema import Config
from carft_fast.config.toml import load_config
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models.causal_lm import CarftModel
from carft_fast.rollout.base import Rollout, SamplingParams

CPU = torch.device("cpu")
EOS = build_tokenizer().eos_token_id
PROMPTS = [[5, 9, 17], [21, 6, 40, 8, 13], [33], [7, 7, 50, 12], [60, 3], [14, 22, 31, 5, 9, 44, 18]] * 2
TOLERANCE = 1e-4


def make_config(*overrides: str) -> Config:
    base = ["rollout.batch_size=8", "data.max_length=96", "rollout.max_new_tokens=40", "rollout.kv_cache_gib=0.25"]
    return load_config(str(QUICKSTART_CONFIG), [*base, *overrides])


def perturb(model: CarftModel, seed: int) -> None:
    """Other weights, far from the old ones and from uniform predictions."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.lm.parameters():
            parameter.mul_(1.1).add_(0.1 * torch.randn(parameter.shape, generator=generator))


@contextlib.contextmanager
def attention(lm: Any, name: str) -> Iterator[None]:
    """Another of transformers' attention functions than the trainer's packed one."""
    packed = lm.config._attn_implementation
    lm.config._attn_implementation = name
    try:
        yield
    finally:
        lm.config._attn_implementation = packed


def reference_logits(lm: Any, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """[completion tokens, V] of transformers' forward with its own attention."""
    with attention(lm, "sdpa"), torch.no_grad():
        return lm(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]


def reference_logprobs(
    lm: torch.nn.Module, prompt: Sequence[int], ids: Sequence[int], sampling: SamplingParams
) -> torch.Tensor:
    """Log-probs of a completion from transformers' forward, of the distribution sampled from. In float64."""
    logits = reference_logits(lm, prompt, ids).double()
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
        if sampling.top_k:
            logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
        if sampling.top_p < 1:
            ordered, order = logits.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            logits = logits.masked_fill(
                torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= sampling.top_p), -torch.inf
            )
    return logits.log_softmax(-1).gather(1, torch.tensor(list(ids))[:, None])[:, 0]


def assert_samples_of(
    lm: torch.nn.Module,
    rollouts: Sequence[Rollout],
    sampling: SamplingParams,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    tolerance: float = TOLERANCE,
) -> None:
    """Every completion's log-probs are this model's; greedy ones are also the argmax at every token."""
    jobs = [prompt for prompt in prompts for _ in range(sampling.samples_per_prompt)]
    assert len(rollouts) == len(jobs)
    for prompt, rollout in zip(jobs, rollouts, strict=True):
        ids = rollout.completion_ids
        assert len(rollout.sampled_logprobs) == len(ids)
        expected = reference_logprobs(lm, prompt, ids, sampling)
        got = torch.tensor(rollout.sampled_logprobs, dtype=torch.float64)
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
        if sampling.temperature == 0:
            assert ids == reference_logits(lm, prompt, ids).argmax(-1).tolist()
        stopped = EOS in ids
        assert ids.index(EOS) == len(ids) - 1 if stopped else len(ids) == sampling.max_new_tokens
        assert rollout.finish_reason == ("stop" if stopped else "length")
