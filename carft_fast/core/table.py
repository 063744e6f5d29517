"""Tables of texts that nobody checked."""

import re
from typing import Any

import rich.table
from rich.text import Text

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """A text whose control characters are written out (`\\x1b`): on a terminal those of data and models would act.

    So are halves of surrogate pairs, which no file takes. Tabs and ends of lines stay.
    """
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


class Table(rich.table.Table):
    """Shows its texts as they are, on any console: in those of data and models `[/INST]` and `:b:` are no markup."""

    def __init__(self, *headers: str, title: str) -> None:
        super().__init__(*headers, title=Text(visible(title), style="table.title"))

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(Text(visible(cell)) if isinstance(cell, str) else cell for cell in cells), **options)
