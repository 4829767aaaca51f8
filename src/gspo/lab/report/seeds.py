"""Means over seeds and their 95 % t intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gspo.lab.statistics import t_interval


@dataclass(frozen=True)
class SeedCurve:
    """A metric over steps. The interval is None where the seeds' values show no spread."""

    steps: list[int]
    mean: list[float]
    low: list[float | None]
    high: list[float | None]


def seed_curve(curves: Sequence[Mapping[str, Sequence[Any]]]) -> SeedCurve:
    """Mean and interval over the seeds that have a step; values that are not finite are left out.

    >>> seed_curve([{"step": [1], "value": [0.0]}, {"step": [1], "value": [2.0]}]).mean
    [1.0]
    """
    by_step: dict[int, list[float]] = {}
    for one in curves:
        for step, value in zip(one["step"], one["value"], strict=True):
            if value is not None and math.isfinite(value):
                by_step.setdefault(int(step), []).append(float(value))
    steps = sorted(by_step)
    found = [t_interval(by_step[step]) for step in steps]
    return SeedCurve(
        steps, [f.mean for f in found], [f.low for f in found], [f.high for f in found]
    )
