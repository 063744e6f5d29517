"""The statistics of a comparison, from metrics records to a summary per method. Pure; see docs/compare.md."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from carft_fast.reports import PHASES
from carft_fast.training import wilson_interval

TRAINING_PHASES = tuple(phase for phase in PHASES if phase not in ("load", "evaluate", "checkpoint"))
EVALUATED = ("step", "correct", "rows", "extractable", "completion_length")
"""What an evaluation takes from its record as it is."""
TRAINING_MEANS = ("reward", "kl", "entropy")
"""Training metrics of which an evaluation has the mean over the steps since the evaluation before."""
SFT, SFT_TIME = "sft", "sft_time"
"""Continued SFT over as many rows as RL has rollouts, and for as long as the fastest RL run takes."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation of a run, and what the run had cost until then."""

    step: int
    samples: int
    """Rollouts, or annotated rows, trained on so far."""
    seconds: float
    """Training seconds so far: every phase but loading, evaluating and saving."""
    correct: int
    rows: int
    extractable: float
    completion_length: float
    reward: float | None = None
    kl: float | None = None
    entropy: float | None = None

    @property
    def accuracy(self) -> float:
        return self.correct / self.rows


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One run of a comparison: a method, or a variant of one, from one seed's checkpoint."""

    label: str
    method: str
    seed: int
    evaluations: Sequence[Evaluation]

    @property
    def final(self) -> Evaluation:
        return self.evaluations[-1]

    @property
    def best(self) -> float:
        """Best accuracy, the start included."""
        return max(e.accuracy for e in self.evaluations)

    @property
    def worst_drop(self) -> float:
        """Best accuracy minus the lowest accuracy after it (0 when nothing is lower)."""
        accuracies = [e.accuracy for e in self.evaluations]
        return self.best - min(accuracies[accuracies.index(self.best) :])

    @property
    def collapse(self) -> Evaluation | None:
        """Where the run fell for good: the first of the evaluations at its end that are all below half of its best
        accuracy, or of its share of extractable answers at the start. None where the last one is not."""
        found = None
        for e in reversed(self.evaluations):
            if e.accuracy >= self.best / 2 and e.extractable >= self.evaluations[0].extractable / 2:
                break
            found = e
        return found

    @property
    def collapsed(self) -> bool:
        return self.collapse is not None

    def at_samples(self, samples: int) -> Evaluation:
        """The last evaluation at which at most `samples` had been trained on."""
        return [e for e in self.evaluations if e.samples <= samples][-1]

    def at_seconds(self, seconds: float) -> Evaluation:
        """The last evaluation before `seconds` of training had passed."""
        return [e for e in self.evaluations if e.seconds <= seconds][-1]

    def first_reaching(self, accuracy: float) -> Evaluation | None:
        return next((e for e in self.evaluations if e.accuracy >= accuracy), None)


def trajectory(
    records: Iterable[dict[str, Any]], *, label: str, method: str, seed: int, samples_per_step: int
) -> Trajectory:
    """From the records of a run with one stage, in the order of metrics.jsonl."""
    seconds, evaluations = 0.0, []
    trained: dict[str, list[float]] = defaultdict(list)  # since the last evaluation
    for record in records:
        seconds += sum(value for phase, value in record["seconds"].items() if phase in TRAINING_PHASES)
        if record["kind"] == "train":
            for name in TRAINING_MEANS:
                if name in record:
                    trained[name].append(record[name])
        elif record["kind"] == "eval":
            values = {name: record[name] for name in EVALUATED}
            values |= {name: statistics.fmean(found) for name, found in trained.items()}
            samples = record["step"] * samples_per_step
            evaluations.append(Evaluation(samples=samples, seconds=seconds, **values))
            trained.clear()
    return Trajectory(label, method, seed, evaluations)


class Spread(NamedTuple):
    """Over seeds. `sd` is the sample standard deviation (divided by n - 1), absent for one seed."""

    mean: float
    sd: float | None
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), sd, min(values), max(values))


class Accuracy(NamedTuple):
    """Accuracy of one method at some point of its runs: spread over seeds, interval of the pooled rows."""

    spread: Spread
    ci95: tuple[float, float]

    @classmethod
    def of(cls, evaluations: Sequence[Evaluation]) -> "Accuracy":
        correct, rows = sum(e.correct for e in evaluations), sum(e.rows for e in evaluations)
        return cls(Spread.of([e.accuracy for e in evaluations]), wilson_interval(correct, rows))


class Limits(NamedTuple):
    """Of one seed: where all methods are compared."""

    samples: int
    """The fewest samples that a method was trained on, continued SFT for equal time left out."""
    seconds: float
    """Training seconds of the fastest RL run; of the fastest run where there is no RL."""
    target: float | None
    """Best accuracy of continued SFT."""


def limits(runs: Sequence[Trajectory]) -> Limits:
    reinforced = [t for t in runs if t.method not in (SFT, SFT_TIME)]
    counted = [t for t in runs if t.method != SFT_TIME] or runs
    continued = [t for t in runs if t.method == SFT] or [t for t in runs if t.method == SFT_TIME]
    return Limits(
        samples=min(t.final.samples for t in counted),
        seconds=min(t.final.seconds for t in reinforced or runs),
        target=max((t.best for t in continued), default=None),
    )


class MethodSummary:
    """One method (or variant) over its seeds. Each seed's run is compared at the limits of its own seed."""

    def __init__(self, runs: Sequence[Trajectory], limits_of: Mapping[int, Limits]) -> None:
        finals = [t.final for t in runs]
        total_seconds = sum(e.seconds for e in finals)
        targets = [(t, limits_of[t.seed].target) for t in runs]
        reached = [e for t, target in targets if target is not None and (e := t.first_reaching(target))]
        # continued SFT for equal time was cut to that time as predicted, so its end counts
        at_equal_time = [t.final if t.method == SFT_TIME else t.at_seconds(limits_of[t.seed].seconds) for t in runs]

        self.label, self.method, self.seeds = runs[0].label, runs[0].method, len(runs)
        self.samples = statistics.fmean(e.samples for e in finals)
        self.seconds = Spread.of([e.seconds for e in finals])
        self.samples_per_second = sum(e.samples for e in finals) / total_seconds if total_seconds else math.nan
        self.final = Accuracy.of(finals)
        self.equal_samples = Accuracy.of([t.at_samples(limits_of[t.seed].samples) for t in runs])
        self.equal_time = Accuracy.of(at_equal_time)
        self.best = Spread.of([t.best for t in runs])
        self.worst_drop = max(t.worst_drop for t in runs)
        self.collapsed = sum(t.collapsed for t in runs)
        """Seeds whose run collapsed."""
        self.samples_to_collapse = _mean(t.collapse.samples for t in runs if t.collapse)
        self.extractable = statistics.fmean(e.extractable for e in finals)
        self.completion_length = statistics.fmean(e.completion_length for e in finals)
        self.reward, self.kl, self.entropy = (_mean(getattr(e, name) for e in finals) for name in TRAINING_MEANS)
        self.reached = None if any(target is None for _, target in targets) else len(reached)
        """Seeds in which the accuracy of continued SFT was reached; None without continued SFT."""
        self.samples_to_reach = _mean(e.samples for e in reached)
        self.seconds_to_reach = _mean(e.seconds for e in reached)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def summarise(runs: Sequence[Trajectory]) -> list[MethodSummary]:
    """One summary per label, in the order of their first appearance."""
    limits_of = {seed: limits([t for t in runs if t.seed == seed]) for seed in {t.seed for t in runs}}
    labels = dict.fromkeys(t.label for t in runs)
    return [MethodSummary([t for t in runs if t.label == label], limits_of) for label in labels]


class Paired(NamedTuple):
    """One arm against a reference, seed by seed: the mean difference and its 95% t interval."""

    label: str
    seeds: int
    mean: float
    low: float
    high: float
    p: float
    """Of the paired t test, two sides."""
    adjusted_p: float
    """After Holm's correction for all arms that are held against this reference (Holm 1979)."""
    detectable: float
    """The difference that so many seeds with this spread find with 80% power, at 5%."""


def paired_differences(values: Mapping[str, Mapping[int, float]], reference: str) -> list[Paired]:
    """Every other arm minus `reference`. `values`: arm -> seed -> value, the same two or more seeds for all."""
    seeds = list(values[reference])
    found: list[Paired] = []
    for label, of_seed in values.items():
        if label == reference:
            continue
        differences = [of_seed[seed] - values[reference][seed] for seed in seeds]
        mean, degrees = statistics.fmean(differences), len(seeds) - 1
        error = statistics.stdev(differences) / math.sqrt(len(seeds))
        half = t_quantile(0.975, degrees) * error
        p = 2 * (1 - t_cdf(abs(mean) / error, degrees)) if error else float(mean == 0)
        detectable = half + t_quantile(0.8, degrees) * error
        found.append(Paired(label, len(seeds), mean, mean - half, mean + half, p, p, detectable))
    largest, adjusted = 0.0, {}
    for rank, pair in enumerate(sorted(found, key=lambda pair: pair.p)):
        largest = max(largest, min(1.0, (len(found) - rank) * pair.p))
        adjusted[pair.label] = largest
    return [pair._replace(adjusted_p=adjusted[pair.label]) for pair in found]


def t_cdf(t: float, degrees: int) -> float:
    """Student's distribution: the probability of at most `t` >= 0."""
    from mpmath import betainc

    return 1 - float(betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True)) / 2


def t_quantile(probability: float, degrees: int) -> float:
    """The inverse of `t_cdf`, for a probability of at least a half."""
    low, high = 0.0, 1.0
    while t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, degrees) < probability else (low, middle)
    return high


class Judgement(NamedTuple):
    """How the arms of a study are judged."""

    references: Sequence[str]
    """Arms that all others are held against, seed by seed."""
    reach: float
    """An accuracy: how many samples does it take?"""


class Outcome(NamedTuple):
    name: str
    unit: str
    values: Mapping[str, Mapping[int, float]]
    """Arm -> seed -> value."""
    differences: Mapping[str, Sequence[Paired]]
    """Reference -> every other arm against it; empty with one seed."""


def outcomes(runs: Sequence[Trajectory], judgement: Judgement) -> list[Outcome]:
    """Of runs of the same arms with each seed: accuracy at equal samples, samples to an accuracy, and, where a run
    collapsed, samples until then.

    A run that never gets there counts with all the samples that are compared.
    """
    arms, seeds = list(dict.fromkeys(t.label for t in runs)), list(dict.fromkeys(t.seed for t in runs))
    accuracy: dict[str, dict[int, float]] = {arm: {} for arm in arms}
    samples: dict[str, dict[int, float]] = {arm: {} for arm in arms}
    stood: dict[str, dict[int, float]] = {arm: {} for arm in arms}
    for seed in seeds:
        of_seed = [t for t in runs if t.seed == seed]
        most = limits(of_seed).samples
        for run in of_seed:
            first = run.first_reaching(judgement.reach)
            accuracy[run.label][seed] = 100 * run.at_samples(most).accuracy
            samples[run.label][seed] = min(most, first.samples if first else most)
            stood[run.label][seed] = min(most, run.collapse.samples if run.collapse else most)

    def outcome(name: str, unit: str, values: dict[str, dict[int, float]]) -> Outcome:
        against = judgement.references if len(seeds) > 1 else ()
        return Outcome(name, unit, values, {reference: paired_differences(values, reference) for reference in against})

    found = [
        outcome("held-out accuracy at equal samples", "points", accuracy),
        outcome(f"samples to {judgement.reach:.0%} held-out accuracy", "samples", samples),
    ]
    if any(run.collapsed for run in runs):
        found.append(outcome("samples until collapse", "samples", stood))
    return found


def verdict(accuracies: dict[str, Accuracy]) -> str:
    """Which label has the best mean accuracy, and which cannot be told apart from it: overlapping 95% intervals."""
    best = max(accuracies, key=lambda label: accuracies[label].spread.mean)
    low, high = accuracies[best].ci95
    alike = [label for label, found in accuracies.items() if found.ci95[1] >= low and found.ci95[0] <= high]
    apart = [label for label in accuracies if label not in alike]
    alike.remove(best)
    sentences = [f"Highest mean: {best}, {accuracies[best].spread.mean:.1%}."]
    if alike:
        sentences.append(f"It cannot be told apart from {_listed(alike)}: the intervals overlap.")
    if apart:
        sentences.append(f"The intervals of {_listed(apart)} lie below its own.")
    return " ".join(sentences)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
