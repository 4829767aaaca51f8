"""Tables for the terminal: rich draws them, and the result is plain text that a file can hold."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def table(names: Sequence[str], rows: Sequence[Sequence[str]], **options: object) -> Table:
    """A table whose columns are right-aligned, but for the first if its header is not a number.

    Args:
        names: headers of the columns.
        rows: the cells of each row.
        options: of `rich.table.Table`, such as `title`.
    """
    out = Table(*names, box=box.SIMPLE_HEAD, title_justify="left", title_style="", **options)  # pyright: ignore[reportArgumentType]
    for column in out.columns[1:]:
        column.justify = "right"
    for cells in rows:
        out.add_row(*cells)
    return out


def as_text(parts: Sequence[str | Table], width: int) -> str:
    """Lines and tables one below the other; only tables are fitted into `width` columns.

    >>> as_text(["one line", table(["a", "b"], [["1", "2"]])], width=20).splitlines()
    ['one line', '', '  a   b', ' ───────', '  1   2', '']
    """
    file = io.StringIO()
    console = Console(file=file, width=width, highlight=False, markup=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())
