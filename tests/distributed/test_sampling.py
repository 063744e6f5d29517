"""Sampling while the weights are sharded over real processes (FSDP2, gloo): the same completions as in one process."""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from carft_fast.config.toml import load_config
from carft_fast.core.processes import leave
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.load import load_model
from carft_fast.rollout.base import Rollout, SamplingParams
from carft_fast.rollout.hf import HFEngine
from tests.processes import spawn

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14], [15, 16], [17, 18, 19]]
SAMPLED, GREEDY = SamplingParams(12, samples_per_prompt=2, seed=1), SamplingParams(12, temperature=0)
CASES = [(SAMPLED, [(0, 4), (4, 5)]), (SAMPLED, [(0, 5), (5, 5)]), (GREEDY, [(0, 1), (1, 5)])]
"""Settings, and from which prompt to which each process samples."""


def eager_to_end() -> CarftModel:
    """Completions end at different lengths, some long before the limit."""
    model = load_model(load_config(None, ["model.path=synthetic"]), "synthetic", torch.device("cpu"), heads=True)
    with torch.no_grad():
        for parameter in model.lm.parameters():
            parameter.mul_(1.5)
        model.lm.get_input_embeddings().weight[build_tokenizer().eos_token_id] *= 3
    return model


def sample(model: CarftModel, sampling: SamplingParams, start: int, stop: int) -> list[Rollout]:
    engine = HFEngine(model, build_tokenizer(), batch_size=2)
    return engine.generate(PROMPTS[start:stop], replace(sampling, first_prompt=start))


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = eager_to_end()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.lm.base_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.lm, mesh=mesh)
    found = [sample(model, sampling, *share[rank]) for sampling, share in CASES]
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


def test_processes_with_sharded_weights_sample_what_one_would() -> None:
    """Shares of 4 and 1 prompts, and of 5 and none: batches and lengths differ, and every forward is a collective."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (folder,), 2)
        parts = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for case, (sampling, _) in enumerate(CASES):
        found = [rollout for part in parts for rollout in part[case]]
        expected = sample(eager_to_end(), sampling, 0, len(PROMPTS))
        assert [r.completion_ids for r in found] == [r.completion_ids for r in expected]
        for ours, one in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.sampled_logprobs, one.sampled_logprobs, rtol=1e-4, atol=1e-5)
    assert len({len(r.completion_ids) for r in sample(eager_to_end(), SAMPLED, 0, len(PROMPTS))}) > 1
