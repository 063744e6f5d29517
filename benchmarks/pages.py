"""Parts of Markdown pages that commands write, each between two lines that are comments."""


def with_part(page: str, begin: str, end: str, part: str, name: str) -> str:
    """The page with `part` between the lines `begin` and `end`. Exits, naming the page, where they are not there."""
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{name}: the lines {begin!r} and {end!r} have to be there, in this order")
    return f"{before}{begin}\n{part}\n{end}{after}"
