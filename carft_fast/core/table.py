"""Tables of texts that nobody checked."""

from typing import Any

import rich.table
from rich.text import Text

from carft_fast.core.text import visible


class Table(rich.table.Table):
    """Shows its texts as they are, on any console: in those of data and models `[/INST]` and `:b:` are no markup."""

    def __init__(self, *headers: str, title: str | None = None) -> None:
        shown = title and Text(visible(title), style="table.title")
        super().__init__(*(rich.table.Column(Text(visible(header))) for header in headers), title=shown)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(Text(visible(cell)) if isinstance(cell, str) else cell for cell in cells), **options)
