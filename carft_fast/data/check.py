"""What `carft-fast data check` looks for in a source, before a run is spent on it. Loads no model, nor torch itself."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from carft_fast.config import Config, RewardConfig
from carft_fast.core import Example, Table
from carft_fast.data.load import load_set
from carft_fast.data.prompts import PromptFormat, too_long
from carft_fast.rewards import Answer, Grader, parse_target

SHOWN = 3


@dataclass
class Finding:
    """How many rows have something, and the first of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: Example, text: str) -> None:
        self.count += 1
        if len(self.examples) < SHOWN:
            self.examples.append(f"{example.item_id}: {text[:80]}")


@dataclass(frozen=True, slots=True)
class Lengths:
    min: int
    median: int
    p95: int
    max: int

    @classmethod
    def of(cls, values: Iterable[int]) -> "Lengths | None":
        """Nearest-rank quantiles; None of nothing."""
        ranked = sorted(values)
        if not ranked:
            return None
        return cls(*(ranked[max(math.ceil(q * len(ranked)) - 1, 0)] for q in (0, 0.5, 0.95, 1)))


@dataclass
class Check:
    """Figures of one source; counts are of rows unless the name says annotations."""

    source: str
    against: str | None
    unit: str
    rows_read: int
    rows_used: int
    rows_merged: int
    annotations: int
    left_out: dict[str, Finding]
    lengths: dict[str, Lengths | None]
    limits: dict[str, int]
    not_annotated: Finding = field(default_factory=Finding)
    too_long: dict[str, Finding] = field(default_factory=dict)
    annotations_over_max_new_tokens: Finding | None = None
    annotations_with_an_answer: int = 0
    annotations_with_another_answer: Finding = field(default_factory=Finding)
    repeated_with_the_same_answer: Finding = field(default_factory=Finding)
    repeated_with_another_answer: Finding = field(default_factory=Finding)
    in_test_set: Finding | None = None
    prompt: str = ""
    """Of the first usable row; with a tokenizer as its tokens, special ones shown."""
    completion: str | None = None
    """Its first annotated completion; None where it has none."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> Table:
        """For a person to read; lengths first, then what is wrong with how many rows, and the first of them."""
        table = Table("", "", "first of them", title=f"{self.source}: {self.rows_used} of {self.rows_read} rows usable")

        def add(name: str, found: Finding | None) -> None:
            cells = ("not checked", "") if found is None else (f"{found.count:,}", "\n".join(found.examples))
            table.add_row(name, *cells)

        for name, lengths in self.lengths.items():
            if lengths is not None:
                text = f"{lengths.min} / {lengths.median} / {lengths.p95} / {lengths.max}"
                table.add_row(f"{name}, {self.unit}", text, "min / median / 95% / max")
        table.add_section()
        table.add_row("annotations", f"{self.annotations:,}", "")
        if self.rows_merged:
            table.add_row("rows merged into an earlier one", f"{self.rows_merged:,}", "")
        for reason, finding in self.left_out.items():
            add(f"left out: {reason}", finding)
        add("rows without annotation", self.not_annotated)
        if self.unit == "tokens":
            for reason, finding in self.too_long.items():
                add(f"left out: {reason}", finding)
            if not self.too_long:
                table.add_row(f"left out as too long for data.max_length = {self.limits['max_length']}", "0", "")
            name = f"annotations over rollout.max_new_tokens = {self.limits['max_new_tokens']}"
            add(f"{name} (a rollout as long is cut)", self.annotations_over_max_new_tokens)
        else:
            table.add_row("too long, or cut", "not checked", "limits are in tokens: set model.path")
        table.add_row("annotations that state an answer", f"{self.annotations_with_an_answer:,}", "")
        add("  another one than the target", self.annotations_with_another_answer)
        add("question again, same answer", self.repeated_with_the_same_answer)
        add("question again, another answer", self.repeated_with_another_answer)
        add(f"question also in {self.against or 'a test set (--against)'}", self.in_test_set)
        table.add_section()
        table.add_row("prompt of the first row", "", self.prompt)
        if self.completion is not None:
            table.add_row("its annotated completion", "", self.completion)
        return table


def check_data(path: str, config: Config, tokenizer: Any | None, against: str | None) -> Check:
    """Read a source as training would, all of it, and look at every row.

    Without a tokenizer lengths are in characters, which no limit can be held against. `against` is a test set whose
    questions should not be in `path`. Raises InputError for a source that cannot be read or has no usable row.
    """
    data = config.data
    examples, report = load_set(config, "train", path, all_rows=True)
    tested = load_set(config, "eval", against, all_rows=True)[0] if against else []

    form = PromptFormat.of(config, tokenizer, "carft" if tokenizer is None and data.template == "chat" else None)
    first = next((example for example in examples if not form.refused(example)), examples[0])
    completion: str | None = None
    if tokenizer is None:
        prompts = [len(text) for text in form.prompt_texts(examples)]
        completions = [[len(form.completion_text(cot, e.answer)) for cot in e.cots] for e in examples]
        shown = form.prompt_text(first)
        if first.cots:
            completion = form.completion_text(first.cots[0], first.answer)
    else:
        prompts = [len(form.text_ids(text)) for text in form.prompt_texts(examples)]
        completions = [[len(form.completion_ids(cot, e.answer)) for cot in e.cots] for e in examples]
        shown = form.shown(form.prompt_ids(first))
        if first.cots:
            completion = form.shown(form.completion_ids(first.cots[0], first.answer))
    totals = [n + m for n, row in zip(prompts, completions, strict=True) for m in row]
    check = Check(
        source=path,
        against=against,
        unit="tokens" if tokenizer is not None else "characters",
        rows_read=report.rows_read,
        rows_used=report.rows_used,
        rows_merged=report.rows_merged,
        annotations=len(totals),
        left_out={reason: Finding(count, report.examples[reason]) for reason, count in report.rejected.most_common()},
        lengths={
            "prompt": Lengths.of(prompts),
            "annotated completion": Lengths.of(n for row in completions for n in row),
            "prompt and completion": Lengths.of(totals),
        },
        limits={"max_length": data.max_length, "max_new_tokens": config.rollout.max_new_tokens},
        annotations_over_max_new_tokens=Finding() if tokenizer is not None else None,
        in_test_set=Finding() if against else None,
        prompt=shown,
        completion=completion,
    )
    known = {normalised(example.question) for example in tested}
    answers: dict[tuple[Any, str], list[Answer]] = {}
    with Grader(config.reward, answer_phrase=data.answer_phrase) as grader:
        for example, prompt, row in zip(examples, prompts, completions, strict=True):
            question = normalised(example.question)
            if not example.cots:
                check.not_annotated.add(example, example.question)
            if check.in_test_set is not None and question in known:
                check.in_test_set.add(example, example.question)
            if reason := form.refused(example):
                check.left_out.setdefault(reason, Finding()).add(example, example.question)
            _check_limits(check, example, prompt, row)
            earlier = answers.setdefault((example.history, question), [])
            _check_repetition(check, example, earlier, config.reward, grader)
        if not config.reward.fn:  # a function alone knows what an annotation answers
            _check_annotations(check, examples, config.reward, grader)
    return check


def normalised(question: str) -> str:
    """Questions that differ only in case and white space are one."""
    return " ".join(question.casefold().split())


def _check_limits(check: Check, example: Example, prompt: int, completions: Sequence[int]) -> None:
    over = check.annotations_over_max_new_tokens
    if over is None:  # lengths are in characters
        return
    longest, max_new_tokens = check.limits["max_length"], check.limits["max_new_tokens"]
    shortest = min(completions, default=0)
    if reason := too_long(prompt, shortest, max_length=longest, max_prompt_length=longest - max_new_tokens):
        check.too_long.setdefault(reason, Finding()).add(example, f"{prompt} + {shortest} tokens")
    for completion in completions:
        if completion > max_new_tokens:
            over.add(example, f"{completion} tokens")


def _check_repetition(
    check: Check, example: Example, earlier: list[Answer], rule: RewardConfig, grader: Grader
) -> None:
    """`earlier` has the answers of rows with the same question, and gets this row's."""
    target = example.answer if rule.fn else parse_target(example.answer, answer_type=rule.answer_type)
    if any(grader.same(target, other, rule.tolerance) for other in earlier):
        check.repeated_with_the_same_answer.add(example, example.question)
    elif earlier:
        check.repeated_with_another_answer.add(example, f"{target}, before {earlier[0]}: {example.question}")
    earlier.append(target)


def _check_annotations(check: Check, examples: Sequence[Example], rule: RewardConfig, grader: Grader) -> None:
    """Each annotation is graded like a completion."""
    annotated = [example for example in examples for _ in example.cots]
    grades = grader.grade_alone([cot for example in examples for cot in example.cots], annotated)
    for example, grade in zip(annotated, grades, strict=True):
        check.annotations_with_an_answer += grade.extractable
        if grade.extractable and not grade.correct:
            target = parse_target(example.answer, answer_type=rule.answer_type)
            check.annotations_with_another_answer.add(example, f"says {grade.extracted}, the target is {target}")
