"""One record per step: phase timers, metrics.jsonl.

A record holds only what `METRICS` names. scripts/metric_table.py writes the tables of docs/runs.md from `METRICS` and
`PHASES`.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carft_fast.core import InputError, read_json_lines, write_text, writing

if TYPE_CHECKING:
    import torch

    from carft_fast.reports.trackers import Trackers

METRICS: dict[str, str] = {
    "loss": "total loss, mean over the optimizer steps (SFT: nats per token; RL: no unit)",
    "policy_loss": "clipped policy loss with its KL term, divided as rl.loss_mean says (no unit)",
    "value_loss": "clipped value loss, before rl.value_coef (score squared)",
    "contrastive_loss": "loss of the signals of contrastive.mode, before contrastive.coef (nats);"
    " 0 where it concerns no rollout; absent without the term",
    "cosine": "mean cos(z_1, z_2) of the embeddings of annotated and sampled CoT, with the weights that sampled"
    " (-1 to 1); absent where neither loss nor reward reads it",
    "cosine_correct": "the same over correct rollouts alone (-1 to 1); absent where none is correct",
    "reward": "mean terminal score of the rollouts, without the KL penalty (0 to reward.correct_score;"
    " with reward.fn as the function scores)",
    "reward/<label>": "mean score of each function of a list in reward.fn, before its weight (as the function scores)",
    "train_accuracy": "share of rollouts whose answer is correct (0 to 1)",
    "extractable": "share of rollouts with an answer that can be read (0 to 1)",
    "kl": "mean over completion tokens of old log-prob minus reference log-prob (nats per token); the old log-probs"
    " are the policy's before the step; absent without a reference",
    "entropy": "mean entropy of the policy over the completion tokens with a weight in the loss (nats per token)",
    "approx_kl": "mean over the same tokens of (ratio - 1) - log ratio between updated and old policy (nats per token)",
    "clip_fraction": "share of the same tokens whose policy ratio is outside the clip range (0 to 1)",
    "value_clip_fraction": "share of completion tokens whose new value is clipped (0 to 1)",
    "explained_variance": "1 - var(return - value) / var(return) over completion tokens (at most 1);"
    " absent without a value head",
    "advantage_mean": "mean advantage over completion tokens, before whitening (score;"
    ' rl.estimator = "grpo": standard deviations)',
    "advantage_std": "its standard deviation (as advantage_mean)",
    "first_ratio_error": "largest absolute value of ratio - 1 in the step's first mini-batch, before any update"
    " (no unit; 0 when exact)",
    "sampler_diff_mean": "mean over tokens of the absolute difference of sampled and old log-prob, on the sampler's"
    " support (nats). This and the next three are over the first mini-batch where old log-probs are not recomputed",
    "sampler_diff_max": "largest such difference (nats)",
    "sampler_diff_material": "share of tokens where it is above 1e-2 nats (0 to 1)",
    "sampler_ess": "effective sample size of the importance weights w = exp(old log-prob - sampled log-prob), as a"
    " share of the tokens: (sum w)^2 / (tokens sum w^2) (0 to 1; 1 when all weights are equal)",
    "sequence_masked": "share of completions that rollout.sequence_mask leaves out (0 to 1); absent where it is off",
    "staleness": "weight updates between sampling and training, of the oldest rollout (updates; 0 is on-policy)",
    "tokens_per_forward": "completion tokens divided by the sampler's forwards for their sequences (tokens;"
    " 1 without accepted drafts). This and the next two: vLLM engines with rollout.drafts",
    "draft_accepted": "share of the drafted tokens that were sampled (0 to 1); absent where none was drafted",
    "draft_wasted": "drafted tokens that were not sampled, divided by completion tokens (no unit)",
    "completion_length": "mean completion length, EOS included (tokens)",
    "prefix_length": "mean length of the prefixes of rollout.prefix, which completion_length does not count (tokens)",
    "truncated": "share of completions cut at the length limit (0 to 1)",
    "completion_tokens": "completion tokens trained on in this step, each counted once (tokens)",
    "grad_norm": "global gradient norm before clipping, mean over the optimizer steps (no unit)",
    "grad_norm_policy": "norm of the language model's gradient from the policy term alone, before clipping, in the"
    " step's first mini-batch (no unit). This and the next six: with rl.gradient_terms",
    "grad_norm_value": "the same of the value term, rl.value_coef included (no unit)",
    "grad_norm_kl": "the same of the KL term in the loss, rl.kl_loss_coef included (no unit)",
    "grad_norm_contrastive": "the same of the contrastive term, contrastive.coef included (no unit)",
    "grad_cosine_value": "cosine of the value term's gradient with the policy term's (-1 to 1);"
    " absent where one of them is 0",
    "grad_cosine_kl": "the same of the KL term (-1 to 1)",
    "grad_cosine_contrastive": "the same of the contrastive term (-1 to 1)",
    "skipped_updates": "optimizer steps that were left out because loss or gradient was not finite (optimizer steps)",
    "lr": "learning rate of the step (no unit)",
    "accuracy": "share of evaluation rows whose greedy answer is correct (0 to 1)",
    "eval_loss": "cross-entropy of the held-out annotations, divided by the number of their completion tokens"
    " (nats per token); SFT with sft.eval_loss",
    "correct": "evaluation rows answered correctly (rows)",
    "rows": "evaluation rows (rows)",
    "accuracy_ci95": "Wilson 95% interval of accuracy, [low, high] (0 to 1)",
    "action": 'what the collapse guard did: "stop" or "rollback"',
    "cause": "why the guard did it: the figure, its value and the bound",
    "to": "the checkpoint that a rollback took weights and optimizer from",
    "step_by_step": "share of evaluation answers with more than one equation (0 to 1)",
}
_OF_FUNCTION = "reward/"
PHASES: dict[str, str] = {
    "load": "reading model, reference and data",
    "rollout": "sampling completions",
    "reward": "extracting and grading answers",
    "forward": "old log-probs, values, reference and annotated-CoT forwards, advantages",
    "update": "PPO epochs: forward, backward, clip, optimizer step",
    "sync": "weights to the sampler",
    "train": "SFT forward, backward, optimizer step",
    "evaluate": "greedy evaluation",
    "checkpoint": "writing checkpoints",
}

BETWEEN_STEPS = ("load", "evaluate", "checkpoint")
"""Phases that are no part of a step, though the record of the step after them has their seconds."""

_REQUIRED = {"stage": str, "kind": str, "step": int, "seconds": dict}
"""What every record has."""


def meaning(name: str) -> str | None:
    """What a record's value is, with its unit; None for what no record has."""
    return METRICS.get(f"{_OF_FUNCTION}<label>" if name.startswith(_OF_FUNCTION) else name)


class PhaseTimer:
    """Seconds per phase since the last `flush`.

    On a CPU wall time. On CUDA a phase ends when the device has done what it was asked until then, and begins when it
    has done what it was asked before: phases that follow each other add up to the wall time. So a phase of the host
    alone counts from when the device is idle. Nothing waits but `flush`.
    """

    def __init__(self, device: "torch.device") -> None:
        self._on_cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        assert phase in PHASES, phase
        start = self._border()
        try:
            yield
        finally:
            self._spans.append((phase, start, self._border()))

    def _border(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def flush(self) -> dict[str, float]:
        """On CUDA the host waits for the end of the newest phase."""
        spans, self._spans = self._spans, []
        if self._on_cuda and spans:
            spans[-1][2].synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for phase, start, end in spans:
            seconds[phase] += start.elapsed_time(end) / 1e3 if self._on_cuda else end - start
        return dict(seconds)


def shares_of_step(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each phase's share of a step's seconds, those of `BETWEEN_STEPS` not counted: they sum to 1."""
    of_step = {phase: value for phase, value in seconds.items() if phase not in BETWEEN_STEPS}
    total = sum(of_step.values())
    return {phase: round(value / total, 4) for phase, value in of_step.items()} if total else {}


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that is incomplete is left out. Raises InputError, with the line."""
    records = read_json_lines(path)
    for number, record in enumerate(records, 1):
        for name, kind in _REQUIRED.items():
            if type(found := record.get(name)) is not kind:
                raise InputError(f"{path}, line {number}: {name} = {found!r}: expected a {kind.__name__}")
    return records


class MetricsLog:
    """metrics.jsonl of one run. Records: stage, kind (train, eval or guard), step (done), values."""

    def __init__(self, folder: Path, *, write: bool = True, trackers: "Trackers | None" = None) -> None:
        """`write` False: keep `records` and write nothing. `trackers` get every record that is written."""
        self._write = write
        self._path = folder / "metrics.jsonl"
        self._trackers = trackers
        self.records: list[dict[str, Any]] = []

    def load(self) -> None:
        """Read what another process logged. Its last line may be incomplete and is left out then."""
        if self._path.exists():
            self.records = read_records(self._path)

    def rewind(self, stage: str, step: int) -> None:
        """Remove what this stage logged after `step`: those steps run again.

        Records of SFT come first, also where SFT is repeated after RL because its model was damaged.
        """
        kept = [r for r in self.records if r["stage"] != stage or r["step"] <= step]
        self.records = sorted(kept, key=lambda r: r["stage"] != "sft")
        if self._write:
            write_text(self._path, "".join(json.dumps(r) + "\n" for r in self.records))

    def log(
        self, stage: str, kind: str, step: int, values: Mapping[str, Any], seconds: Mapping[str, float]
    ) -> dict[str, Any]:
        unknown = {name for name in values if meaning(name) is None}
        assert not unknown, f"undocumented metrics: {sorted(unknown)}"
        record = {"stage": stage, "kind": kind, "step": step, **values}
        record["seconds"] = {phase: round(value, 4) for phase, value in seconds.items()}
        if kind == "train":
            record["shares"] = shares_of_step(seconds)
        self.records.append(record)
        if not self._write:
            return record
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._trackers is not None:
            self._trackers.log_record(record)
        return record

    def find(self, stage: str, kind: str, step: int | None = None) -> list[dict[str, Any]]:
        return [r for r in self.records if r["stage"] == stage and r["kind"] == kind and step in (None, r["step"])]

    def seconds_by_phase(self) -> dict[str, float]:
        total = Counter[str]()
        for record in self.records:
            total.update(record["seconds"])
        return {phase: round(total[phase], 2) for phase in PHASES if phase in total}
