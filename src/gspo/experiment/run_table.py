"""`gspo runs`: the runs of a folder, a row each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from gspo.backend.run import best_step
from gspo.core.tables import as_text, table
from gspo.experiment.saved_run import SavedRun
from gspo.train.checkpoint import steps_saved

_COLUMNS = ["run", "base model", "method", "step", "last", "best", "size", "changed, UTC"]


def describe_run(run: SavedRun) -> dict[str, Any]:
    """What `gspo runs` says of a run; None for what is not known."""
    rewards, saved = run.values("val/reward"), steps_saved(run.folder / "checkpoints")
    best, last = best_step(rewards), max(rewards, default=None)
    files = [file for file in run.folder.rglob("*") if file.is_file()]
    lineage = run.config.get("lineage")
    return {
        "run": run.name,
        "base_model": run.config.get("base_model"),
        "method": run.method,
        "step": max([run.steps, *saved]),
        "steps": run.spec and run.spec.steps,
        "saved": saved,
        "reward_last": None if last is None else rewards[last],
        "reward_best": None if best is None else rewards[best],
        "best_step": best,
        "bytes": sum(file.stat().st_size for file in files),
        "changed": max((file.stat().st_mtime for file in files), default=math.nan),
        "running": run.running,
        "lineage": lineage if isinstance(lineage, list) else [],
        "folder": str(run.folder),
    }


def runs_text(runs: Sequence[dict[str, Any]], width: int | None = None) -> str:
    """The table of runs, see `as_text`."""
    return as_text([table([_COLUMNS, *map(_row, runs)], plain=True)], width)


def _row(run: dict[str, Any]) -> list[str]:
    lineage = run["lineage"]
    come_from = f" (from {lineage[-1]['run']} @{lineage[-1]['step']})" if lineage else ""
    when = datetime.fromtimestamp(run["changed"], UTC).strftime("%Y-%m-%d %H:%M")
    return [
        run["run"] + come_from,
        Path(str(run["base_model"] or "")).name,
        run["method"] or "",
        f"{run['step']}/{run['steps']}" if run["steps"] else str(run["step"]),
        "" if run["reward_last"] is None else f"{run['reward_last']:.3f}",
        "" if run["best_step"] is None else f"{run['reward_best']:.3f} @{run['best_step']}",
        decimal(run["bytes"]),
        "running" if run["running"] else when,
    ]
