"""A comparison from its spec to its files: check, build the models, run, write."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo.lab.compare.grid import Cell, make_cells
from gspo.lab.compare.result import comparison, write_comparison
from gspo.lab.compare.run import (
    GridWatch,
    State,
    default_workers,
    first_states,
    is_finished,
    run_cells,
)
from gspo.lab.compare.spec import CompareSpec
from gspo.policy.embedded import PREFIX, embedded_folder

START = 8.0
"""Seconds until a worker has loaded its libraries and its model."""
EMBEDDED_RATE = 10_000
"""Sampled tokens a second and core of an embedded model, training included: a rough guess that
serves until a cell has been timed."""


@dataclass(frozen=True)
class GridPlan:
    """What a comparison will do, told before it runs.

    Attributes:
        seconds: of wall clock, roughly; None where nothing is known of the model.
        measured: whether the estimate comes from finished cells of this comparison.
    """

    cells: list[Cell]
    states: dict[str, State]
    workers: int
    seconds: float | None
    measured: bool

    def count(self, status: str) -> int:
        """Cells of that status."""
        return sum(state.status == status for state in self.states.values())


def plan_comparison(compare: CompareSpec, workers: int | None = None) -> GridPlan:
    """Resolve and check every cell; reads what is already there, and writes nothing.

    Raises:
        GspoError: a name, a value or a model that doesn't exist.
    """
    cells = make_cells(compare)
    states = first_states(cells)
    workers = workers or default_workers(cells)
    rate, measured = _rate(compare, cells, states)
    waiting = [cell for cell in cells if states[cell.id].status == "pending"]
    tokens = sum(cell.sequences * cell.longest for cell in waiting)
    seconds = START + tokens / rate / max(1, min(workers, len(waiting))) if rate else None
    return GridPlan(cells, states, workers, seconds, measured)


def _rate(
    compare: CompareSpec, cells: list[Cell], states: dict[str, State]
) -> tuple[float | None, bool]:
    """Tokens a second of one worker: measured on finished cells, else guessed."""
    rows = comparison(compare, cells, states)["cells"]
    done = [row for row in rows if row["status"] == "done" and row["seconds"] > 0]
    if done:
        return sum(row["tokens"] for row in done) / sum(row["seconds"] for row in done), True
    embedded = all(cell.spec.model.startswith(PREFIX) for cell in cells if cell.spec)
    return (EMBEDDED_RATE if embedded else None), False


def run_comparison(
    compare: CompareSpec, plan: GridPlan, watch: GridWatch, *, quick: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Run what is not finished; returns comparison.json and its content.

    Raises:
        RunError: another process compares at the same path.
    """
    build_models(plan.cells)
    keeper = _Keeper(compare, plan, watch, quick)
    keeper.write()
    try:
        asyncio.run(run_cells(compare, plan.cells, plan.states, plan.workers, keeper))
    finally:
        for state in plan.states.values():  # of an interrupted comparison
            if state.status == "running":
                state.status = "pending"
        path, content = keeper.write()
    return path, content


def build_models(cells: Sequence[Cell]) -> None:
    """Build the embedded models first: workers would each build the same one."""
    pending = [cell.spec for cell in cells if cell.spec and not is_finished(cell)]
    for model in sorted({spec.model for spec in pending if spec.model.startswith(PREFIX)}):
        embedded_folder(model)


class _Keeper:
    """Keeps comparison.json up to date, so that a report can be drawn while it runs."""

    PAUSE = 10.0

    def __init__(self, compare: CompareSpec, plan: GridPlan, watch: GridWatch, quick: bool):
        self._compare, self._plan, self._watch, self._quick = compare, plan, watch, quick
        self._written = 0.0

    def began(self, cell: Cell) -> None:
        self._watch.began(cell)

    def stepped(self, cell: Cell, step: int) -> None:
        self._watch.stepped(cell, step)

    def evaluated(self, cell: Cell, reward: float) -> None:
        self._watch.evaluated(cell, reward)

    def ended(self, cell: Cell, state: State) -> None:
        self._watch.ended(cell, state)
        if time.monotonic() - self._written > self.PAUSE:
            self.write()

    def write(self) -> tuple[Path, dict[str, Any]]:
        self._written = time.monotonic()
        content = comparison(self._compare, self._plan.cells, self._plan.states, quick=self._quick)
        return write_comparison(self._compare, content), content
