"""The order that rows are drawn in."""

from carft_fast.core.seeds import chunks, epoch_rows


def test_every_epoch_visits_every_row_once() -> None:
    drawn = [pair for step in range(14) for pair in epoch_rows(7, 3, step, seed=1)]
    assert [epoch for _, epoch in drawn] == [k // 7 for k in range(42)]
    epochs = chunks([row for row, _ in drawn], 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert drawn != [pair for step in range(14) for pair in epoch_rows(7, 3, step, seed=2)]
