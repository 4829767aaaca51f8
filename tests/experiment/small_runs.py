"""Experiments of a few seconds, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gspo.experiment.heldout import Estimate
from gspo.experiment.spec import Spec


class Silent:
    """A watch that keeps what it saw."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.first = -1
        self.notes: list[str] = []
        self.estimates: list[Estimate] = []

    def started(self, spec: Spec, step: int, notes: list[str]) -> None:
        self.first, self.notes = step, notes

    def stepped(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(step)

    def evaluated(self, step: int, estimate: Estimate) -> None:
        self.estimates.append(estimate)


def small(path: Path, **fields: Any) -> Spec:
    sizes: dict[str, Any] = {"steps": 3, "prompts": 4, "completions": 8, "eval_prompts": 8}
    return Spec(**{"path": str(path), "task": "sort", "learning_rate": 1e-3} | sizes | fields)


def records(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "throughput/"))}
        for line in lines
    ]


def own_rollout(path: Path, code: str, **fields: Any) -> Spec:
    path.mkdir(exist_ok=True)
    (path / "turns.py").write_text(code)
    name = f"{path / 'turns.py'}:rollout"
    return small(path, task=None, rollout=name, model="embedded:sort", **fields)
