"""Metrics that know how they are reduced, so that they are exact over any split of the work.

>>> metrics = Metrics()
>>> metrics.mean("reward", total=3.0, count=2)
>>> metrics.mean("reward", total=0.0, count=1)
>>> metrics.compute()
{'reward': 1.0}
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

OF_A_SPLIT = frozenset(
    {"reward", "reward_std", "reward_low", "reward_high", "prompts", "exceptions", "skipped"}
    | {"groups_zero_advantage", "trajectories", "trajectories_too_long"}
)
"""gspo's names below a split, such as `train/reward`."""
OF_TRAINING = frozenset(
    {"time/train", "time/publish", "time/receipt", "time/checkpoint"}
    | {"throughput/trained_tokens_per_second"}
)
"""gspo's names in families that a user's loop may extend, for example with `time/rollout`."""
FAMILIES = frozenset(
    {"loss", "ratio", "mismatch", "moe", "optim", "sft", "tokens", "staleness", "publish"}
)
"""First parts of gspo's other names, such as `loss/policy`."""

QUANTILES: Mapping[str, float] = {"p01": 0.01, "p50": 0.5, "p99": 0.99}


def is_ours(name: str) -> bool:
    """Whether gspo may write a metric of this name, with or without a split before it.

    >>> is_ours("reward"), is_ours("loss/policy"), is_ours("right")
    (True, True, False)
    """
    return name in OF_A_SPLIT | OF_TRAINING or name.partition("/")[0] in FAMILIES


def user_metric(name: str, split: str) -> str:
    """The name that a user's metric is written under, so that it replaces none of gspo's.

    >>> user_metric("right", "val"), user_metric("reward", "val"), user_metric("loss/kl", "val")
    ('val/right', 'val/user/reward', 'val/user/loss/kl')
    >>> user_metric("costs/judge", "train"), user_metric("val/reward", "train")
    ('costs/judge', 'val/user/reward')
    """
    first, slash, rest = name.partition("/")
    if is_ours(name):
        return f"{split}/user/{name}"
    if slash and rest in OF_A_SPLIT:
        return f"{first}/user/{rest}"
    return name if slash else f"{split}/{name}"


@dataclass
class Metrics:
    """Sums, means by count, maxima and distributions, to which is added in any order."""

    _sums: dict[str, float] = field(default_factory=dict)
    _means: dict[str, tuple[float, float]] = field(default_factory=dict)
    _maxima: dict[str, float] = field(default_factory=dict)
    _values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        """Add to a metric that is reduced by its sum."""
        self._sums[name] = self._sums.get(name, 0.0) + value

    def mean(self, name: str, total: float, count: float) -> None:
        """Add `total` over `count` to a metric that is reduced to sum(total) / sum(count)."""
        old_total, old_count = self._means.get(name, (0.0, 0.0))
        self._means[name] = (old_total + total, old_count + count)

    def maximum(self, name: str, value: float) -> None:
        """Add to a metric that is reduced by its maximum."""
        self._maxima[name] = max(self._maxima.get(name, -math.inf), value)

    def distribution(self, name: str, values: Iterable[float]) -> None:
        """Add values to a metric whose mean, quantiles and largest magnitude are reported."""
        self._values.setdefault(name, []).extend(values)

    def compute(self) -> dict[str, float]:
        """Name -> value, sorted by name. A mean over nothing is left out; a zero has no sign."""
        out: dict[str, float] = dict(self._sums) | dict(self._maxima)
        out |= {name: total / count for name, (total, count) in self._means.items() if count}
        for name, values in self._values.items():
            out |= {f"{name}_{key}": value for key, value in _summarise(values).items()}
        return {name: out[name] + 0.0 for name in sorted(out)}  # -0.0 + 0.0 is 0.0


def _summarise(values: list[float]) -> dict[str, float]:
    """Mean, largest magnitude and quantiles of values, whatever their order; {} of none."""
    if not values:
        return {}
    ordered = sorted(values)
    out = {"mean": math.fsum(ordered) / len(ordered), "abs_max": max(-ordered[0], ordered[-1])}
    return out | {key: _quantile(ordered, q) for key, q in QUANTILES.items()}


def _quantile(ordered: list[float], q: float) -> float:
    """Linear interpolation between closest ranks."""
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
