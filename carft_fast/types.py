"""The plain records that travel through a training step."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One question with its annotated chain of thought.

    `cot` is empty where the source has none (test sets); `answer` is the target as the source wrote it, already
    checked to be gradable by the run's reward rule (any text where the rule is a user's function).
    """

    item_id: str
    question: str
    cot: str
    answer: str
