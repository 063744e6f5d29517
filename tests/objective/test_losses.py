"""Loss terms against transformers, and against formulas written out."""

import pytest
import torch

from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.load import load_model
from carft_fast.models.packing import PackedBatch, pack
from carft_fast.objective.losses import cot_embeddings, sft_loss

from ..models.checks import COMPLETIONS, PROMPTS, config


@pytest.fixture
def model() -> CarftModel:
    return load_model(config(), "synthetic", torch.device("cpu"), heads=True)


@pytest.fixture
def batch() -> PackedBatch:
    return pack(PROMPTS, COMPLETIONS, torch.device("cpu"))


def test_sft_loss_is_that_of_transformers(model: CarftModel, batch: PackedBatch) -> None:
    longest = max(batch.segments.q_lengths)
    ids = torch.zeros(len(PROMPTS), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        ids[row, : len(prompt + completion)] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : len(prompt + completion)] = torch.tensor(completion)
    with model.padded() as lm:
        theirs = lm(input_ids=ids, labels=labels).loss
    ours = sft_loss(model, model(batch), batch, total_tokens=len(batch.read_index_C))
    torch.testing.assert_close(ours, theirs)
    weight = model.head_weight_VD
    (our_gradient,), (their_gradient,) = torch.autograd.grad(ours, weight), torch.autograd.grad(theirs, weight)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-6)


def test_cot_embedding_reads_the_completion_tokens_themselves(model: CarftModel, batch: PackedBatch) -> None:
    """Paper eq. 6 by hand, one sequence: states AT the tokens, projected first and pooled after."""
    with torch.no_grad():
        hidden = model(batch).hidden_TD
        ours = cot_embeddings(model, hidden, batch)[:, 0]
        with model.padded() as lm:
            last = lm.base_model(torch.tensor([PROMPTS[1] + COMPLETIONS[1]])).last_hidden_state[0]
        states = last[len(PROMPTS[1]) :]
        by_hand = (model.value(states).softmax(0)[:, None] * model.embed(states)).sum(0)
    torch.testing.assert_close(ours[1], by_hand, rtol=1e-4, atol=1e-5)
