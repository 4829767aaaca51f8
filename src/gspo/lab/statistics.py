"""What a handful of seeds can show: means, paired differences and their 95 % intervals.

A percentile bootstrap is too narrow for few values: of 5 normal values it covers the mean in 83 %
of the cases, not in 95 %. So below `FEW` values the interval is Student's t, exact for normal
values; from there on it is the studentized bootstrap, which follows skewed values too (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, section 12.5).
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
FEW = 10
NO_DIFFERENCE = "no difference shown"
NO_INTERVAL = "no interval, nothing shown"


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval; `low` and `high` are None where nothing is known of it."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean and its interval by Student's t.

    >>> print(t_interval([1.0, 2.0, 3.0]))
    2.000 [-0.484, 4.484]
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None)
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = t_quantile((1 + level) / 2, len(values) - 1) * error
    return Interval(mean, mean - half, mean + half)


def bootstrap_t_interval(
    values: Sequence[float], level: float = LEVEL, draws: int = 4000
) -> Interval:
    """Mean and its studentized bootstrap interval, from a fixed seed.

    Each draw's mean is measured in its own standard errors; the quantiles of that take the place of
    Student's.
    """
    size, mean = len(values), statistics.fmean(values)
    if size < 2:
        return Interval(mean, None, None)
    rng = random.Random(0)
    error = statistics.stdev(values) / math.sqrt(size)
    shifts = []
    for _ in range(draws):
        drawn = rng.choices(values, k=size)
        middle = sum(drawn) / size
        squares = sum((value - middle) ** 2 for value in drawn)
        if len(set(drawn)) > 1:  # a draw of one value alone has no standard error
            shifts.append((middle - mean) / math.sqrt(squares / (size - 1) / size))
    shifts.sort()
    if not shifts:
        return Interval(mean, mean, mean)
    tail = int((1 - level) / 2 * len(shifts))
    return Interval(mean, mean - shifts[-1 - tail] * error, mean - shifts[tail] * error)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Mean of a - b over seeds, value by value, with an interval that fits their number.

    Where every seed differs by the same, and not by 0, the spread is below what the rewards can
    resolve: an interval without width would be a claim, so there is none.

    >>> print(paired_difference([0.6, 0.7], [0.5, 0.5]))
    0.150 [-0.485, 0.785]
    """
    # Rounded: 0.3 - 0.2 and 0.2 - 0.1 are the same difference.
    differences = [round(x - y, 12) for x, y in zip(a, b, strict=True)]
    if len(set(differences)) == 1 and differences[0] != 0:
        return Interval(differences[0], None, None)
    return t_interval(differences) if len(differences) < FEW else bootstrap_t_interval(differences)


def verdict(difference: Interval, a: str, b: str) -> str:
    """Which of two is higher, where the interval leaves 0 out.

    >>> verdict(Interval(0.1, -0.2, 0.4), "gspo", "grpo")
    'no difference shown'
    """
    if difference.low is None or difference.high is None:
        return NO_INTERVAL
    if difference.low > 0:
        return f"{a} higher"
    return f"{b} higher" if difference.high < 0 else NO_DIFFERENCE


def t_quantile(share: float, freedom: int) -> float:
    """Quantile of Student's t with a whole number of degrees of freedom.

    >>> round(t_quantile(0.975, 4), 4)
    2.7764
    """
    if not (0 < share < 1 and freedom >= 1):
        raise ValueError(f"share = {share} must be in (0, 1), freedom = {freedom} at least 1")
    if share < 0.5:
        return -t_quantile(1 - share, freedom)
    high = 1.0
    while _t_cdf(high, freedom) < share:
        high *= 2
    low = 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, freedom: int) -> float:
    """For t >= 0, by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2 == 1
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(3 if odd else 2, freedom + 1, 2):
        total += term
        term *= square * (k - 1) / k
    inside = (angle + sine * total) * 2 / math.pi if odd else sine * total
    return (1 + inside) / 2
