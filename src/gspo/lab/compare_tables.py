"""A comparison as text: the list of a dry run, and the tables of the terminal and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from statistics import fmean
from typing import Any

from gspo.core.tables import as_text, cells, table
from gspo.experiment.heldout import LEVEL
from gspo.lab.compare_cells import Cell
from gspo.lab.compare_result import measured
from gspo.lab.statistics import NO_DIFFERENCE, NO_INTERVAL, holm

Row = Mapping[str, Any]
"""An object of comparison.json."""

SUMMARY = ("arm", "stress", "seeds", "reward_after", "auc", "collapsed", "ratio/clip_fraction")
PAIRED = ("a", "b", "stress", "metric", "n", "difference", "verdict")
"""Fields of comparison.json: the columns of a table."""
QUICK_ADVICE = (
    "Two seeds show nothing: read this as a look at the tool, not as a result. Next: write a spec "
    "with seeds = 5 or more, several learning rates, and your own task (docs/compare.md), and run "
    "`gspo compare SPEC.toml`."
)


def print_cells(cells: Sequence[Cell], workers: int) -> None:
    """Print each cell with its status, and what is left to do."""
    for cell in cells:
        run = f"  {cell.spec.name}" if cell.spec else ""
        reason = f": {cell.error}" if cell.error else ""
        print(f"{cell.status:8} {cell.id}{run}{reason}")
    print(summary_line(cells, workers))


def summary_line(cells: Sequence[Cell], workers: int) -> str:
    """How many cells there are, and roughly how long the rest will take, once one is done."""
    count = Counter(cell.status for cell in cells)
    line = f"{len(cells)} cells: {count['done']} done, {count['refused']} refused, "
    line += f"{count['pending']} to run, {workers} at once"
    seconds = [measured(cell.folder)["seconds"] for cell in cells if cell.status == "done"]
    if seconds and count["pending"]:
        left = fmean(seconds) * count["pending"] / min(workers, count["pending"])
        line += f"; roughly {timedelta(seconds=round(left))}, as fast as those done"
    if any(cell.spec and cell.spec.pipeline for cell in cells):
        line += "\npipeline: what a cell samples depends on timing, so it doesn't repeat exactly"
    return line


def result_text(content: Row, width: int | None = None) -> str:
    """The summary, the paired differences, and what failed or was refused.

    Args:
        content: that of comparison.json.
        width: of the tables, see `as_text`.
    """
    tables = []
    if summary := [row for row in content["summary"] if row["seeds"]]:
        title = f"{content['name']}: means over seeds with their 95 % interval"
        tables.append(table(stressed_cells(SUMMARY, summary), title))
    if content["paired"]:
        rows = stressed_cells(PAIRED, content["paired"])
        tables.append(table(rows, "differences, a - b, paired by seed"))
    lines = [*_counts(content["paired"]), *_missing(content["cells"])]
    return as_text([*tables, *lines], width)


def stressed_cells(names: Iterable[str], rows: Sequence[Row]) -> list[list[str]]:
    """The cells of a table in which each axis of the stress has a column.

    >>> stressed_cells(["arm", "stress"], [{"arm": "gspo", "stress": {"epochs": 2}}])
    [['arm', 'epochs='], ['gspo', '2']]
    """
    axes = list(dict.fromkeys(f"{axis}=" for row in rows for axis in row["stress"]))
    columns = [column for name in names for column in (axes if name == "stress" else [name])]
    flat = []
    for row in rows:
        stress = {f"{axis}=": str(value) for axis, value in row["stress"].items()}
        fields = {**row, **row.get("means", {}), **stress}
        if "difference" in row:
            fields["difference"] = {**row, "mean": row["difference"]}
        flat.append(fields)
    return cells(columns, flat)


def _counts(pairs: Sequence[Row]) -> Iterable[str]:
    """How many differences are shown of each metric, and how many would be by chance."""
    judged = [pair for pair in pairs if pair["verdict"] != NO_INTERVAL]
    for role in ("primary", "secondary"):
        of_role = [pair for pair in judged if pair["role"] == role]
        if not of_role:
            continue
        shown = sum(pair["verdict"] != NO_DIFFERENCE for pair in of_role)
        line = f"{of_role[0]['metric']}, the {role} metric: {shown} of {len(of_role)} "
        line += "differences shown"
        if role == "primary":
            left = sum(p < 1 - LEVEL for p in holm([pair["p"] for pair in of_role]))
            line += f", {left} after Holm's correction for their number"
        yield line + "."
    if judged:
        yield "Of differences that are none, about one in twenty is shown by chance."


def _missing(cells: Sequence[Row]) -> Iterable[str]:
    """The cells without a result, by the reason."""
    ids: dict[tuple[str, str | None], list[str]] = {}
    for cell in cells:
        if cell["status"] in ("refused", "failed", "pending"):
            ids.setdefault((cell["status"], cell["error"]), []).append(cell["id"])
    for (status, reason), names in ids.items():
        yield f"{status}: {', '.join(names)}" + (f": {reason}" if reason else "")
