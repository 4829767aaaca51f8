"""A comparison on the terminal: the live view, the tables at its end, and the dry run."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from gspo.core.intervals import LEVEL, Interval
from gspo.lab.compare.grid import Cell
from gspo.lab.compare.run import State
from gspo.lab.compare.session import GridPlan
from gspo.lab.statistics import NO_DIFFERENCE, NO_INTERVAL, holm


class LiveGrid:
    """A bar for the whole and one for each running cell; plain lines where there is no terminal."""

    def __init__(self, plan: GridPlan, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self._total = plan.count("pending")
        self._done = 0
        self._began: dict[str, float] = {}
        self._rewards: dict[str, list[float]] = {}
        self._bars: dict[str, TaskID] = {}
        self._progress: Progress | None = None

    def __enter__(self) -> LiveGrid:
        if self.console.is_terminal and self._total:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=self.console,
            )
            self._progress.start()
            self._bars[""] = self._progress.add_task("cells", total=self._total, text="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def began(self, cell: Cell) -> None:
        assert cell.spec is not None
        self._began[cell.id] = time.perf_counter()
        if self._progress is not None:
            self._bars[cell.id] = self._progress.add_task(cell.id, total=cell.spec.steps, text="")

    def stepped(self, cell: Cell, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._bars[cell.id], completed=step)

    def evaluated(self, cell: Cell, reward: float) -> None:
        self._rewards.setdefault(cell.id, []).append(reward)
        if self._progress is not None:
            self._progress.update(self._bars[cell.id], text=f"held-out {reward:.3f}")

    def ended(self, cell: Cell, state: State) -> None:
        self._done += 1
        seconds = time.perf_counter() - self._began[cell.id]
        seen = self._rewards.get(cell.id, [])
        # A cell that goes on has its earlier evaluations in its log, not here.
        text = f"held-out {' '.join(f'{reward:.2f}' for reward in seen)}"
        if state.status == "failed":
            text = f"failed: {state.error}"
        line = f"{self._done}/{self._total}  {cell.id}  {text}  {seconds:.0f} s"
        self.console.print(line, markup=False, soft_wrap=True)
        if self._progress is not None:
            self._progress.remove_task(self._bars.pop(cell.id))
            self._progress.update(self._bars[""], completed=self._done)


def print_plan(plan: GridPlan, console: Console | None = None) -> None:
    """Every cell with its status, and what is left to do."""
    console = console or Console(highlight=False)
    for cell in plan.cells:
        state = plan.states[cell.id]
        run = "" if cell.spec is None else f"  {cell.spec.name}"
        reason = f": {state.error}" if state.error else ""
        line = f"{state.status:8} {cell.id}{run}{reason}"
        console.print(line, markup=False, soft_wrap=True)
    console.print(summary_line(plan), markup=False, soft_wrap=True)


def summary_line(plan: GridPlan) -> str:
    """How many cells there are, and roughly how long the rest will take."""
    line = f"{len(plan.cells)} cells: {plan.count('done')} done, {plan.count('refused')} refused, "
    line += f"{plan.count('pending')} to run, {plan.workers} at once"
    if not plan.count("pending"):
        return line
    if plan.seconds is None:
        return line + "; no estimate: no cell of this model has been timed yet"
    source = "as fast as those done" if plan.measured else "a rough guess"
    return line + f"; roughly {_duration(plan.seconds)} ({source})"


def print_result(content: dict[str, Any], console: Console | None = None) -> None:
    """The summary, the paired differences, and what failed or was refused."""
    console = console or _wide()
    axes = list(dict.fromkeys(axis for row in content["summary"] for axis in row["stress"]))
    table = Table(
        title=f"{content['name']}: means over seeds ± half of the 95 % interval", box=box.SIMPLE
    )
    arms = [row["arm"] for row in content["summary"]]
    _add_columns(table, {"arm": arms, **_values(content["summary"], axes)})
    shown = [name for name in _COLUMNS if console.width >= _ROOMY or name not in _EXTRA]
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for row in content["summary"]:
        if row["seeds"]:
            where = (row["arm"], *(str(row["stress"][axis]) for axis in axes))
            table.add_row(*where, *(_COLUMNS[name](row) for name in shown))
    console.print(table)
    _print_paired(content["paired"], axes, console)
    _print_missing(content["cells"], console)


def _wide() -> Console:
    """Of the terminal's width; where there is none, wide enough for every column."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


def _values(rows: list[dict[str, Any]], axes: list[str]) -> dict[str, list[str]]:
    return {axis: [str(row["stress"][axis]) for row in rows] for axis in axes}


def _add_columns(table: Table, columns: dict[str, list[str]]) -> None:
    """Columns that say which row it is: on a narrow terminal they keep their values whole."""
    for name, values in columns.items():
        width = max(len(value) for value in values)
        table.add_column(name, min_width=width, overflow="fold")


def _print_paired(pairs: list[dict[str, Any]], axes: list[str], console: Console) -> None:
    if not pairs:
        return
    table = Table(title="differences, a - b, paired by seed", box=box.SIMPLE)
    sides = {side: [pair[side] for pair in pairs] for side in ("a", "b")}
    _add_columns(table, sides | _values(pairs, axes))
    for name in ("metric", "n", "difference", "verdict"):
        table.add_column(name, no_wrap=name != "verdict", min_width=10 * (name == "verdict"))
    for pair in pairs:
        interval = Interval(pair["difference"], pair["low"], pair["high"])
        table.add_row(
            *(pair["a"], pair["b"], *(str(pair["stress"][axis]) for axis in axes)),
            *(
                _METRICS[pair["metric"]],
                str(pair["n"]),
                str(interval),
                pair["verdict"],
            ),
        )
    console.print(table)
    for line in _counts(pairs):
        console.print(line, markup=False)


def _counts(pairs: list[dict[str, Any]]) -> list[str]:
    """How many differences are shown of each metric, and how many would be by chance."""
    lines = []
    for role in ("primary", "secondary"):
        judged = [p for p in pairs if p["role"] == role and p["verdict"] != NO_INTERVAL]
        if not judged:
            continue
        shown = sum(pair["verdict"] != NO_DIFFERENCE for pair in judged)
        line = f"{_METRICS[judged[0]['metric']]}, the {role} metric: {shown} of {len(judged)} "
        line += "differences shown"
        if role == "primary":
            left = sum(p < 1 - LEVEL for p in holm([pair["p"] for pair in judged]))
            line += f", {left} after Holm's correction for their number"
        lines.append(line + ".")
    if lines:
        lines.append("Of differences that are none, about one in twenty is shown by chance.")
    return lines


def _print_missing(cells: list[dict[str, Any]], console: Console) -> None:
    for status in ("refused", "failed", "pending"):
        reasons: dict[str, list[str]] = {}
        for cell in cells:
            if cell["status"] == status:
                reasons.setdefault(cell["error"] or "", []).append(cell["id"])
        for reason, ids in reasons.items():
            text = f"{status}: {', '.join(ids)}" + (f": {reason}" if reason else "")
            console.print(text, markup=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _plus_minus(value: dict[str, float]) -> str:
    """Student's interval is symmetric."""
    alone = f"{value['mean']:.3f}"
    return alone if value["high"] is None else f"{alone} ± {value['high'] - value['mean']:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _share_interval(value: dict[str, float]) -> str:
    return f"{value['mean']:.0%} [{value['low']:.0%}, {value['high']:.0%}]"


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "seeds": lambda row: str(row["seeds"]),
    "reward": lambda row: _plus_minus(row["reward_after"]),
    "AUC": lambda row: _plus_minus(row["auc"]),
    "collapsed": lambda row: _share_interval(row["collapsed"]),
    "clipped": lambda row: _share(row["clip_fraction"]),
    "tokens": lambda row: f"{row['tokens'] / 1000:,.0f}k",
    "s": lambda row: f"{row['seconds']:.0f}",
}
_METRICS = {"reward_after": "reward", "auc": "AUC"}
_EXTRA, _ROOMY = ("AUC", "tokens", "s"), 110
"""Columns that a terminal of fewer characters does without; the report has them."""
