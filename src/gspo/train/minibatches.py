"""Trajectory groups -> the samples and counts of one rollout batch, and its minibatches."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gspo.core.errors import DataError, SampleTooLongError
from gspo.core.timing import timed
from gspo.data.check import check_groups
from gspo.data.sample import TrajectorySamples, trajectory_samples
from gspo.objective import AdvantageKind, Objective, advantages
from gspo.trajectory import Trajectory, TrajectoryGroup


@dataclass(frozen=True)
class RolloutBatch:
    """What one call of `train` works on.

    Attributes:
        samples: of each trajectory, its samples; `advantage` is set.
        groups: of each trajectory, its group.
        rewards: of each trajectory.
        dropped: trajectories that were too long and left out, by the user's choice.
    """

    samples: tuple[TrajectorySamples, ...]
    groups: tuple[int, ...]
    rewards: tuple[float, ...]
    dropped: int

    @property
    def groups_with_signal(self) -> frozenset[int]:
        """Groups in which some advantage is not 0."""
        return frozenset(s[0].group_id for s in self.samples if s[0].advantage != 0)

    def with_signal(self) -> RolloutBatch:
        """Without the groups whose rewards are all equal."""
        wanted = self.groups_with_signal
        columns = zip(self.samples, self.groups, self.rewards, strict=True)
        signal = [column for column in columns if column[1] in wanted]
        samples, groups, rewards = zip(*signal, strict=True) if signal else ((), (), ())
        return RolloutBatch(samples, groups, rewards, self.dropped)

    @property
    def flat_groups(self) -> int:
        """Groups in which every advantage is 0."""
        return len(set(self.groups) - self.groups_with_signal)


def why_no_update(trajectories: int, too_long: int) -> str:
    """Why no step was taken on a batch.

    Args:
        trajectories: that had a sample.
        too_long: that were dropped.

    >>> why_no_update(0, 4)
    'all 4 trajectories are longer than the context'
    """
    if trajectories == 0:
        return f"all {too_long} trajectories are longer than the context"
    return "all advantages are 0: each group has equal rewards or a single trajectory"


@timed("packing")
def prepare(
    groups: Sequence[TrajectoryGroup],
    *,
    context: int,
    vocabulary: int | None = None,
    advantage: AdvantageKind = "group_std",
    drop_too_long: bool = False,
    overlong: tuple[int, int] | None = None,
) -> RolloutBatch:
    """Check the groups, tokenise nothing, and compute the advantages.

    `context` and `vocabulary` are the model's, in tokens; None: any token id is taken.
    `overlong` is (max_tokens, cache) of DAPO's soft punishment, added to the rewards first.

    Advantages are computed over the whole group, before anything is dropped.

    Raises:
        DataError: see `check_groups` and `trajectory_samples`; an advantage beyond float32.
    """
    check_groups(groups)
    flat = [
        (g, t, trajectory) for g, group in enumerate(groups) for t, trajectory in enumerate(group)
    ]
    shaped = [shaped_reward(trajectory, overlong) for _, _, trajectory in flat]
    values = advantages(
        advantage,
        torch.tensor(shaped, dtype=torch.float64),
        torch.tensor([g for g, _, _ in flat]),
    ).tolist()
    prepared: list[tuple[TrajectorySamples, int, float]] = []
    for i, (g, t, trajectory) in enumerate(flat):
        if abs(values[i]) > torch.finfo(torch.float32).max:
            raise DataError(
                f"group {g}: an advantage is {values[i]:.3g}, which is beyond float32: divide the "
                "rewards by their size, or use an algorithm that divides by their spread (gspo)"
            )
        try:
            samples = trajectory_samples(
                trajectory,
                trajectory_id=i,
                group_id=g,
                advantage=values[i],
                max_tokens=context,
                vocabulary=vocabulary,
                where=f"group {g}, trajectory {t}",
            )
        except SampleTooLongError:
            if not drop_too_long:
                raise
            continue
        prepared.append((tuple(samples), g, float(trajectory.reward)))
    trained, of_group, rewards = zip(*prepared, strict=True) if prepared else ((), (), ())
    return RolloutBatch(trained, of_group, rewards, dropped=len(flat) - len(prepared))


def minibatches(batch: RolloutBatch, count: int, seed: int) -> list[list[TrajectorySamples]]:
    """Trajectories in `count` near-equal parts; groups in random order, kept together.

    Fewer parts where there are fewer trajectories.
    """
    by_group: dict[int, list[TrajectorySamples]] = {}
    for samples, group in zip(batch.samples, batch.groups, strict=True):
        by_group.setdefault(group, []).append(samples)
    order = sorted(by_group)
    random.Random(seed).shuffle(order)
    units = [samples for group in order for samples in by_group[group]]
    count = min(count, len(units))
    edges = [round(i * len(units) / count) for i in range(count + 1)] if count else [0]
    return [units[a:b] for a, b in itertools.pairwise(edges)]


def with_gradient(
    minibatch: Sequence[TrajectorySamples], objective: Objective
) -> list[TrajectorySamples]:
    """The trajectories that have a gradient: those with an advantage, or all with a KL term."""
    return [s for s in minibatch if objective.kl_coef > 0 or s[0].advantage != 0]


def reward_std(rewards: Sequence[float]) -> float:
    """Population standard deviation, of rewards of any size.

    >>> reward_std([1.0, 3.0])
    1.0
    """
    # Squares of rewards such as 1e200 overflow; dividing by a power of two rounds nothing.
    power = math.ldexp(1.0, math.frexp(max(map(abs, rewards)))[1] - 1)
    return float(np.std(np.array(rewards) / power)) * power


def overlong_punishment(length: int, max_tokens: int, cache: int) -> float:
    """0 up to max_tokens - cache, falling to -1 at max_tokens (DAPO, arXiv 2503.14476, eq. 13).

    >>> [overlong_punishment(n, 100, 20) for n in (80, 90, 100, 150)]
    [0.0, -0.5, -1.0, -1.0]
    """
    return min(0.0, max(-1.0, (max_tokens - cache - length) / cache))


def shaped_reward(trajectory: Trajectory, overlong: tuple[int, int] | None) -> float:
    """The reward that advantages are made of: with the punishment of (max_tokens, cache)."""
    reward = float(trajectory.reward)
    if overlong is None:
        return reward
    length = sum(len(getattr(c, "token_ids", None) or ()) for c in trajectory.choices())
    return reward + overlong_punishment(length, *overlong)
