"""What a handful of seeds, or of held-out prompts, can show: means and their 95 % intervals.

Over seeds the interval is Student's t, at any number of them. Two arms of one law differ by values
that are symmetric about 0, and of these Student's t calls no more than its 5 % a difference, also
where most seeds sit at a ceiling or a floor. There, a studentized bootstrap reports a difference in
up to 14 % of such comparisons.
benchmarks/intervals.py simulates it; docs/compare.md has the tables.

Over prompts it is the interval of a proportion, since rewards are mostly shares: many prompts at 0
and a few above have no normal mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gspo.core.errors import MissingDependencyError

LEVEL = 0.95
NO_DIFFERENCE = "no difference shown"
NO_INTERVAL = "no interval, nothing shown"
_NORMAL = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
_LARGE = 1e5
"""Trials from which a proportion's interval is Student's, to four digits."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval; `low` and `high` are None if nothing is known of it."""

    mean: float
    low: float | None
    high: float | None

    @property
    def ends(self) -> str:
        """The interval alone, as text; empty if there is none.

        >>> Interval(0.5, 0.25, 0.75).ends
        '[0.250, 0.750]'
        """
        return "" if self.low is None or self.high is None else f"[{self.low:.3f}, {self.high:.3f}]"

    def __str__(self) -> str:
        return f"{self.mean:.3f} {self.ends}".rstrip()


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
    half = _t_half(len(values)) * _standard_error(values)
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


def share_interval(count: float, trials: float) -> Interval:
    """A share and its interval by Clopper and Pearson: `count` of `trials`, both may be fractions.

    It never has a width of 0: of 5 seeds of which none collapsed, half may.

    >>> print(share_interval(0, 5)); print(share_interval(4, 5))
    0.000 [0.000, 0.522]
    0.800 [0.284, 0.995]
    """
    tail = (1 - LEVEL) / 2
    quantile = require_scipy().betaincinv
    low = quantile(count, trials - count + 1, tail) if count > 0 else 0.0
    high = quantile(count + 1, trials - count, 1 - tail) if count < trials else 1.0
    return Interval(count / trials, float(low), float(high))


def reward_interval(rewards: Sequence[Sequence[float]]) -> Interval:
    """Mean reward and its interval over prompts, from the rewards of each distinct prompt.

    The mean is over all rollouts. The prompts are what was drawn: a prompt's rollouts are alike, so
    4 prompts with 100 rollouts each are 4 prompts.

    If all rewards lie in [0, 1], the mean is treated as a share, of as many trials as give it the
    variance that the prompts show (Korn and Graubard, Survey Methodology 24, 1998): rewards that
    are all 0 leave room above. Other rewards get Student's t, and none if they are all the same.

    >>> print(reward_interval([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    0.375 [0.001, 0.986]
    >>> print(reward_interval([[0.0, 0.0]] * 64))
    0.000 [0.000, 0.056]
    >>> print(reward_interval([[-1.0, 0.0], [0.0, 0.0], [-1.0, -1.0]]))
    -0.500 [-1.742, 0.742]
    """
    rollouts = [reward for of_prompt in rewards for reward in of_prompt]
    mean, variance = statistics.fmean(rollouts), _variance_of_mean(rewards)
    known = variance > 0 and len(rewards) > 1
    half = _t_half(len(rewards)) * math.sqrt(variance) if known else math.inf
    if min(rollouts) >= 0 and max(rollouts) <= 1:
        # Without variety nothing says that a prompt is worth more than one trial. A mean that is
        # rounded to 0 or 1 has none either: sums of weights end in 0.9999999999999999.
        trials = mean * (1 - mean) * (_NORMAL / half) ** 2
        trials = trials if trials > 0 else _equal_prompts(rewards)
        if trials <= _LARGE:
            found = share_interval(mean * trials, trials)
            return Interval(mean, found.low, found.high)
    return Interval(mean, mean - half, mean + half) if known else Interval(mean, None, None)


def _variance_of_mean(rewards: Sequence[Sequence[float]]) -> float:
    """Variance of the mean over all rollouts, from the spread of prompts.

    At least what rollouts would give that have nothing to do with each other: of few prompts, the
    means may be alike by chance.
    """
    rollouts = [reward for of_prompt in rewards for reward in of_prompt]
    if len(set(rollouts)) < 2:
        return 0.0
    total, mean = len(rollouts), statistics.fmean(rollouts)
    alone = statistics.variance(rollouts) / total
    if len(rewards) < 2:
        return alone
    squares = sum((math.fsum(one) - len(one) * mean) ** 2 for one in rewards)
    return max(alone, squares / total**2 * len(rewards) / (len(rewards) - 1))


def _equal_prompts(rewards: Sequence[Sequence[float]]) -> float:
    """As many prompts of one weight would give a mean as sure as these, of different weights."""
    return sum(map(len, rewards)) ** 2 / sum(len(one) ** 2 for one in rewards)


def _differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """a - b, rounded: 0.3 - 0.2 and 0.2 - 0.1 are the same difference."""
    return [round(x - y, 12) for x, y in zip(a, b, strict=True)]


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def _t_half(count: int) -> float:
    """Half of the interval of a mean of `count` values, in standard errors."""
    return float(require_scipy().stdtrit(count - 1, (1 + LEVEL) / 2))


def require_scipy() -> Any:
    """scipy.special, which comes with the extra `lab`: asked for before any work is done.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        from scipy import special
    except ImportError:
        raise MissingDependencyError("scipy", "lab", "intervals") from None
    return special
