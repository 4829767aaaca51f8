"""What is reported of a rollout batch before any forward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gspo.core.log import log
from gspo.core.metrics import Metrics
from gspo.data.sample import TrajectorySamples, flat, split_counts
from gspo.train.minibatches import RolloutBatch
from gspo.train.settings import Settings


def describe(metrics: Metrics, batch: RolloutBatch, version: int) -> None:
    """Record the metrics of the rollout batch, which need no forward pass."""
    by_group: dict[int, list[float]] = {}
    for group, reward in zip(batch.groups, batch.rewards, strict=True):
        by_group.setdefault(group, []).append(reward)
    for rewards in by_group.values():
        metrics.mean("train/reward_std", _spread(rewards), 1)
    count = len(batch.samples)
    metrics.mean("train/reward", math.fsum(batch.rewards), count)
    if samples := flat(batch.samples):
        sampled = sum(sample.sampled for sample in samples)
        metrics.mean("tokens/completion_mean", sampled, count)
        metrics.add("tokens/completion", sampled)
        metrics.add("tokens/prompt", sum(map(len, samples)) - sampled)
        splits = split_counts(samples)
        metrics.add("tokens/splits", sum(splits.values()))
        for reason, times in splits.items():
            metrics.add(f"tokens/splits_{reason}", times)
        versions = np.concatenate([sample.policy_versions for sample in samples])
        age = version - versions[versions >= 0]
        if len(age):
            metrics.mean("staleness/mean", float(age.sum()), len(age))
            metrics.maximum("staleness/max", float(age.max()))
            metrics.mean("staleness/mixed_share", sum(map(_is_mixed, batch.samples)), count)
    if samples or batch.stale:
        metrics.add("staleness/dropped", batch.stale)
    metrics.add("train/groups_zero_advantage", batch.flat_groups)
    metrics.add("train/trajectories", count)
    metrics.add("train/trajectories_too_long", batch.dropped)


def warn_of_altered(batch: RolloutBatch, warned: set[str]) -> None:
    """Say once for each sampling parameter that tokens were drawn from another distribution.

    Args:
        batch: that is trained on.
        warned: the parameters that were named before; new ones are added.
    """
    samples = flat(batch.samples)
    if new := sorted(frozenset().union(*(s.altered_by for s in samples)) - warned):
        warned.update(new)
        share = sum(s.altered_tokens for s in samples) / sum(s.sampled for s in samples)
        log.warning(
            "%s: %.0f %% of the sampled tokens were drawn from another distribution than "
            "softmax(logits / temperature), which the ratio is taken of. The ratio of what was "
            "drawn is right, but what was drawn is not what the policy would draw: the gradient is "
            "biased. See tokens/altered_share, and leave these parameters out if you can "
            "(docs/serving.md)",
            ", ".join(new),
            100 * share,
        )


def warn_of_unread(batch: RolloutBatch, settings: Settings, warned: set[str]) -> None:
    """Say once that turn rewards were given for nothing: to a method that reads none."""
    if batch.unread and "turn_rewards" not in warned:
        warned.add("turn_rewards")
        log.warning(
            "the trajectories have turn_rewards, which algorithm=%r does not read: each turn has "
            "its trajectory's advantage. Use algorithm='sampo', or give a turn_weight",
            settings.algorithm,
        )


def _is_mixed(samples: TrajectorySamples) -> bool:
    """Whether a trajectory's tokens were sampled by more than one version of the weights."""
    versions = np.concatenate([sample.policy_versions[sample.ratio_mask] for sample in samples])
    return len(np.unique(versions)) > 1


def _spread(rewards: Sequence[float]) -> float:
    """The population standard deviation, of rewards of any size.

    >>> _spread([1e-200, 3e-200])
    1e-200
    """
    # Squares of 1e-200 are 0. Dividing by a power of two rounds nothing.
    power = math.ldexp(1.0, math.frexp(max(map(abs, rewards)))[1] - 1)
    return float(np.std(np.array(rewards) / power)) * power
