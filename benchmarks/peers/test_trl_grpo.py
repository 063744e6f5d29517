"""examples/trl_grpo.py against TRL's own loss and gradient. `make test-peers`"""

import json
import runpy

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers.__main__ import quickstart
from benchmarks.peers.trl_grpo import EXAMPLE, make_inputs, report
from benchmarks.rows import RESULTS

Fused = runpy.run_path(str(EXAMPLE))["FusedGRPOTrainer"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return quickstart(tmp_path_factory.mktemp("trl") / "model").folder


def trainer(folder, tmp_path, kind=Fused, **options):
    return kind(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            max_completion_length=24,
            report_to=[],
            **({"use_bias_correction_kl": False} | options),
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 8),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_loss_and_gradient_are_trls(folder, tmp_path, loss_type, old, beta):
    ours = trainer(folder, tmp_path, loss_type=loss_type, beta=beta, temperature=0.8, epsilon_high=0.28)
    ours.current_gradient_accumulation_steps = 2
    model = ours.model.train()
    inputs = make_inputs(model, rows=6, prompt=9, completion=24, old=old, ref=beta > 0)
    found = []
    for compute in (GRPOTrainer._compute_loss, Fused._compute_loss):
        model.zero_grad()
        loss = compute(ours, model, inputs)
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (theirs, their_gradient), (mine, my_gradient) = found
    assert their_gradient.norm() > 1e-3
    assert mine == pytest.approx(theirs, abs=1e-5)
    assert (my_gradient - their_gradient).norm() <= 1e-5 * their_gradient.norm()


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "cispo"},
        {"importance_sampling_level": "sequence"},
        {"delta": 4.0},
        {"entropy_coef": 0.1},
        {"beta": 0.1, "use_bias_correction_kl": True},
    ],
)
def test_what_it_does_not_compute_is_refused(folder, tmp_path, options):
    with pytest.raises(ValueError, match="token-level dapo, grpo, bnpo, dr_grpo"):
        trainer(folder, tmp_path, **({"loss_type": "grpo"} | options))


def test_it_trains_as_trl_does(folder, tmp_path):
    """Two steps of TRL's whole loop, sampling included, from one seed: the weights that TRL's own loss gives."""
    weights = []
    for kind in (GRPOTrainer, Fused):
        torch.manual_seed(0)
        one = trainer(
            folder,
            tmp_path,
            kind,
            loss_type="dr_grpo",
            max_steps=2,
            num_generations=4,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            seed=3,
        )
        one.reward_funcs = [lambda completions, **_: [float(len(set(c))) for c in completions]]
        one.train()
        weights.append(torch.cat([p.detach().flatten() for p in one.model.parameters()]))
    start = torch.cat([p.flatten() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()]).detach()
    moved = (weights[0] - start).norm()
    assert moved > 1e-2
    assert (weights[1] - weights[0]).norm() < 0.02 * moved  # AdamW's first steps amplify rounding


def test_the_committed_report_is_that_of_the_committed_rows() -> None:
    rows = json.loads((RESULTS / "trl_grpo_cpu.json").read_text())["rows"]
    assert report(rows, 825, rows[0]["machine"]) == (RESULTS / "trl_grpo_cpu.md").read_text()
