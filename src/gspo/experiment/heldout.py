"""Held-out reward: how well the model does on prompts that it is not trained on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from statistics import fmean

from gspo.core.errors import MissingDependencyError
from gspo.core.intervals import Interval, reward_interval
from gspo.trajectories import Trajectory, TrajectoryGroup

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
        interval = Interval(fmean(itertools.chain(*units)), None, None)
    return Estimate(interval.mean, interval.low, interval.high, len(by_prompt))


def _prompt(trajectory: Trajectory) -> str:
    """What stands before the model's first turn, whoever made it; or the environment's instance."""
    if (instance := trajectory.metadata.get("instance")) is not None:
        return str(instance)
    before = itertools.takewhile(lambda i: isinstance(i, dict), trajectory.messages_and_choices)
    return json.dumps([list(before), trajectory.tools], sort_keys=True, default=str)
