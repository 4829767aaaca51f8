"""Means over seeds and their 95 % t intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_Z = 1.959963984540054


@dataclass(frozen=True)
class SeedCurve:
    """A metric over steps. The interval is None where fewer than two seeds have the step."""

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
    found = [interval(by_step[step]) for step in steps]
    return SeedCurve(
        steps, [mean for mean, _, _ in found], [f[1] for f in found], [f[2] for f in found]
    )


def interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean, low and high of a 95 % t interval; no bounds for one value.

    >>> tuple(round(v, 3) for v in interval([0.0, 1.0, 2.0]))
    (1.0, -1.484, 3.484)
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None, None
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1))
    half = student_t_975(count - 1) * deviation / math.sqrt(count)
    return mean, mean - half, mean + half


def student_t_975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t.

    Exact for 1 and 2 degrees of freedom; else the expansion in 1/freedom of Abramowitz and Stegun,
    26.7.5, which is off by 0.12 % at 3 and by less beyond.

    >>> [round(student_t_975(n), 2) for n in (1, 2, 4, 9, 100)]
    [12.71, 4.3, 2.78, 2.26, 1.98]
    """
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))
