"""What every engine counts alike."""

import dataclasses

from carft_fast.rollout.base import SamplingParams, request_seed
from carft_fast.rollout.vllm.adapter import sampling_fields


def test_every_engine_counts_seeds_from_the_first_prompt() -> None:
    whole = SamplingParams(8, samples_per_prompt=2, seed=3)
    part = dataclasses.replace(whole, first_prompt=5)
    assert request_seed(part, 2) == request_seed(whole, 7) != request_seed(whole, 2)
    assert sampling_fields(part, 2, [0]) == sampling_fields(whole, 7, [0])
