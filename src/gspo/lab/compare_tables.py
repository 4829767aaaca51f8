"""A comparison on the terminal: the dry run's list, and the tables at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from gspo.core.intervals import LEVEL, Interval
from gspo.lab.compare_cells import Cell
from gspo.lab.compare_result import measured
from gspo.lab.statistics import NO_DIFFERENCE, NO_INTERVAL, holm
from gspo.policy.embedded import PREFIX

QUICK_ADVICE = (
    "Two seeds show nothing: read this as a look at the tool, not as a result. Next: write a spec "
    "with seeds = 5 or more, several learning rates, and your own task (docs/compare.md), and run "
    "`gspo compare SPEC.toml`."
)
_START = 8.0
"""Seconds until a worker has loaded its libraries and its model."""
_EMBEDDED_RATE = 10_000
"""Sampled tokens a second and core of an embedded model, training included: a rough guess that
serves until a cell has been timed."""


def print_cells(cells: Sequence[Cell], workers: int) -> None:
    """Print each cell with its status, and what is left to do."""
    for cell in cells:
        run = f"  {cell.spec.name}" if cell.spec else ""
        reason = f": {cell.error}" if cell.error else ""
        print(f"{cell.status:8} {cell.id}{run}{reason}")
    print(summary_line(cells, workers))


def summary_line(cells: Sequence[Cell], workers: int) -> str:
    """How many cells there are, and roughly how long the rest will take."""
    count = Counter(cell.status for cell in cells)
    line = f"{len(cells)} cells: {count['done']} done, {count['refused']} refused, "
    line += f"{count['pending']} to run, {workers} at once"
    return line + (_estimate(cells, workers) if count["pending"] else "")


def _estimate(cells: Sequence[Cell], workers: int) -> str:
    """Wall clock for the pending cells, at the rate of those done."""
    done = [measured(cell.folder) for cell in cells if cell.status == "done"]
    seconds, source = sum(row["seconds"] for row in done), "as fast as those done"
    if seconds:
        rate = sum(row["tokens"] for row in done) / seconds
    elif all(cell.spec.model.startswith(PREFIX) for cell in cells if cell.spec):
        rate, source = _EMBEDDED_RATE, "a rough guess"
    else:
        return "; no estimate: no cell of this model has been timed yet"
    waiting = [cell for cell in cells if cell.status == "pending"]
    tokens = sum(cell.most_tokens for cell in waiting)
    left = _START + tokens / rate / min(workers, len(waiting))
    time = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
    return f"; roughly {time} ({source})"


def print_result(content: dict[str, Any], console: Console | None = None) -> None:
    """The summary, the paired differences, and what failed or was refused."""
    if console is None:  # without a terminal it is wide enough for every column
        width = None if Console().is_terminal else 140
        console = Console(width=width, highlight=False, markup=False)
    summary = [row for row in content["summary"] if row["seeds"]]
    shown = [name for name in _COLUMNS if console.width >= _ROOMY or name not in _EXTRA]
    title = f"{content['name']}: means over seeds ± half of the 95 % interval"
    _print_table(console, title, ["arm"], summary, {name: _COLUMNS[name] for name in shown})
    if content["paired"]:
        title = "differences, a - b, paired by seed"
        _print_table(console, title, ["a", "b"], content["paired"], _PAIR_COLUMNS)
    for line in [*_counts(content["paired"]), *_missing(content["cells"])]:
        console.print(line, soft_wrap=True)


def _print_table(
    console: Console,
    title: str,
    names: list[str],
    rows: Sequence[dict[str, Any]],
    columns: dict[str, Callable[[dict[str, Any]], str]],
) -> None:
    """Print a table: names and stress at the left, then the columns."""
    axes = list(dict.fromkeys(axis for row in rows for axis in row["stress"]))
    labels = [[str(row[n]) for n in names] + [str(row["stress"][a]) for a in axes] for row in rows]
    table = Table(title=title, box=box.SIMPLE)
    for name, *values in zip([*names, *axes], *labels, strict=True):
        # What says which row it is keeps its values whole, on a narrow terminal too.
        table.add_column(name, min_width=max(map(len, values), default=0), overflow="fold")
    for name in columns:
        words = name == "verdict"
        table.add_column(name, justify="left" if words else "right", no_wrap=not words)
    for row, label in zip(rows, labels, strict=True):
        table.add_row(*label, *(text(row) for text in columns.values()))
    console.print(table)


def _counts(pairs: Sequence[dict[str, Any]]) -> Iterable[str]:
    """How many differences are shown of each metric, and how many would be by chance."""
    judged = [pair for pair in pairs if pair["verdict"] != NO_INTERVAL]
    for role in ("primary", "secondary"):
        of_role = [pair for pair in judged if pair["role"] == role]
        if not of_role:
            continue
        shown = sum(pair["verdict"] != NO_DIFFERENCE for pair in of_role)
        line = f"{_METRICS[of_role[0]['metric']]}, the {role} metric: {shown} of {len(of_role)} "
        line += "differences shown"
        if role == "primary":
            left = sum(p < 1 - LEVEL for p in holm([pair["p"] for pair in of_role]))
            line += f", {left} after Holm's correction for their number"
        yield line + "."
    if judged:
        yield "Of differences that are none, about one in twenty is shown by chance."


def _missing(cells: Sequence[dict[str, Any]]) -> Iterable[str]:
    """The cells without a result, by the reason."""
    for status in ("refused", "failed", "pending"):
        rows = [cell for cell in cells if cell["status"] == status]
        for reason in dict.fromkeys(cell["error"] for cell in rows):
            ids = ", ".join(cell["id"] for cell in rows if cell["error"] == reason)
            yield f"{status}: {ids}: {reason}" if reason else f"{status}: {ids}"


def _plus_minus(value: dict[str, float]) -> str:
    """Student's interval is symmetric."""
    mean = f"{value['mean']:.3f}"
    return mean if value["high"] is None else f"{mean} ± {value['high'] - value['mean']:.3f}"


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "seeds": lambda row: str(row["seeds"]),
    "reward": lambda row: _plus_minus(row["reward_after"]),
    "AUC": lambda row: _plus_minus(row["auc"]),
    "collapsed": lambda row: "{mean:.0%} [{low:.0%}, {high:.0%}]".format(**row["collapsed"]),
    "clipped": lambda row: "-" if row["clip_fraction"] is None else f"{row['clip_fraction']:.0%}",
    "tokens": lambda row: f"{row['tokens'] / 1000:,.0f}k",
    "s": lambda row: f"{row['seconds']:.0f}",
}
_EXTRA, _ROOMY = ("AUC", "tokens", "s"), 110
"""Columns that a terminal of fewer characters does without; the report has them."""
_METRICS = {"reward_after": "reward", "auc": "AUC"}
_PAIR_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "metric": lambda pair: _METRICS[pair["metric"]],
    "n": lambda pair: str(pair["n"]),
    "difference": lambda pair: str(Interval(pair["difference"], pair["low"], pair["high"])),
    "verdict": lambda pair: pair["verdict"],
}
