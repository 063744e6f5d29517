"""contrastive.mode "answer": the state before the answer phrase in place of the whole CoT."""

from pathlib import Path

import pytest
import torch

from .runs import records, run_pipeline, tiny_config
from .stepcase import gradients, quick_config, random_case, take_apart, with_answers
from .test_step import assert_same

MODE = ["contrastive.mode=answer", "contrastive.coef=0.3", "rl.ppo_epochs=1"]


@pytest.mark.parametrize("impl", ["fast", "padded"])
def test_z_is_the_projected_state_before_the_phrase(impl: str) -> None:
    """Against a bare forward of one sequence at a time; rollouts and annotated CoTs. The partial reward's cosine is of
    the whole CoTs as before."""
    plain = random_case(1, "mixed")
    case, answers = with_answers(plain, 1)
    options = [f"model.impl={impl}", "rl.micro_batch_tokens=300"]
    parts = take_apart(quick_config(*MODE, *options), case)
    model, found = parts.policy, parts.experience
    assert model.heads is not None
    assert found.z_2 is not None
    assert found.common is not None
    counted = [(i, at) for i, at in enumerate(answers) if all(at)]
    assert 3 <= len(counted) < 10
    for side, (rows, z) in enumerate(
        ((case.samples.rollouts, found.z_2[:, 1]), (case.samples.annotated, found.common))
    ):
        for i, at in counted:
            ids = torch.tensor([rows.prompts[i] + rows.completions[i]])
            with torch.no_grad(), model.padded():
                states = model.lm(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
                expected = model.heads.proj(states[len(rows.prompts[i]) + (at[side] or 0) - 1])
            torch.testing.assert_close(z[i], expected, rtol=1e-4, atol=1e-5)
    whole = take_apart(quick_config(*options), plain).experience
    torch.testing.assert_close(found.cosine_N, whole.cosine_N)


def test_fast_equals_plain() -> None:
    case, _ = with_answers(random_case(2, "mixed"), 2)
    options = [[*MODE, f"model.impl={impl}", "rl.micro_batch_tokens=170"] for impl in ("fast", "padded")]
    both = [gradients(quick_config(*o), case) for o in options]
    assert both[0][1]["contrastive_loss"] > 0
    assert_same(*both)


def test_a_run(tmp_path: Path, tiny_run: list[str]) -> None:
    """Of an untrained model, which is right where its prefix is: there the phrase is found."""
    options = [*MODE, "rollout.prefix=0.99", "rl.max_steps=1", "data.eval_rows=1", "data.train_rows=30"]
    options += ["output.trackers=[]"]
    run_pipeline(tmp_path / "run", tiny_config(tiny_run, *options), ("rl",))
    [record] = records(tmp_path / "run", "rl", "train")
    assert record["train_accuracy"] > 0
    assert record["contrastive_loss"] > 0
