"""The parts that every page is made of."""

import re
from typing import Any

from carft_fast.reports import page as html_report


def test_a_chart_is_of_the_pages_colours_and_the_same_every_time() -> None:
    def draw(axes: Any) -> None:
        axes.plot([1, 2], [3, 4])

    first, again, other = (html_report.chart(title, draw) for title in ("a", "a", "b"))
    assert first == again
    ids = [set(re.findall(r' id="([mp][0-9a-f]{6,})"', svg)) for svg in (first, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    colours = set(re.findall(r"#[0-9a-f]{6}", first))
    assert colours == set(), "a colour of its own is the same in light and dark"
    assert {"var(--s1)", "var(--ink)", "var(--line)"} <= set(re.findall(r"var\(--\w+\)", first))
