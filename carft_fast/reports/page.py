"""One self-contained HTML page: tables that sort, charts as inline SVG, light and dark. The page fetches nothing."""

import html
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from carft_fast.core import visible

NOT_MEASURED = "not measured"
SERIES = tuple(f"#0000a{i}" for i in range(1, 9))
"""Colours to draw with. Each is a placeholder for a colour of the page, which has a light and a dark one."""
INK, FAINT = "#0000b1", "#0000b2"
_VARIABLES = {color: f"var(--s{i})" for i, color in enumerate(SERIES, 1)} | {INK: "var(--ink)", FAINT: "var(--line)"}
Cell = str | float | int | bool | None | tuple[Any, str]

_TEMPLATE = Path(__file__).with_name("page.html")


def page(title: str, lead: str, sections: Mapping[str, Iterable[str]]) -> str:
    """The document. `sections`: heading -> blocks of HTML. `title` and headings are text, `lead` is HTML."""
    anchors = {heading: re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") for heading in sections}
    links = " ".join(f'<a href="#{anchor}">{text(heading)}</a>' for heading, anchor in anchors.items())
    body = "\n".join(
        f'<section id="{anchors[heading]}"><h2>{text(heading)}</h2>\n' + "\n".join(blocks) + "\n</section>"
        for heading, blocks in sections.items()
    )
    # the template's policy makes a browser refuse whatever is not in the page
    template = Template(_TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=text(title), lead=lead, links=links, body=body)


def text(value: Any) -> str:
    return html.escape(visible(str(value)))


def paragraph(words: str) -> str:
    return f"<p>{text(words)}</p>"


def quote(words: str) -> str:
    return f"<blockquote>{text(words.strip())}</blockquote>"


def pre(words: str) -> str:
    return f"<pre>{text(words)}</pre>"


def number(value: float) -> str:
    """Four significant digits, whole from 1,000."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, search: str = "") -> str:
    """A table that sorts by any column. A cell is text, a number, (number to sort by, text), or None: not measured.

    `search` adds a search field; it is the table's name, unique on the page. ValueError for rows of unequal length.
    """
    rows = list(rows)
    heads = ""
    for name, *cells in zip(columns, *rows, strict=True):
        right = " class=number" if any(isinstance(cell, float | int | tuple) for cell in cells) else ""
        heads += f'<th scope="col"{right}><button type="button">{text(name)}</button></th>'
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    table_id = search_field = ""
    if search:
        name = text(search)
        table_id = f' id="{name}"'
        search_field = f'<input type="search" data-table="{name}" placeholder="Search" aria-label="Search {name}">'
    return (
        f'{search_field}<div class="scroll" tabindex="0"><table{table_id}>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: Cell) -> str:
    if value is None:
        return f'<td class="missing">{NOT_MEASURED}</td>'
    if isinstance(value, tuple):
        return f'<td class="number" data-sort="{value[0]}">{text(value[1])}</td>'
    if isinstance(value, str | bool):
        return f"<td>{text(value)}</td>"
    return f'<td class="number" data-sort="{value}">{number(value)}</td>'


def details(summary: str, *blocks: str) -> str:
    return f"<details><summary>{text(summary)}</summary>{''.join(blocks)}</details>"


def charts(*figures: str) -> str:
    return f'<div class="charts">{"".join(figures)}</div>'


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure, in inches, that belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def chart(title: str, draw: Callable[[Any], object], *, height: float = 2.8) -> str:
    """What `draw` draws on matplotlib axes, as SVG in the page's colours. Lines and fills take theirs from SERIES."""
    import matplotlib
    from cycler import cycler

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,  # ids of two charts of a page differ, those of one do not change
        "axes.prop_cycle": cycler(color=SERIES),
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9.0,
        "legend.frameon": False,
        "legend.fontsize": 8.0,
        "grid.color": FAINT,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK),
    }
    with matplotlib.rc_context(settings):
        figure = new_figure(4.6, height)
        draw(figure.subplots())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[0-9.]+pt"', "", svg)  # the picture's own: the page scales it
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{text(title)}"', 1)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return f"<figure><figcaption>{text(title)}</figcaption>{svg}</figure>"
