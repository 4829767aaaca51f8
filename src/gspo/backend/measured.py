"""What is logged for groups, the names of user metrics, and how the best step is found."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gspo.core.errors import ConfigError, shown, suggestion
from gspo.core.metrics import is_ours, user_metric
from gspo.data.check import plain_values
from gspo.trajectory import TrajectoryGroup


def means(groups: Sequence[TrajectoryGroup], split: str) -> dict[str, float]:
    """Mean reward, the means of the metrics that rollouts gave, and how many failed, by full name.

    A metric of a rollout that is named as one of gspo's stands at `<split>/user/<name>`.
    """
    values: dict[str, list[float]] = {}
    for group in groups:
        for trajectory in group:
            values.setdefault(f"{split}/reward", []).append(float(trajectory.reward))
            for name, value in trajectory.metrics.items():
                full = f"{split}/user/{name}" if is_ours(name) else f"{split}/{name}"
                values.setdefault(full, []).append(float(value))
    out = {name: sum(items) / len(items) for name, items in values.items()}
    if groups:
        out[f"{split}/exceptions"] = float(sum(len(group.exceptions) for group in groups))
    return out


def best_step(
    lines: Sequence[Mapping[str, Any]], metric: str, saved: Collection[int]
) -> int | None:
    """The saved step with the highest finite value of a metric; the first of equals.

    >>> lines = [{"step": 1, "a": float("nan")}, {"step": 2, "a": 0.5}, {"step": 3, "a": 0.9}]
    >>> best_step(lines, "a", {1, 2})
    2
    """
    scored = [
        (value, line["step"])
        for line in lines
        if line["step"] in saved
        and isinstance(value := line.get(metric), int | float)
        and math.isfinite(value)
    ]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def user_metrics(metrics: Any, split: str, line: Mapping[str, Any]) -> dict[str, float]:
    """Metrics that a user logs, under names that replace none of gspo's.

    Args:
        metrics: name -> number. A name without `/` belongs to the split.
        split: such as `val`.
        line: what the step's line has already. A metric that stands there with the same value is
            left out: it is the result of `train`, handed back.

    Raises:
        DataError: not a dict of numbers.
    """
    values = {}
    for name, value in plain_values(metrics, "metrics").items():
        written = name if "/" in name else f"{split}/{name}"
        if written not in line or not _same(line[written], value):
            values[user_metric(name, split)] = value
    return values


def line_of(step: int, lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The line of a step in metrics.jsonl; empty if there is none."""
    return next((line for line in lines if line["step"] == step), {})


def check_split(split: Any) -> str:
    """The name of a split, which is that of a folder too.

    Raises:
        ConfigError: it is empty, `.` or `..`, or has a `/`, a `\\` or a NUL.
    """
    if not isinstance(split, str) or split in ("", ".", "..") or set(split) & set("/\\\0"):
        raise ConfigError(f"split = {shown(split)}: give a plain name, such as 'val'")
    return split


def check_logged(metric: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a metric that no line of metrics.jsonl has.

    Raises:
        ConfigError: it names what was logged.
    """
    names = {name for line in lines for name in line} - {"step"}
    if metric not in names:
        raise ConfigError(
            f"delete_checkpoints: no metric {metric!r} was logged, so nothing is deleted."
            f"{suggestion(str(metric), names)} Logged: {', '.join(sorted(names))}."
        )


def _same(written: float | None, value: float) -> bool:
    """Whether a metric is what stands in its line already; NaN is written as null."""
    return written == value or (math.isnan(value) and (written is None or math.isnan(written)))
