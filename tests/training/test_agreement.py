"""What trainer and sampler disagree on, measured."""

import math

import torch

from carft_fast.training.agreement import Mismatch


def test_mismatch_of_known_differences() -> None:
    found = Mismatch.of(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0.005, 1.0, 2.5, 2.0]))
    assert math.isclose(found.mean, 0.37625, rel_tol=1e-5)
    assert (found.max, found.material, found.tokens) == (1.0, 0.5, 4)
