"""Held-out reward, on prompts that are not trained on, and the 95 % intervals of means of rewards.

Over prompts it is the interval of a proportion, since rewards are mostly shares: many prompts at 0
and a few above have no normal mean. benchmarks/intervals.py simulates it; docs/compare.md has the
tables.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from gspo.core.byname import optional
from gspo.core.errors import MissingDependencyError
from gspo.trajectories import Trajectory, TrajectoryGroup

LEVEL = 0.95
_NORMAL = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
_LARGE = 1e5
"""Trials from which a proportion's interval is Student's, to four digits."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval; `low` and `high` are None if nothing is known of it."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


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

    Raises:
        MissingDependencyError: scipy is not installed.

    >>> print(reward_interval([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    0.375 [0.001, 0.986]
    >>> print(reward_interval([[0.0, 0.0]] * 64))
    0.000 [0.000, 0.056]
    >>> print(reward_interval([[-1.0, 0.0], [0.0, 0.0], [-1.0, -1.0]]))
    -0.500 [-1.742, 0.742]
    """
    rollouts = [reward for of_prompt in rewards for reward in of_prompt]
    mean, variance = statistics.fmean(rollouts), _variance_of_mean(rewards)
    varies = variance > 0 and len(rewards) > 1
    half = students_half(len(rewards)) * math.sqrt(variance) if varies else math.inf
    if min(rollouts) >= 0 and max(rollouts) <= 1:
        # Without variety nothing says that a prompt is worth more than one trial. A mean that is
        # rounded to 0 or 1 has none either: sums of weights end in 0.9999999999999999.
        trials = mean * (1 - mean) * (_NORMAL / half) ** 2
        trials = trials if trials > 0 else _equal_prompts(rewards)
        if trials <= _LARGE:
            share = share_interval(mean * trials, trials)
            return Interval(mean, share.low, share.high)
    return Interval(mean, mean - half, mean + half) if varies else Interval(mean, None, None)


def _variance_of_mean(rewards: Sequence[Sequence[float]]) -> float:
    """Variance of the mean over all rollouts, from the spread of prompts.

    At least what rollouts would give that have nothing to do with each other: of few prompts, the
    means may be alike by chance.
    """
    rollouts = [reward for of_prompt in rewards for reward in of_prompt]
    if len(set(rollouts)) < 2:
        return 0.0
    total, mean = len(rollouts), statistics.fmean(rollouts)
    unrelated = statistics.variance(rollouts) / total
    if len(rewards) < 2:
        return unrelated
    squares = sum((math.fsum(of_one) - len(of_one) * mean) ** 2 for of_one in rewards)
    return max(unrelated, squares / total**2 * len(rewards) / (len(rewards) - 1))


def _equal_prompts(rewards: Sequence[Sequence[float]]) -> float:
    """How many prompts of equal weight give a mean as sure as these prompts of unequal weight."""
    return sum(map(len, rewards)) ** 2 / sum(len(of_one) ** 2 for of_one in rewards)


def students_half(count: int) -> float:
    """Half of Student's interval of a mean of `count` values, in standard errors."""
    return float(require_scipy().stdtrit(count - 1, (1 + LEVEL) / 2))


def require_scipy() -> Any:
    """scipy.special, which comes with the extra `lab`: asked for before any work is done.

    Raises:
        MissingDependencyError: it is not installed.
    """
    return optional("scipy.special", "scipy", "lab", "the 95 % interval of a mean")


_NAMES = ("val/reward", "val/reward_low", "val/reward_high", "val/prompts")
"""The metrics of an estimate, in the order of its fields."""


@dataclass(frozen=True)
class Estimate(Interval):
    """Held-out reward: its mean over rollouts, and the 95 % interval of that over prompts.

    Attributes:
        prompts: how many distinct ones; None in the log of an older run.
    """

    prompts: int | None = None

    def metrics(self) -> dict[str, float]:
        """The estimate as a run logs it."""
        values = zip(_NAMES, astuple(self), strict=True)
        return {name: value for name, value in values if value is not None}

    @classmethod
    def logged(cls, record: Mapping[str, float]) -> Estimate:
        """The estimate of a line of metrics.jsonl."""
        return cls(*(record.get(name) for name in _NAMES))  # pyright: ignore[reportArgumentType]


def estimate_reward(groups: Sequence[TrajectoryGroup]) -> Estimate:
    """Held-out reward from rollouts, with an interval that counts distinct prompts.

    If all rollouts have the same prompt, its reward is what is estimated, and its groups are what
    is counted. Without scipy there is no interval.
    """
    by_prompt: dict[str, list[float]] = {}
    groups = [group for group in groups if len(group)]  # else no rollout of it ended in time
    for group in groups:  # a prompt that is drawn twice is no new evidence
        by_prompt.setdefault(_prompt(group.trajectories[0]), []).extend(t.reward for t in group)
    units = list(by_prompt.values())
    if len(units) == 1:
        units = [[t.reward for t in group] for group in groups]
    try:
        interval = reward_interval(units)
    except MissingDependencyError:
        interval = Interval(statistics.fmean(itertools.chain(*units)), None, None)
    return Estimate(interval.mean, interval.low, interval.high, len(by_prompt))


def _prompt(trajectory: Trajectory) -> str:
    """What stands before the model's first turn, whoever made it; or the environment's instance."""
    if (instance := trajectory.metadata.get("instance")) is not None:
        return str(instance)
    before = itertools.takewhile(lambda i: isinstance(i, dict), trajectory.messages_and_choices)
    return json.dumps([list(before), trajectory.tools], sort_keys=True, default=str)
