"""The plain records that travel through a training step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Example:
    """One question with its annotated chains of thought.

    `cots` is empty where the source has none (test sets); of several, every epoch uses another one. `answer` is the
    target as the source wrote it, already checked to be gradable by the run's reward rule (any text where the rule is a
    user's function). `extra` holds the other columns of its row, for a reward function to read. `history` are the
    messages before the question, each a role ("system", "user" or "assistant") and its text.
    """

    item_id: str
    question: str
    cots: tuple[str, ...]
    answer: str
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    history: tuple[tuple[str, str], ...] = ()
