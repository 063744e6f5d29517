"""What a rollout has in common with its annotated CoT."""

import math

import torch

from carft_fast.objective.annotated import mark_answers, mark_common
from carft_fast.objective.passes import Rows

CPU = torch.device("cpu")


def subsequence(short: list[int], long: list[int]) -> bool:
    rest = iter(long)
    return all(token in rest for token in short)


def test_common_parts_are_of_completions_and_as_long_as_can_be() -> None:
    """Prompts, alike for all, count for nothing; lengths against the textbook table."""
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[int]:
        n = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(0, 6, (n,), generator=generator).tolist()

    prompts = [[1, 2, 3, 4, 5]] * 9
    rollouts = Rows(prompts, [*(ids(1, 15) for _ in range(7)), [9], [1, 2]])
    annotated = Rows(prompts, [*(ids(1, 15) for _ in range(7)), [8, 7], [1, 2]])
    marked, marked_annotated = mark_common(rollouts, annotated, CPU)
    assert marked.parts is not None
    assert marked_annotated.parts is not None
    for x, y, parts, there in zip(
        rollouts.completions, annotated.completions, marked.parts, marked_annotated.parts, strict=True
    ):
        table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
        for i, j in ((i, j) for i in range(len(x)) for j in range(len(y))):
            table[i + 1][j + 1] = table[i][j] + 1 if x[i] == y[j] else max(table[i][j + 1], table[i + 1][j])
        whole, common, excluded = ([t for t, kept in zip(x, part, strict=True) if kept] for part in parts.tolist())
        assert whole == x
        assert len(common) == table[-1][-1] == math.fsum(there[1].tolist())
        assert common == [t for t, kept in zip(y, there[1].tolist(), strict=True) if kept]
        assert subsequence(common, x)
        assert len(common) + len(excluded) == len(x)
        assert there[0].all()
    assert not marked.parts[7][1].any()
    assert not marked.parts[8][2].any()


def test_the_token_before_an_answer_phrase_is_a_part_of_its_own() -> None:
    """A prefix counts as a part of the CoT; where either side has no phrase, or nothing before it, neither has one."""
    prompts = [[1, 2, 3, 4]] * 5
    rollouts = Rows(prompts, [[5, 6], [7], [8, 9, 5], [6], [5, 5]], prefix_lengths=[1, 2, 0, 0, 0])
    annotated = Rows(prompts, [[5, 6, 7], [5, 6], [7, 8], [9, 9], [7, 7]])
    answers = [(2, 1), (1, 1), (None, 1), (0, 1), (1, None)]
    marked, marked_annotated = mark_answers(rollouts, annotated, answers, CPU)
    for rows, before in ((marked, [[0, 1, 0], [1, 0, 0]]), (marked_annotated, [[1, 0, 0], [1, 0]])):
        assert rows.parts is not None
        assert all(part[0].all() for part in rows.parts)
        assert [part[1].int().tolist() for part in rows.parts[:2]] == before
        assert not any(part[1].any() for part in rows.parts[2:])
        assert [part.shape[1] for part in rows.parts] == list(map(len, rows.cots))
