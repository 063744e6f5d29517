"""Drafts: completions that may come again, whose tokens a forward checks several at a time.

A question is sampled every epoch, and has an annotated CoT. What was sampled last and the annotation are guesses of the
next completion that cost nothing. A guess stands only where it is the token that would be sampled anyway (coupled.py),
so drafts change how many forwards a completion takes, and never the completion.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from carft_fast.rollout.base import Prompts, Rollout

LONGEST = 8
"""Most tokens guessed at once, and most that a match is measured over."""
_KEPT = 2
_CAPACITY_TOKENS = 2**24
"""64 MiB of completions and prompts."""


def find_draft(drafts: Sequence[Sequence[int]], completion: Sequence[int], most: int, least: int = 1) -> Sequence[int]:
    """What follows in a draft on the longest suffix of `completion`; at most as long as that suffix, and `most`.

    Nothing where that suffix is shorter than `least`. What follows the whole completion, where it begins the draft, is
    as long as `most`. Of equally long suffixes the nearest to the same position is taken, then the one in the first
    draft.
    """
    size, last = len(completion), completion[-1]
    best: tuple[int, int] | None = None
    found: Sequence[int] = ()
    for draft in drafts:
        end = 0
        while True:
            try:
                end = draft.index(last, end, len(draft) - 1) + 1
            except ValueError:
                break
            reach = min(LONGEST, size, end)
            match = 1
            while match < reach and draft[end - 1 - match] == completion[size - 1 - match]:
                match += 1
            rank = (match, -abs(end - size))
            whole = match == size == end
            if match >= least and (best is None or rank > best):
                best, found = rank, draft[end : end + (most if whole else min(match, most))]
    return found


class Usefulness:
    """Of late, how many tokens were guessed and how many of them stood; the last forwards count most.

    A policy that is sure of nothing repeats single tokens by chance, and nothing that follows on them.
    """

    _MEMORY, _ENOUGH, _LEAST_SHARE = 0.98, 16, 0.1

    def __init__(self) -> None:
        self._guessed = self._stood = 0.0

    def add(self, guessed: int, stood: int) -> None:
        """Of one forward."""
        self._guessed = self._MEMORY * self._guessed + guessed
        self._stood = self._MEMORY * self._stood + stood

    @property
    def shortest_match(self) -> int:
        """Tokens of a suffix that is worth a guess: one, or four while fewer than one guess in ten stands."""
        return 4 if self._guessed > self._ENOUGH and self._stood < self._LEAST_SHARE * self._guessed else 1


class LastCompletions:
    """The last two completions of each question. A cache: not in checkpoints; a resumed run fills it again.

    Holds at most 2^24 tokens; the questions that were sampled longest ago go first.
    """

    def __init__(self, capacity: int = _CAPACITY_TOKENS) -> None:
        self._capacity, self._tokens = capacity, 0
        self._kept: OrderedDict[bytes, list[array[int]]] = OrderedDict()

    def of(self, prompt: Sequence[int]) -> list[list[int]]:
        """Newest first."""
        return [list(completion) for completion in self._kept.get(_key(prompt), ())]

    def add(self, prompts: Prompts, rollouts: Sequence[Rollout]) -> None:
        """The completions of these prompts, as many of each as there are, in the order of the prompts."""
        samples = len(rollouts) // max(1, len(prompts))
        for index, prompt in enumerate(prompts):
            key = _key(prompt)
            before = self._kept.pop(key, [])
            new = [array("i", r.completion_ids) for r in rollouts[samples * index : samples * (index + 1)]]
            self._kept[key] = [*reversed(new), *before][:_KEPT]
            self._tokens += self._size(key) - (len(key) // 4 + sum(map(len, before)) if before else 0)
        while self._tokens > self._capacity:
            self._tokens -= self._size(next(iter(self._kept)))
            self._kept.popitem(last=False)

    def _size(self, key: bytes) -> int:
        return len(key) // 4 + sum(map(len, self._kept[key]))


def _key(prompt: Sequence[int]) -> bytes:
    return array("i", prompt).tobytes()
