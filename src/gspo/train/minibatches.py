"""Trajectory groups -> the samples and counts of one rollout batch, and its minibatches."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

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
        samples: for each trajectory its samples, group after group; `advantage` is set.
        rewards: one for each trajectory.
        dropped: trajectories that were too long and left out, by the user's choice.
    """

    samples: tuple[TrajectorySamples, ...]
    rewards: tuple[float, ...]
    dropped: int

    @property
    def groups(self) -> tuple[int, ...]:
        """The group of each trajectory."""
        return tuple(samples[0].group_id for samples in self.samples)

    def with_signal(self) -> RolloutBatch:
        """The batch without the groups in which each advantage is 0."""
        signal = self._groups_with_signal()
        chosen = [i for i, group in enumerate(self.groups) if group in signal]
        samples = tuple(self.samples[i] for i in chosen)
        return RolloutBatch(samples, tuple(self.rewards[i] for i in chosen), self.dropped)

    @property
    def flat_groups(self) -> int:
        """Groups in which each advantage is 0."""
        return len(set(self.groups) - self._groups_with_signal())

    def _groups_with_signal(self) -> set[int]:
        return {samples[0].group_id for samples in self.samples if samples[0].advantage != 0}


def why_no_update(trajectories: int, too_long: int) -> str:
    """Why no optimizer step was taken on a rollout batch.

    Args:
        trajectories: how many had a sample.
        too_long: how many were dropped.

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
    trained: list[TrajectorySamples] = []
    rewards: list[float] = []
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
        trained.append(samples)
        rewards.append(float(trajectory.reward))
    return RolloutBatch(tuple(trained), tuple(rewards), dropped=len(flat) - len(trained))


def minibatches(batch: RolloutBatch, count: int, seed: int) -> list[list[TrajectorySamples]]:
    """Trajectories in `count` parts of nearly equal size; groups in random order, kept together.

    There are fewer parts if there are fewer trajectories.
    """
    by_group: dict[int, list[TrajectorySamples]] = {}
    for samples in batch.samples:
        by_group.setdefault(samples[0].group_id, []).append(samples)
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


def shaped_reward(trajectory: Trajectory, overlong: tuple[int, int] | None) -> float:
    """The reward that advantages are made of: with DAPO's soft punishment of long completions.

    The punishment is 0 up to max_tokens - cache sampled tokens, and falls to -1 at max_tokens
    (arXiv 2503.14476, equation 13).

    Args:
        trajectory: with its reward.
        overlong: (max_tokens, cache), or None for no punishment.
    """
    reward = float(trajectory.reward)
    if overlong is None:
        return reward
    max_tokens, cache = overlong
    length = sum(len(getattr(c, "token_ids", None) or ()) for c in trajectory.choices())
    return reward + min(0.0, max(-1.0, (max_tokens - cache - length) / cache))
