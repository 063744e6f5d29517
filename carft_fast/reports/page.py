"""One self-contained HTML page: tables that sort, charts as inline SVG, light and dark. The page fetches nothing."""

import html
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

NOT_MEASURED = "not measured"
SERIES = tuple(f"#0000a{i}" for i in range(1, 9))
"""Colours to draw with. Each is a placeholder for a colour of the page, which has a light and a dark one."""
INK, FAINT = "#0000b1", "#0000b2"
_VARIABLES = {color: f"var(--s{i})" for i, color in enumerate(SERIES, 1)} | {INK: "var(--ink)", FAINT: "var(--line)"}
Cell = str | float | int | bool | None | tuple[Any, str]

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1d2430; --soft: #5b6575; --line: #d8dde5; --panel: #f5f7fa;
  --s1: #1f5fd0; --s2: #c2410c; --s3: #0b7a53; --s4: #7e3bd0; --s5: #8a6100; --s6: #0b7285; --s7: #b3246f;
  --s8: #4a6b0a }
@media (prefers-color-scheme: dark) { :root { --page: #14181f; --ink: #e4e8ee; --soft: #9aa5b5; --line: #343c49;
  --panel: #1c222c; --s1: #7aa7ff; --s2: #ff9e64; --s3: #4fd1a0; --s4: #c79bff; --s5: #f2c14e; --s6: #5ed3e8;
  --s7: #ff8ac0; --s8: #b5d86a } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem } h2 { margin: 2.5rem 0 .5rem }
h3 { margin: 1.5rem 0 .3rem }
a { color: var(--s1) } p, li { max-width: 46rem } nav a { margin-right: .9rem } .soft { color: var(--soft) }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin: .6rem 0 }
table { border-collapse: collapse; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .65rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line);
  overflow-wrap: normal }
thead th { border-top: 0; background: var(--panel); padding: 0; white-space: nowrap }
th button { all: unset; cursor: pointer; padding: .4rem .65rem; font-weight: 600 }
th button:focus-visible { outline: 2px solid var(--s1); outline-offset: -2px }
th button::after { content: " \\2195"; opacity: .35 }
th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1 }
th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1 }
.number { text-align: right } td.number { white-space: nowrap }
td.missing { color: var(--soft); font-style: italic; white-space: nowrap }
.charts { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)) }
figure { margin: 0; padding: .6rem; background: var(--panel); border-radius: 6px; min-width: 0 }
figcaption { font-size: .87rem } svg { width: 100%; height: auto; display: block }
svg text { font-family: inherit !important }
blockquote, pre { margin: .5rem 0; padding: .6rem .9rem; background: var(--panel); border-radius: 6px;
  white-space: pre-wrap }
input[type=search] { font: inherit; width: min(100%, 22rem); padding: .3rem .6rem; color: inherit;
  background: var(--page); border: 1px solid var(--line); border-radius: 6px } summary { cursor: pointer }
"""

_SCRIPT = """
const key = cell => {
  const value = Number(cell.dataset.sort ?? parseFloat(cell.textContent.replaceAll(",", "")));
  return Number.isNaN(value) ? cell.textContent : value;
};
const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.querySelectorAll("thead th")], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    const missing = row => row.cells[column].classList.contains("missing");
    body.append(...[...body.rows].sort((a, b) => missing(a) - missing(b)
      || (missing(a) ? 0 : sign * compare(key(a.cells[column]), key(b.cells[column])))));
  }));
}
for (const field of document.querySelectorAll("input[type=search]"))
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\\s+/);
    for (const row of document.getElementById(field.dataset.table).tBodies[0].rows)
      row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  });
"""


def page(title: str, lead: str, sections: Mapping[str, Iterable[str]]) -> str:
    """The document. `sections`: heading -> blocks of HTML. `title` and headings are text, `lead` is HTML."""
    anchors = {heading: re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") for heading in sections}
    links = " ".join(f'<a href="#{anchor}">{text(heading)}</a>' for heading, anchor in anchors.items())
    body = "\n".join(
        f'<section id="{anchors[heading]}"><h2>{text(heading)}</h2>\n' + "\n".join(blocks) + "\n</section>"
        for heading, blocks in sections.items()
    )
    # the policy makes a browser refuse whatever is not in the page
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,"><style>{_STYLE}</style></head>
<body><header><h1>{text(title)}</h1>{lead}<nav>{links}</nav></header>
<main>{body}</main><script>{_SCRIPT}</script></body></html>
"""


def text(value: Any) -> str:
    return html.escape(str(value))


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
