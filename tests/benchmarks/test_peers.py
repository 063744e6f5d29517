"""The comparison with peers: rows from recorded steps, the check of equal work, and carft_fast's own side for real."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.peers import stand_ins
from benchmarks.peers.__main__ import CARFT_OPTIONS, PLAIN, Model, compare, make_work, ours, quickstart, run_case
from benchmarks.peers.carft_side import CarftSide
from benchmarks.peers.published_side import CARFT, REFT, trainer_file
from benchmarks.peers.table import case_rows, report
from benchmarks.peers.turns import Side, Turns, serve
from benchmarks.peers.work import (
    Done,
    UnequalWorkError,
    Work,
    check_counts,
    check_losses,
    check_tensors,
    relative_difference,
)
from carft_fast.core.errors import InputError

# two prompts of 3 and 2 tokens, two samples each
WORK = Work(
    "m", "c", [], "dr_grpo", [[1, 2, 3], [4, 5]], ["a", "b"], ["1", "2"], 2, 8, [[6], [7, 8], [9], [6, 7, 8]], 3, 1e-6
)


def recorded(*seconds: float, loss: float = 0.25) -> list[Done]:
    """Steps of a side on WORK, as such a side reported them."""
    return [Done(s, s / 2, 4, 10, 7, 20, 1, loss, 5.0) for s in seconds]


def test_rows_are_medians_and_ratios_within_a_round():
    done = {"we": recorded(9.0, 1.0, 2.0, 4.0), "they": recorded(99.0, 2.0, 3.0, 12.0)}
    rows = {(row["side"], row["measure"]): row for row in case_rows("case", done, {"we": "w", "they": "t"})}
    assert rows["we", "step"]["value"] == 2.0  # the first round is not timed
    assert rows["we", "step"]["range"] == [1.0, 4.0]
    assert rows["they", "completion tokens trained"]["value"] == pytest.approx(7 / 3, abs=1e-4)
    ratio = rows["they", "time over we's"]  # 2, 1.5 and 3, round by round: not the 1.5 of the medians
    assert (ratio["value"], ratio["range"], ratio["unit"], ratio["notes"]) == (2.0, [1.5, 3.0], "x", "t")
    assert ratio["name"] == "case: they: time over we's"
    assert ("we", "time over we's") not in rows


def test_the_report_names_every_side_and_what_was_checked():
    rows = case_rows("case", {"we": recorded(1, 2, 2), "they": recorded(1, 5, 5)}, {"we": "packed", "they": "padded"})
    text = report(rows, {"case": {"work": "4 samples", "checks": "gradients agree", "machine": "a machine"}})
    assert "| they | 5.00 (5.00 to 5.00) | 2.50 (2.50 to 2.50) | 2.50 (2.50 to 2.50) | 2.50" in text
    for words in ("- we: packed", "- they: padded", "Equal work: gradients agree", "a machine", "## case"):
        assert words in text


def test_equal_counts_pass_and_any_difference_is_named():
    check_counts(WORK, {"we": recorded(1, 1, 1)})
    for field in ("samples", "prompt_tokens", "completion_tokens", "annotated_tokens", "optimizer_steps"):
        steps = recorded(1, 1, 1)
        setattr(steps[2], field, getattr(steps[2], field) + 1)
        with pytest.raises(UnequalWorkError, match=f"they, step 2: {field}"):
            check_counts(WORK, {"we": recorded(1, 1, 1), "they": steps})
    with pytest.raises(UnequalWorkError, match="2 steps, wanted 3"):
        check_counts(WORK, {"we": recorded(1, 1)})


def test_own_samples_have_a_fixed_number_of_tokens():
    assert replace(WORK, completions=None).completion_tokens == 2 * 2 * 8
    assert WORK.completion_tokens == 7


def test_every_sample_has_an_advantage():
    reward_GK = torch.tensor(WORK.rewards).view(-1, 2)
    assert ((reward_GK - reward_GK.mean(1, keepdim=True)) != 0).all()


@pytest.mark.parametrize("loss", [0.2503, math.nan])
def test_other_losses_are_refused(loss):
    assert check_losses({"we": recorded(1), "they": recorded(1, loss=0.25001)}) == pytest.approx(1e-5)
    with pytest.raises(UnequalWorkError, match="losses"):
        check_losses({"we": recorded(1), "they": recorded(1, loss=loss)})


def test_relative_difference_is_over_all_tensors():
    theirs = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    ours_ = {"a": torch.tensor([3.0, 0.3]), "b": torch.tensor([4.4])}
    assert relative_difference(ours_, theirs) == pytest.approx(0.5 / 5, rel=1e-6)
    with pytest.raises(UnequalWorkError, match="gradient: relative difference"):
        check_tensors("gradient", ours_, theirs, 0.09)
    with pytest.raises(UnequalWorkError, match="only one side has"):
        relative_difference({"a": theirs["a"]}, theirs)
    with pytest.raises(UnequalWorkError, match="all tensors are zero"):
        relative_difference(theirs, {name: torch.zeros_like(x) for name, x in theirs.items()})
    with pytest.raises(UnequalWorkError, match="nan"):
        check_tensors("gradient", {"a": torch.tensor([math.nan])}, {"a": torch.ones(1)}, 1.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return quickstart(tmp_path_factory.mktemp("peers") / "model")


@pytest.fixture(scope="module")
def tiny(model) -> Work:
    return make_work(model, 2, 4, 2, method="dr_grpo", given=True)


def test_the_side_counts_what_it_computes_and_has_the_plain_paths_gradient(tiny):
    done, gradients = [], []
    plain = ["model.impl=padded", "rl.micro_batch_tokens=65536"]
    for options in (["rl.share_prompts=false"], ["rl.share_prompts=true"], plain):
        side = CarftSide(tiny, options)
        done.append(Done())
        side.step(done[-1])
        gradients.append(side.gradient)
    prompts, completions = 4 * sum(map(len, tiny.prompts)), sum(map(len, tiny.completions))
    assert [d.prompt_tokens for d in done] == [prompts] * 3
    assert [d.completion_tokens for d in done] == [completions] * 3
    padded = 8 * (max(map(len, tiny.prompts)) + max(map(len, tiny.completions)))
    assert [d.positions for d in done] == [prompts + completions, prompts // 4 + completions, padded]
    # on-policy, the ratio is 1: the loss is minus the advantages, over samples x max_new_tokens
    advantage = [0.75, -0.25, -0.25, -0.25] * 2
    lengths = map(len, tiny.completions)
    expected = -sum(a * n for a, n in zip(advantage, lengths, strict=True)) / (8 * tiny.max_new_tokens)
    assert [d.loss for d in done] == pytest.approx([expected] * 3, abs=1e-6)
    assert relative_difference(gradients[0], gradients[2]) < 1e-4
    assert relative_difference(gradients[1], gradients[2]) < 1e-4


def test_carfts_side_trains_on_its_annotated_cots(model):
    work = make_work(model, 4, 1, 1, method="carft", given=True)
    gradients = []
    for options in (CARFT_OPTIONS, [*CARFT_OPTIONS, *PLAIN], [*CARFT_OPTIONS, "contrastive.coef=0"]):
        side = CarftSide(work, options)
        side.step(done := Done())
        gradients.append(side.gradient)
    assert done.annotated_tokens == sum(map(len, work.annotated)) > 4
    assert done.optimizer_steps == work.updates_per_step == 2
    assert relative_difference(gradients[0], gradients[1]) < 1e-4
    assert relative_difference(gradients[0], gradients[2]) > 0.01


@pytest.mark.long
def test_sides_in_processes_take_turns_and_are_compared(tiny, tmp_path):
    specs = [ours("packed", "p", "rl.share_prompts=false"), ours("shared", "s", "rl.share_prompts=true")]
    rows, about = run_case("tiny", tiny, specs, tmp_path / "case")
    assert {row["side"] for row in rows} == {"packed", "shared"}
    assert all(row["value"] > 0 for row in rows if row["measure"] in ("step", "processor time over packed's"))
    assert "8 samples" in about["checks"]
    assert not (tmp_path / "case").exists()


class Here(Turns):
    """Turns of a side in this process."""

    def __init__(self) -> None:
        self.done: list[Done] = []

    def wait(self) -> None:
        pass

    def answer(self, done: Done) -> None:
        self.done.append(done)


def test_a_side_that_trains_with_another_rate_is_found_out(tiny, tmp_path):
    sides, done = [], {}
    for name, options in (("same", []), ("other", ["rl.lr=2e-6"])):
        turns = Here()
        sides.append(SimpleNamespace(name=name, folder=tmp_path / name))
        sides[-1].folder.mkdir()
        serve(CarftSide(tiny, options), tiny, sides[-1].folder, turns)
        done[name] = turns.done
    with pytest.raises(UnequalWorkError, match="other, update"):
        compare(tiny, sides, done)


def test_a_side_that_ends_early_shows_its_log(tmp_path):
    WORK.save(tmp_path / "work.json")
    side = Side("broken", "carft_side", tmp_path / "work.json", tmp_path / "side", {"options": []})
    with pytest.raises(RuntimeError, match=r"broken ended with code 1(.|\n)*Error"):
        side.step()


def test_stand_ins_mean_what_their_libraries_meant():
    generator = torch.Generator().manual_seed(0)
    x_BL, mask_BL = torch.randn(3, 7, generator=generator), torch.rand(3, 7, generator=generator) > 0.4
    counted = x_BL[mask_BL]
    assert stand_ins.masked_var(x_BL, mask_BL).item() == pytest.approx(counted.var().item(), rel=1e-5)
    whitened = stand_ins.masked_whiten(x_BL, mask_BL)[mask_BL]
    torch.testing.assert_close(whitened, (counted - counted.mean()) / (counted.var() + 1e-8).sqrt())
    rewards = np.array([1.0, 2.0, 4.0])
    discounted = stand_ins.lfilter([1], [1, -0.5], x=rewards[::-1])[::-1]
    assert discounted.tolist() == [1 + 2 / 2 + 4 / 4, 2 + 4 / 2, 4.0]


def test_what_is_not_installed_raises_where_it_is_used_and_leaves_no_trace(tmp_path):
    import sympy

    (tmp_path / "published.py").write_text(
        "import wandb, sympy\nfrom trl.core import masked_mean, Unheard\nfrom deepspeed import engine\n"
    )
    module = stand_ins.import_published(tmp_path, "published")
    assert module.masked_mean is stand_ins.masked_mean
    with pytest.raises(RuntimeError, match=r"trl\.core\.Unheard is not installed"):
        module.Unheard()
    import sympy as again

    assert again is sympy


def test_a_clone_without_the_trainer_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"mwp_ReFT holds train_rl_reft\.py"):
        trainer_file(tmp_path, REFT)
    with pytest.raises(InputError, match=r"vae/scripts holds my_cl_trainer_v4\.py"):
        trainer_file(tmp_path, CARFT)
    inner = tmp_path / "code" / "mwp_ReFT"
    inner.mkdir(parents=True)
    (inner / "train_rl_reft.py").touch()
    assert trainer_file(tmp_path, REFT) == trainer_file(Path(inner), REFT) == inner / "train_rl_reft.py"
