"""Tables of text: for a page as they are, for the terminal drawn by rich."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

_IN_A_FILE = 140
"""Columns of a table that no terminal shows."""


def cells(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """The rows' fields as text: first the names as a header, then a list for each row.

    >>> cells(["arm", "seen_tokens"], [{"arm": "gspo", "seen_tokens": 1234.5}])
    [['arm', 'seen tokens'], ['gspo', '1,234']]
    """
    header = [name.replace("_", " ") for name in names]
    return [header, *([text(row.get(name)) for name in names] for row in rows)]


def text(value: Any) -> str:
    """A value as text: numbers to three digits, a mean with its interval, `-` if it is unknown.

    >>> text(-0.12345), text(-0.0), text(None), text([3e-4, 4e-4])
    ('-0.123', '0', '-', '0.0003/0.0004')
    >>> text({"mean": 0.5, "low": 0.25, "high": 1.0})
    '0.5 [0.25, 1]'
    """
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        interval = "" if value["low"] is None else f" [{text(value['low'])}, {text(value['high'])}]"
        return text(value["mean"]) + interval
    if isinstance(value, list | tuple):
        return "/".join(map(text, value))
    if isinstance(value, float):
        # + 0.0: a mean of nothing but zeros may be -0.0
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value + 0.0:.3g}"
    return str(value)


def table(rows: Sequence[Sequence[str]], title: str | None = None, *, plain: bool = False) -> Table:
    """Draw the first row as a header above the others. Numbers stand on the right.

    On a narrow terminal values are broken between their words, and only headers inside.

    Args:
        plain: narrower, without a line below the header; words are broken, and numbers are not.
    """
    header, *rest = rows
    line = None if plain else box.SIMPLE_HEAD
    out = Table(box=line, pad_edge=not plain, title=title, title_justify="left", title_style="")
    for name, *values in zip(header, *rest, strict=True):
        words = not all(value[:1] in "0123456789+-" for value in values)
        look = {"justify": "left" if words else "right", "no_wrap": plain and not words}
        longest = max((len(word) for value in values for word in value.split()), default=0)
        out.add_column(name, min_width=None if plain else longest, overflow="fold", **look)
    for row in rest:
        out.add_row(*row)
    return out


def as_text(parts: Iterable[str | Table], width: int | None = None) -> str:
    """Lines and tables one below the other; only tables are fitted into `width` columns.

    None: those of the terminal, or wide enough if there is none.

    >>> as_text(["one line", table([["a", "b"], ["x", "2"]])], width=20).splitlines()
    ['one line', '', '  a   b', ' ───────', '  x   2', '']
    """
    if width is None:
        terminal = Console()
        width = terminal.width if terminal.is_terminal else _IN_A_FILE
    file = io.StringIO()
    console = Console(file=file, width=width, highlight=False, markup=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())
