"""TRL's side against carft_fast's, for real, on the quickstart's model. `make test-peers`"""

import contextlib
import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from benchmarks.peers.__main__ import given_sides, make_work, ours, quickstart, run_case, trl_spec


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return quickstart(tmp_path_factory.mktemp("peers") / "model")


def test_gradient_and_update_are_those_of_trl(model, tmp_path):
    """`run_case` raises where counts, losses, gradients or weights differ."""
    work = make_work(model, 2, 4, 2, method="dr_grpo", given=True)
    rows, about = run_case("given", work, given_sides(8), tmp_path / "case")
    assert {row["side"] for row in rows} >= {"TRL", "TRL, completion positions"}
    assert "gradients by" in about["checks"]


def test_the_gradient_does_not_depend_on_trls_micro_batches(model, tmp_path):
    work = make_work(model, 2, 4, 2, method="dr_grpo", given=True)
    run_case("given", work, [ours("we", ""), trl_spec("TRL", "", 2, valid=True)], tmp_path / "case")


def test_own_samples_all_have_the_length_asked_for(model, tmp_path):
    work = make_work(model, 2, 4, 2, method="dr_grpo", given=False)
    specs = [ours("we", ""), trl_spec("TRL", "", 8, valid=True)]
    _, about = run_case("own", work, specs, tmp_path / "case")
    assert f"{8 * model.own_tokens} completion tokens" in about["checks"]


def test_its_own_samples_by_vllm_all_have_the_length_asked_for(model, tmp_path):
    work = make_work(model, 2, 4, 2, method="dr_grpo", given=False)
    specs = [ours("we", "", "rollout.engine=vllm"), trl_spec("TRL", "", 8, valid=True, sampler="use_vllm")]
    _, about = run_case("own", work, specs, tmp_path / "case")
    assert f"{8 * model.own_tokens} completion tokens" in about["checks"]


def test_its_own_vllm_has_the_weights_of_its_last_step(model, tmp_path):
    """Log-probs of samples by vLLM against its trainer's model, which two large steps have moved."""
    work = dataclasses.replace(make_work(model, 2, 4, 2, method="dr_grpo", given=False), lr=1e-2)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        worst, moved = pool.submit(trained_and_sampled, work, tmp_path).result()
    assert worst < 1e-3
    assert moved > 0.1


def trained_and_sampled(work, folder):
    """The largest difference of log-probs to the trained model's, and to those of the model it started from."""
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    from benchmarks.peers.trl_side import Setting, TrlSide

    class NoTurns:
        def wait(self):
            pass

        def timed(self, done):
            return contextlib.nullcontext()

        def answer(self, done):
            pass

    side = TrlSide(work, Setting(8, valid_positions=True, sampler="use_vllm"), folder, NoTurns())
    side.run()
    vllm = side.trainer.vllm_generation
    vllm.sync_weights()
    prompts = [{"prompt_token_ids": prompt} for prompt in work.prompts]
    found = vllm.llm.generate(
        prompts, SamplingParams(temperature=1.0, max_tokens=8, logprobs=0, seed=1), use_tqdm=False
    )
    start = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    worst = [0.0, 0.0]
    for prompt, output in zip(work.prompts, found, strict=True):
        tokens, logprobs = output.outputs[0].token_ids, output.outputs[0].logprobs
        for i, lm in enumerate((side.trainer.model, start)):
            with torch.no_grad():
                logp = lm(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            for row, token, of_token in zip(logp, tokens, logprobs, strict=True):
                worst[i] = max(worst[i], abs(float(row[token]) - of_token[token].logprob))
    return worst
