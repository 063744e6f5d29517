"""Scores of rollouts against the published code's."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from carft_fast.rewards.answers import Grade
from carft_fast.rollout.base import Rollout
from carft_fast.training.rl import draft_metrics, score_rollouts
from carft_kernels import value_pool

from ..models.checks import config

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "visible" / "value_head.safetensors"


@pytest.mark.parametrize("case", ["part0", "part1"])
def test_embedding_enhanced_partial_reward_of_the_published_code(case: str) -> None:
    """Ids, values and embeddings to z_1, z_2, their cosine, and the score of wrong but extractable answers."""
    if not GOLDEN.is_file():
        pytest.skip(f"reference vectors {GOLDEN} do not exist")
    manifest = json.loads((GOLDEN.parent / "manifest.json").read_text())
    params = manifest["topics"]["reward_partial"]["cases"][case]["params"]
    vectors = load_file(GOLDEN.parent / "reward_partial.safetensors")
    a = {name.removeprefix(f"{case}/"): x for name, x in vectors.items() if name.startswith(f"{case}/")}

    def pooled(ids: Tensor, hidden: Tensor, value: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        rows, length = ids.shape
        mask = (torch.arange(length) >= prefix[:, None]) & (ids != params["pad_id"])
        offsets = torch.arange(0, rows * length + 1, length)
        return value_pool(hidden.flatten(0, 1), value.flatten(), offsets, mask_T=mask.flatten())[0], mask.any(1)

    prompt = torch.full_like(a["base_prefix_len"], params["prompt_len"])
    z_1, filled_1 = pooled(a["base_ids"], a["base_hidden"], a["base_value"], a["base_prefix_len"])
    z_2, filled_2 = pooled(a["model_ids"], a["hidden"], a["value"], prompt)
    # the published code pools a row without completion over everything, pads included (test_golden.py: test_value_pool)
    rows = filled_1 & filled_2
    assert rows.sum() >= 4
    for ours, expected in ((z_1, a["z_1"]), (z_2, a["z_2"])):
        torch.testing.assert_close(ours[rows], expected[rows], rtol=1e-5, atol=1e-6)
    cosine = torch.cosine_similarity(z_1, z_2)
    torch.testing.assert_close(cosine[rows], a["cos"][rows], rtol=1e-5, atol=1e-6)
    grades = [Grade(reward == 1, None if reward == 0 else 5.0) for reward in a["reward_in"].tolist()]
    assert any(not g.correct and g.extractable for g, filled in zip(grades, rows.tolist(), strict=True) if filled)
    score = score_rollouts(grades, cosine, config())
    torch.testing.assert_close(score.double()[rows], a["reward_out"][rows], rtol=1e-5, atol=1e-6)


def drafted(tokens: int, guesses: int, stood: int) -> Rollout:
    return Rollout(list(range(tokens)), [0.0] * tokens, "length", 0, guesses, stood)


def test_what_drafts_did_by_hand() -> None:
    """16 tokens: 5 guesses stood, so 11 forwards; 3 of the 8 guesses did not."""
    found = draft_metrics([drafted(10, 6, 4), drafted(5, 2, 1), drafted(1, 0, 0)])
    assert found == pytest.approx({"tokens_per_forward": 16 / 11, "draft_accepted": 5 / 8, "draft_wasted": 3 / 16})
    assert draft_metrics([drafted(7, 0, 0)]) == {"tokens_per_forward": 1.0, "draft_wasted": 0.0}
