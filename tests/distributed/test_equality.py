"""Steps on several real processes (gloo) against the same steps on one: metrics, and weights after three of them;
steps that are left out, and a run that goes back.
"""

import dataclasses
import functools
import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

import carft_fast.training.parallel
from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config.toml import load_config
from carft_fast.core.console import Console
from carft_fast.core.processes import leave, on_main
from carft_fast.models.causal_lm import CarftModel, Gathered
from carft_fast.models.load import load_model
from carft_fast.objective.passes import Loss, PackedPasses
from carft_fast.training.loop import StageLoop
from carft_fast.training.parallel import Learner, build_learner
from carft_fast.training.pipeline import prepare
from carft_fast.training.pipeline import train as train_run
from carft_fast.training.run import evaluate
from carft_fast.training.step import Update
from tests.conftest import TINY_RUN
from tests.processes import spawn
from tests.training.stepcase import CPU, METHODS, Case, look_at, quick_config, random_case, spread_out, with_answers

OPTIONS = ["rl.lr=1e-3", "rl.eps=1e-4", "rl.max_grad_norm=1.0", "model.gradient_checkpointing=false"]
GROUPS = {
    "ddp, 2 processes": (2, "ddp"),
    "ddp, 3 processes": (3, "ddp"),
    "fsdp2, 2 processes": (2, "fsdp2"),
    "fsdp2, 3 processes": (3, "fsdp2"),
    "zero2, 2 processes": (2, "zero2"),
    "zero3, 2 processes": (2, "zero3"),
}
BRIEF = ["carft_both", "reft", "dr_grpo", "dr_grpo, all wrong", "carft_both, nothing extracted", "lora"]
"""What all but DDP and FSDP2 on two processes are held to."""
EDGES = ["all correct", "all wrong", "nothing extracted"]


class Setting(NamedTuple):
    name: str
    options: list[str]
    cases: Callable[[], list[Case]]


def settings() -> list[Setting]:
    """Every method for three steps, then what might leave a process without work."""

    def three(per_prompt: int) -> list[Case]:
        return [random_case(s, "mixed", prompts=12 // per_prompt, per_prompt=per_prompt) for s in range(3)]

    many = ["rl.micro_batch_tokens=80", "data.max_length=80"]
    found = []
    for method in ("carft_both", "reft", "dr_grpo"):
        per_prompt = 4 if method == "dr_grpo" else 1
        found.append(Setting(method, METHODS[method], lambda n=per_prompt: three(n)))
        found.append(Setting(f"{method}, many micro-batches", [*METHODS[method], *many], lambda n=per_prompt: three(n)))
        for verdicts in EDGES:
            found.append(
                Setting(
                    f"{method}, {verdicts}",
                    METHODS[method],
                    lambda v=verdicts, n=per_prompt: [random_case(5, v, prompts=2, per_prompt=n)],
                )
            )
    variants = ["rl.ratio=sequence", "rl.estimator=rloo", "rl.dual_clip=1.2", "rl.clip_high=0.01", "rl.ppo_epochs=2"]
    variants += ["rl.kl_loss_coef=0.1", "rl.kl_estimate=k2", 'rollout.correction="truncated"', "rl.mini_batch_size=6"]
    found.append(Setting("rloo, ratios of sequences", [*METHODS["dr_grpo"], *variants], lambda: three(4)))
    terms = [*METHODS["carft_both"], "rl.gradient_terms=true", "rl.mini_batch_size=6", "rl.kl_loss_coef=0.1"]
    found.append(Setting("gradients of terms", terms, lambda: three(1)))
    answers = ["contrastive.mode=answer", "contrastive.coef=0.3", "rl.micro_batch_tokens=160"]
    found.append(Setting("answer states", answers, lambda: [with_answers(case, 5)[0] for case in three(1)]))
    found.append(Setting("lora", [*METHODS["carft_both"], "lora.rank=4"], lambda: three(1)))
    found.append(Setting("padded", [*METHODS["carft_both"], 'model.impl="padded"'], lambda: three(1)))
    return found


def train(setting: Setting, strategy: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Metrics of every step, and the weights in the end (on the main process)."""
    config = quick_config(*OPTIONS, *setting.options, f"distributed.strategy={strategy}")
    policy = load_model(config, "synthetic", CPU, heads=True)
    if not config.lora.rank:
        spread_out(policy)
    learner = build_learner(config, policy, config.rl, CPU)
    metrics = []
    for case in setting.cases():
        p = look_at(config, case, learner)
        correct = [grade.correct for grade in case.grades]
        found = p.step.update(p.experience, p.advantages, correct, 1e-3).metrics
        advantage_C = p.advantages.raw_advantage_C
        metrics.append(found | {"advantage": float(advantage_C.sum()), "score": float(p.score_N.sum())})
    return metrics, whole_weights(policy)


def whole_weights(policy: CarftModel) -> dict[str, Tensor]:
    """A copy by name; where weights are divided the main process has them, the others nothing."""
    assert policy.heads is not None
    gathered = policy.gather() or Gathered(policy.lm.state_dict(), policy.heads.state_dict())
    named = gathered.lm | {f"heads.{name}": x for name, x in gathered.heads.items()}
    return {name: x.detach().clone() for name, x in named.items()}


SPOILT: dict[str, Callable[[Tensor], Tensor]] = {
    "with its gradient": lambda loss: loss * math.nan,
    "in its value alone": lambda loss: loss + math.inf,
}
"""What process 1 makes of its loss in one step."""


def held(learner: Learner) -> list[Tensor]:
    """The bits of this process's own part of weights, moments and counts of steps.

    Bits, for a last part is padded under ZeRO-3 by memory as it was, which may hold a NaN: unlike itself.
    """
    optimizer: Any = getattr(learner.optimizer, "optimizer", learner.optimizer)  # DeepSpeed's wraps ours
    tensors = [x for p, state in optimizer.state.items() for x in (p, *state.values())]
    tensors += [getattr(p, "ds_tensor", p) for p in learner.model.parameters()]  # under ZeRO not the optimizer's
    return [getattr(x, "_local_tensor", x).detach().flatten().view(torch.uint8).clone() for x in tensors]


def train_around(strategy: str, *, spoilt: bool) -> dict[str, Any]:
    """Two steps, and between them, if `spoilt`, one of a mini-batch for each way to spoil its loss on process 1."""
    options = [*METHODS["carft_both"], "rl.mini_batch_size=6", "rl.ppo_epochs=1"]
    config = quick_config(*OPTIONS, *options, f"distributed.strategy={strategy}")
    learner = build_learner(config, spread_out(load_model(config, "synthetic", CPU, heads=True)), config.rl, CPU)

    def step(number: int, minis: slice) -> tuple[Update, list[int]]:
        case = random_case(number, "mixed")
        p = look_at(config, case, learner)
        plan, correct = [p.plan[0][minis]], [grade.correct for grade in case.grades]
        update = p.step.update(p.experience._replace(plan=plan), p.advantages, correct, 1e-3)
        return update, sorted(i for mini in plan[0] for i in mini.rows)

    found: dict[str, Any] = {"fine": step(0, slice(None))[0].metrics, "held": [held(learner)]}
    for name, spoil in SPOILT.items() if spoilt else ():
        original = PackedPasses.loss

        def loss(*arguments: Any, spoil: Any = spoil, original: Any = original, **named: Any) -> Loss:
            result = original(*arguments, **named)
            return result._replace(loss=spoil(result.loss)) if dist.get_rank() == 1 else result

        with mock.patch.object(PackedPasses, "loss", loss):
            update, rows = step(1, slice(1, None))
        found[name] = {"metrics": update.metrics, "skipped_rows": update.skipped_rows, "rows": rows}
        found["held"].append(held(learner))
    last = step(2, slice(None))[0].metrics
    return found | {"last": last, "end": whole_weights(learner.model)}


COLLAPSING = [
    *("sft.eps=1e-5", "rl.eps=1e-5", "rl.lr_schedule=constant", "rl.max_steps=5", "rl.eval_every=3"),
    *("guard.action=rollback", "guard.window=2", "guard.entropy_max=1e-3"),
]
"""To the guard every second step is a collapse."""


def go_back(strategy: str) -> dict[str, Any]:
    """An RL stage whose evaluation is good at step 3: from step 2 back to the start, from step 4 back to step 3."""
    config = load_config(str(QUICKSTART_CONFIG), [*TINY_RUN, *COLLAPSING, f"distributed.strategy={strategy}"])
    guard, calls, after = StageLoop.guard_against_collapse, itertools.count(), []

    def accurate(*arguments: Any) -> Any:
        result = evaluate(*arguments)
        return dataclasses.replace(result, metrics=result.metrics | {"accuracy": float(next(calls) > 0)})

    def watched(loop: StageLoop) -> bool:
        went_back = guard(loop)
        if went_back:
            after.append(whole_state(loop.learner))
        return went_back

    folder = Path(on_main(tempfile.mkdtemp))
    with (
        mock.patch("carft_fast.training.run.evaluate", accurate),
        mock.patch.object(StageLoop, "guard_against_collapse", watched),
    ):
        prepared = prepare(config, folder, Console(), stages=("rl",))
        train_run(prepared, ("rl",), resume=False)
    records = [
        {key: value for key, value in r.items() if key not in ("seconds", "shares")} for r in prepared.metrics.records
    ]
    saved = on_main(lambda: saved_whole(folder / "checkpoints" / "rl-000003"))  # who removes the folder has read it
    on_main(lambda: shutil.rmtree(folder))
    return {"records": records, "after": after, "saved": saved}


def whole_state(learner: Learner) -> dict[str, Tensor]:
    """Weights and moments, as a sharded checkpoint names them."""
    found = {}
    for name, parameter in learner.model.named_parameters():
        found[f"model.{name}"] = parameter
        found |= {f"optimizer.{name}.{key}": x for key, x in learner.optimizer.state.get(parameter, {}).items()}
    return {name: getattr(x, "full_tensor", lambda x=x: x)().detach().clone() for name, x in found.items()}


def saved_whole(checkpoint: Path) -> dict[str, Tensor]:
    """The processes' rows of every tensor, end to end."""
    files = [load_file(path) for path in sorted(checkpoint.glob("sharded/*.safetensors"))]
    parts: dict[str, list[Tensor]] = {}
    for file in files:
        for name, part in file.items():
            parts.setdefault(name, []).append(part)
    return {name: torch.cat(found) if found[0].dim() else found[0] for name, found in parts.items()}


def works(group: str) -> dict[str, Callable[[str], Any]]:
    """What the processes of a group do."""
    found: dict[str, Callable[[str], Any]] = {s.name: functools.partial(train, s) for s in chosen(group)}
    if GROUPS[group][0] == 2:
        found |= {name: functools.partial(train_around, spoilt=name == "spoilt") for name in ("spoilt", "unspoilt")}
    if group == "fsdp2, 2 processes":
        found["go back"] = go_back
    return found


def _rank(rank: int, group: str, folder: str) -> None:
    size, strategy = GROUPS[group]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}  # DeepSpeed asks for them
    torch.set_num_threads(1)
    carft_fast.training.parallel.BUCKET = 50_000  # small models' gradients fill several, too
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    for name, work in works(group).items():
        torch.save(work(strategy), f"{folder}/{name}-{rank}.pt")
    leave()


def chosen(group: str) -> list[Setting]:
    full = group in ("ddp, 2 processes", "fsdp2, 2 processes")
    return [setting for setting in settings() if full or setting.name in BRIEF]


@functools.cache
def alone(name: str) -> Any:
    return train(next(setting for setting in settings() if setting.name == name), "auto")


@functools.cache
def together(group: str) -> dict[str, Any]:
    """By work: what each process found."""
    size, _ = GROUPS[group]
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (group, folder), size)
        return {name: [torch.load(Path(folder) / f"{name}-{rank}.pt") for rank in range(size)] for name in works(group)}


def in_group(group: str, *rest: str) -> Any:
    """Parameters of a test; two groups are with the quick ones."""
    quick = group in ("ddp, 2 processes", "fsdp2, 2 processes")
    return pytest.param(group, *rest, marks=() if quick else pytest.mark.long)


@pytest.mark.parametrize(
    ("group", "name"), [in_group(group, setting.name) for group in GROUPS for setting in chosen(group)]
)
def test_several_processes_train_like_one(group: str, name: str) -> None:
    expected_metrics, expected_weights = alone(name)
    for metrics, _ in together(group)[name]:
        for ours, expected in zip(metrics, expected_metrics, strict=True):
            assert ours.keys() == expected.keys()
            for key, value in expected.items():
                # where rollouts are dropped the update's micro-batches, and so the rounding, are not the look's; and a
                # cosine of vectors that are within 1e-5 is so absolutely, however small it is
                rounding = 1e-5 if key == "first_ratio_error" or key.startswith("grad_cosine") else 1e-6
                assert ours[key] == pytest.approx(value, rel=1e-5, abs=rounding), key
    _, weights = together(group)[name][0]
    assert weights.keys() == expected_weights.keys()
    for key, expected in expected_weights.items():
        torch.testing.assert_close(weights[key], expected, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("group", [in_group(group) for group, (size, _) in GROUPS.items() if size == 2])
def test_a_loss_that_is_not_finite_on_one_process_leaves_no_trace_on_any(group: str) -> None:
    for found, expected in zip(together(group)["spoilt"], together(group)["unspoilt"], strict=True):
        assert found["fine"]["skipped_updates"] == 0
        for name, before, after in zip(SPOILT, found["held"][:-1], found["held"][1:], strict=True):
            assert len(before) == len(after) > 10
            assert all(map(torch.equal, before, after)), name
            assert found[name]["metrics"]["skipped_updates"] == 1
            assert not math.isfinite(found[name]["metrics"]["loss"])
            assert found[name]["skipped_rows"] == found[name]["rows"]
            assert len(found[name]["rows"]) == 6
        assert found["last"] == expected["last"], "as if nothing had been"
        assert found["last"]["skipped_updates"] == 0
        assert found["end"].keys() == expected["end"].keys()
        assert all(found["end"][name].equal(expected["end"][name]) for name in expected["end"])


def test_a_rollback_gives_every_process_its_part_of_the_weights_it_goes_back_to() -> None:
    expected = go_back("auto")["records"]
    start = load_model(quick_config(), "synthetic", CPU, heads=True)
    for found in together("fsdp2, 2 processes")["go back"]:
        to_start, to_best = found["after"]
        assert_equal(to_start, {f"model.{name}": x for name, x in start.named_parameters()})
        assert_equal(to_best, found["saved"])
        assert any(name.endswith("exp_avg") for name in to_best)
        assert [(r["step"], r["to"][-9:]) for r in found["records"] if r["kind"] == "guard"] == [
            (2, "synthetic"),
            (4, "rl-000003"),
        ]
        assert [r["kind"] for r in found["records"]] == [r["kind"] for r in expected]
        for ours, theirs in zip(found["records"], expected, strict=True):
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                if isinstance(value, float):
                    assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
                elif key != "to":
                    assert ours[key] == value, key


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not found[name].equal(expected[name])] == []
