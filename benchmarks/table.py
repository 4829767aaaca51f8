"""The results as a table: on the terminal, and as Markdown for docs/benchmarks.md."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import HERE, RESULTS, Result, read
from rich.console import Console
from rich.table import Table

PAGE = HERE.parent / "docs" / "benchmarks.md"
BEGIN, END = (
    "<!-- results: made by `python benchmarks/run.py --docs` -->",
    "<!-- end of results -->",
)
COLUMNS = ("benchmark", "what", "ours", "the other", "ratio", "spread", "goal", "peak MB")


def cells(row: Result) -> tuple[str, ...]:
    """One row's texts, in the order of `COLUMNS`."""
    low, high = row.spread
    return (
        row.name,
        f"{row.what}: {row.shape}",
        seconds(row.ours_s),
        f"{seconds(row.other_s)} {row.other}",
        f"{row.ratio:.2f}",
        f"{low:.2f} to {high:.2f}" if row.repeats > 1 else "one pair",
        goal(row),
        memory(row),
    )


def goal(row: Result) -> str:
    """The goal, and whether it was met."""
    if row.goal is None:
        return ""
    return f"{row.goal:g}: {'met' if row.met else 'not met'}"


def memory(row: Result) -> str:
    """Peak memory of both sides, and which is higher."""
    if row.ours_mb is None or row.other_mb is None:
        return ""
    verdict = "higher" if row.ours_mb > row.other_mb else "not higher"
    return f"{row.ours_mb:.0f} / {row.other_mb:.0f}: {verdict}"


def seconds(value: float) -> str:
    """Three digits.

    >>> seconds(0.01234), seconds(123.4)
    ('12.3 ms', '123 s')
    """
    return f"{value * 1e3:.3g} ms" if value < 0.1 else f"{value:.3g} s"


def show(rows: Sequence[Result], console: Console | None = None, *, tiny: bool = False) -> None:
    """Print one table."""
    title = "tiny sizes: the figures mean nothing" if tiny else "ratio = the other's time / ours"
    table = Table(title=title)
    for column in COLUMNS:
        right = column in ("ours", "ratio")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        color = {True: "green", False: "red", None: ""}[row.met]
        parts = list(cells(row))
        parts[6] = f"[{color}]{parts[6]}[/]" if color else parts[6]
        table.add_row(*parts)
    # A pipe has no width of its own, and 80 columns break every word.
    (console or Console(width=None if sys.stdout.isatty() else 170)).print(table)


def markdown(rows: Sequence[Result]) -> str:
    """The table of the page, with the machine and versions below it."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    places = dict.fromkeys(_circumstances(row) for row in rows)
    return "\n".join([*lines, "", *(f"- {place}" for place in places)])


def _circumstances(row: Result) -> str:
    machine = row.machine
    versions = ", ".join(f"{name} {version}" for name, version in row.versions.items())
    return (
        f"{row.name}: {row.date[:10]}, {machine.get('cpu', 'unknown CPU')}, "
        f"{machine.get('cores', '?')} cores, {machine.get('memory_gb', '?')} GB; {versions}"
    )


def committed(folder: Path = RESULTS) -> list[Result]:
    """All stored comparisons. Studies such as precision.json are no comparisons of speed."""
    names = sorted(path.stem for path in folder.glob("*.json"))
    return [row for name in names for row in read(name, folder)]


def update_page(page: Path = PAGE, folder: Path = RESULTS) -> bool:
    """Put the stored results into the page; returns whether it changed."""
    text = page.read_text()
    table = f"{BEGIN}\n\n{markdown(committed(folder))}\n\n{END}"
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    new = re.sub(pattern, lambda _: table, text, flags=re.DOTALL)
    page.write_text(new)
    return new != text
