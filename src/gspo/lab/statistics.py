"""What a handful of seeds can show: means and their 95 % intervals.

Over seeds the interval is Student's t, at any number of them. Two arms of one law differ by values
that are symmetric about 0, and of these Student's t calls no more than its 5 % a difference, also
where most seeds sit at a ceiling or a floor. There, a studentized bootstrap reports a difference in
up to 14 % of such comparisons.
benchmarks/intervals.py simulates it; docs/compare.md has the tables.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from gspo.experiment.heldout import Interval, require_scipy, students_half

NO_DIFFERENCE = "no difference shown"
NO_INTERVAL = "no interval, nothing shown"


def t_interval(values: Sequence[float]) -> Interval:
    """Mean and its interval by Student's t.

    One value has no interval. Nor have values that are all the same: they say how coarse rewards
    are, not how sure their mean is.

    >>> print(t_interval([1.0, 2.0, 3.0]))
    2.000 [-0.484, 4.484]
    >>> print(t_interval([1.0, 1.0, 1.0]))
    1.000
    """
    mean = statistics.fmean(values)
    if len(set(values)) < 2:
        return Interval(mean, None, None)
    half = students_half(len(values)) * _standard_error(values)
    return Interval(mean, mean - half, mean + half)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Mean of a - b over seeds, value by value, with its interval by Student's t.

    >>> print(paired_difference([0.6, 0.7], [0.5, 0.5]))
    0.150 [-0.485, 0.785]
    """
    return t_interval(_differences(a, b))


def p_value(a: Sequence[float], b: Sequence[float]) -> float | None:
    """How often arms of one law would differ by as much as these: Student's paired test.

    None if `paired_difference` has no interval; below 0.05 if that leaves out 0.

    >>> round(p_value([0.6, 0.7], [0.5, 0.5]), 3)
    0.205
    """
    differences = _differences(a, b)
    if len(set(differences)) < 2:
        return None
    t = abs(statistics.fmean(differences)) / _standard_error(differences)
    return float(2 * require_scipy().stdtr(len(differences) - 1, -t))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values after Holm's correction, in the order given.

    If no arm differs, one or more p-values fall below 0.05 in at most 5 % of comparisons, however
    many p-values there are.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    count, corrected, highest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        highest = max(highest, (count - rank) * p_values[index])
        corrected[index] = min(1.0, highest)
    return corrected


def verdict(difference: Interval, a: str, b: str) -> str:
    """Which of two is higher, if the interval leaves out 0.

    >>> verdict(Interval(0.1, -0.2, 0.4), "gspo", "grpo")
    'no difference shown'
    """
    if difference.low is None or difference.high is None:
        return NO_INTERVAL
    if difference.low > 0:
        return f"{a} higher"
    return f"{b} higher" if difference.high < 0 else NO_DIFFERENCE


def _differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """a - b, rounded: 0.3 - 0.2 and 0.2 - 0.1 are the same difference."""
    return [round(x - y, 12) for x, y in zip(a, b, strict=True)]


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))
