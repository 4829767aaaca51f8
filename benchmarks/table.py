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
        amount(row.ours_s, row.unit),
        f"{amount(row.other_s, row.unit)} {row.other}",
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
    """Peak memory of both sides, and which is higher, or whether the aim at a share was met."""
    share = row.memory_share
    if share is None:
        return ""
    verdict = "higher" if share > 1 else "not higher"
    if row.memory_goal is not None:
        verdict = f"at most {row.memory_goal:g}: {'met' if share <= row.memory_goal else 'not met'}"
    return f"{row.ours_mb:.0f} / {row.other_mb:.0f}: {verdict}"


def amount(value: float, unit: str) -> str:
    """Seconds, or a count of something else.

    >>> amount(0.01234, "s"), amount(18352.0, "tokens")
    ('12.3 ms', '18,352 tokens')
    """
    return seconds(value) if unit == "s" else f"{value:,.0f} {unit}"


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
