"""Tables for the terminal: rich draws them, and the result is plain text that a file can hold."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table


def table(
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    labels: Literal["left", "right"] = "left",
) -> Table:
    """Make a table of numbers, which stand on the right of their columns.

    Args:
        names: headers of the columns.
        rows: the cells of each row.
        title: what stands above it.
        labels: the side on which the cells of the first column stand.
    """
    out = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="")
    for index, name in enumerate(names):
        out.add_column(name, justify="right" if index else labels)
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
