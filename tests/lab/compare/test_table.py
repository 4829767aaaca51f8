"""The live view, with and without a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from gspo.lab.compare.grid import make_cells
from gspo.lab.compare.run import State, first_states
from gspo.lab.compare.session import GridPlan
from gspo.lab.compare.spec import CompareSpec
from gspo.lab.compare.table import LiveGrid, print_plan


def small_plan(path: Path, seconds: float | None = 90.0) -> GridPlan:
    base = {"task": "sort", "steps": 4}
    compare = CompareSpec(path=str(path), base=base, presets=("gspo", "grpo"), seeds=(0,))
    cells = make_cells(compare)
    return GridPlan(cells, first_states(cells), workers=2, seconds=seconds, measured=False)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_live_view_tells_each_cell_once(tmp_path: Path, terminal: bool):
    plan = small_plan(tmp_path)
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, highlight=False)
    ours, theirs = plan.cells
    with LiveGrid(plan, console) as watch:
        for cell in plan.cells:
            watch.began(cell)
        watch.evaluated(ours, 0.25)
        watch.stepped(ours, 4)
        watch.evaluated(ours, 0.5)
        watch.ended(ours, State("done"))
        watch.stepped(theirs, 2)
        watch.ended(theirs, State("failed", "RuntimeError: [markup]"))
    text = out.getvalue()
    assert text.count("1/2  gspo seed=0  held-out 0.25 0.50") == 1
    assert text.count("2/2  grpo seed=0  failed: RuntimeError: [markup]") == 1
    assert ("\x1b[" in text) is terminal


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(90.0, "roughly 90 s (a rough guess)"), (600.0, "roughly 10 min"), (None, "no estimate")],
)
def test_the_plan_says_what_is_left(tmp_path: Path, seconds: float | None, expected: str):
    out = io.StringIO()
    print_plan(small_plan(tmp_path, seconds), Console(file=out, width=200))
    assert "2 cells: 0 done, 0 refused, 2 to run, 2 at once" in out.getvalue()
    assert expected in out.getvalue()
