"""Finished runs that are written by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from gspo.lab.compare_cells import Cell


def write_run(cell: Cell, rewards: list[float], metrics: dict[str, float] | None = None) -> None:
    """A finished run of two steps with these held-out rewards, the last of them at the end."""
    folder = cell.folder
    folder.mkdir(parents=True)
    lines = []
    for step, reward in enumerate(rewards):
        line: dict[str, Any] = {"step": step, "val/reward": reward}
        line |= {"val/reward_low": reward - 0.02, "val/reward_high": reward + 0.02}
        if step:
            line |= {"train/reward": reward - 0.1, "tokens/completion": 100, "time/step": 0.5}
            line |= {"ratio/clip_fraction": 0.25} | (metrics or {})
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    cell.status = "done"


def as_object(content: dict[str, Any]) -> Any:
    """A JSON object whose fields are attributes; it is JSON without NaN, or this fails."""
    text = json.dumps(content, allow_nan=False)
    return json.loads(text, object_hook=lambda fields: SimpleNamespace(**fields))
