"""A profile as text: one row a phase, per step."""

from __future__ import annotations

import io

from rich import box
from rich.console import Console
from rich.table import Table

from gspo.lab.profile import Phase, ProfileReport


def render(found: ProfileReport) -> str:
    """The whole table, at most 100 columns wide."""
    if found.steps == 0:
        return "profile: no step was trained, so there is nothing to profile\n"
    console = Console(file=io.StringIO(), width=100, highlight=False, markup=False)
    peak = ", ".join(f"{value / 1e9:,.1f} GFLOP/s in {name}" for name, value in found.peak.items())
    console.print(
        f"profile, per step of {found.steps}; a matrix product on {found.device} with threads="
        f"{found.threads} reaches {peak}",
        soft_wrap=True,
    )
    console.print(_table(found))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _table(found: ProfileReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    total = (found.seconds, sum(p.flops for p in found.phases), found.floor_seconds)
    milliseconds, giga, floor = (value / found.steps for value in total)
    columns = (
        ("phase", "step"),
        ("calls", ""),
        ("ms", f"{1e3 * milliseconds:,.1f}"),
        ("share", "100.0%"),
        ("GFLOP", f"{giga / 1e9:,.3f}"),
        ("ms at peak", f"{1e3 * floor:,.1f}"),
        ("of peak", f"{found.floor_seconds / found.seconds:.1%}"),
    )
    for name, footer in columns:
        table.add_column(name, footer, justify="left" if name == "phase" else "right")
    for phase in found.phases:
        table.add_row(phase.name, *_cells(phase, found.steps))
    return table


def _cells(phase: Phase, steps: int) -> list[str]:
    counted = phase.of_peak is not None
    return [
        f"{phase.calls / steps:,.4g}",
        f"{1e3 * phase.seconds / steps:,.1f}",
        f"{phase.share:.1%}",
        f"{phase.flops / steps / 1e9:,.3f}" if counted else "",
        f"{1e3 * phase.floor_seconds / steps:,.1f}" if counted else "",
        f"{phase.of_peak:.1%}" if counted else "",
    ]
