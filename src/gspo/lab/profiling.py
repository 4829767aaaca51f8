"""`--profile`: where the time of a run's steps goes, by the spans of `gspo.core.timing`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gspo.core.files import strict_json, write_whole
from gspo.core.tables import as_text, cells, table
from gspo.core.timing import STEP, Clock

_COLUMNS = ("phase", "calls", "ms", "share")


def step_clock() -> Clock:
    """A clock of the spans inside `step`. If there is a GPU, it is waited for at each edge."""
    return Clock(torch.cuda.synchronize if torch.cuda.is_available() else None)


def make_report(clock: Clock) -> dict[str, Any]:
    """Report the steps so far, as profile.json has it.

    Returns:
        `steps` and their `seconds`; and the `phases`, as they were first entered, `other` the last:
        over all steps, `seconds` without those of the phases inside it, their `share`, and `calls`.
    """
    total, seconds, calls = sum(clock.seconds.values()), dict(clock.seconds), dict(clock.calls)
    steps = calls.pop(STEP, 0)
    if steps:
        seconds["other"], calls["other"] = seconds[STEP], steps
    phases = [
        {"name": name, "seconds": seconds[name], "share": seconds[name] / total, "calls": count}
        for name, count in calls.items()
    ]
    return {"steps": steps, "seconds": total, "phases": phases}


def write_profile(report: dict[str, Any], run: Path) -> Path:
    """Write `profile.json` and `profile.txt` into the run's folder; return the first."""
    path = run / "profile.json"
    write_whole(path, strict_json(report, indent=1) + "\n")
    write_whole(run / "profile.txt", render(report))
    return path


def render(report: dict[str, Any]) -> str:
    """The report as text: a line for each phase, per step; at most 100 columns wide."""
    steps = report["steps"]
    if steps == 0:
        return "profile: no step was trained, so there is nothing to profile\n"
    whole = {"name": "step", "seconds": report["seconds"], "share": 1.0, "calls": steps}
    rows = [
        phase
        | {"phase": phase["name"], "calls": phase["calls"] / steps}
        | {"ms": 1e3 * phase["seconds"] / steps}
        for phase in (*report["phases"], whole)
    ]
    return as_text([f"profile, per step of {steps}", table(cells(_COLUMNS, rows))], width=100)
