"""Trajectory groups -> the samples and counts of one rollout batch, and its minibatches."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gspo.batch.sample import Sample, check_groups, trajectory_samples
from gspo.errors import SampleTooLongError
from gspo.objective import group_advantages
from gspo.trajectory import TrajectoryGroup


@dataclass(frozen=True)
class RolloutBatch:
    """What one call of `train` works on.

    Attributes:
        samples: of each trajectory, its samples; `advantage` is set.
        groups: of each trajectory, its group.
        rewards: of each trajectory.
        dropped: trajectories that were too long and left out, by the user's choice.
    """

    samples: tuple[tuple[Sample, ...], ...]
    groups: tuple[int, ...]
    rewards: tuple[float, ...]
    dropped: int

    @property
    def flat_groups(self) -> int:
        """Groups in which every advantage is 0."""
        signal = {s[0].group_id for s in self.samples if s[0].advantage != 0}
        return len(set(self.groups) - signal)


def prepare(
    groups: Sequence[TrajectoryGroup],
    *,
    context: int,
    scale_rewards: bool = True,
    drop_too_long: bool = False,
) -> RolloutBatch:
    """Check the groups, tokenise nothing, and compute the advantages (GSPO, equation 6).

    Advantages are computed over the whole group, before anything is dropped.

    Raises:
        DataError: see `check_groups` and `trajectory_samples`.
    """
    check_groups(groups)
    flat = [(g, trajectory) for g, group in enumerate(groups) for trajectory in group]
    rewards = [float(trajectory.reward) for _, trajectory in flat]
    advantages = group_advantages(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor([g for g, _ in flat]),
        scale=scale_rewards,
    ).tolist()
    kept: list[tuple[tuple[Sample, ...], int, float]] = []
    dropped = 0
    for i, (g, trajectory) in enumerate(flat):
        try:
            samples = trajectory_samples(
                trajectory, trajectory_id=i, group_id=g, advantage=advantages[i], max_tokens=context
            )
        except SampleTooLongError:
            if not drop_too_long:
                raise
            dropped += 1
            continue
        kept.append((tuple(samples), g, rewards[i]))
    return RolloutBatch(
        samples=tuple(samples for samples, _, _ in kept),
        groups=tuple(g for _, g, _ in kept),
        rewards=tuple(reward for _, _, reward in kept),
        dropped=dropped,
    )


def minibatches(batch: RolloutBatch, count: int, seed: int) -> list[list[tuple[Sample, ...]]]:
    """Trajectories in `count` near-equal parts; groups in random order, kept together.

    Fewer parts where there are fewer trajectories.
    """
    by_group: dict[int, list[tuple[Sample, ...]]] = {}
    for samples, group in zip(batch.samples, batch.groups, strict=True):
        by_group.setdefault(group, []).append(samples)
    order = sorted(by_group)
    random.Random(seed).shuffle(order)
    units = [samples for group in order for samples in by_group[group]]
    count = min(count, len(units))
    edges = [round(i * len(units) / count) for i in range(count + 1)] if count else [0]
    return [units[a:b] for a, b in itertools.pairwise(edges)]


def without_advantage(samples: Sequence[Sample]) -> bool:
    """True where a trajectory gives no policy gradient."""
    return samples[0].advantage == 0
