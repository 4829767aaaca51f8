"""What is said of a rollout batch before any forward pass: its staleness, and altered draws."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from gspo.core.metrics import Metrics
from gspo.dev import TrainConfig
from gspo.objective import PRESETS
from gspo.train.batch_metrics import describe, warn_of_altered
from gspo.train.minibatches import RolloutBatch, prepare
from gspo.train.observe import Observer
from gspo.train.settings import resolve
from gspo.trajectories import TrajectoryGroup
from support import choice, embedded, trajectory


def batch_of(*choices: Any, version: int | None = None, **options: Any) -> RolloutBatch:
    """A group of one trajectory for each, of one or more turns; rewards are 0, 1, 2, ..."""
    turns = [each if isinstance(each, list) else [each] for each in choices]
    group = TrajectoryGroup([trajectory(float(i), *each) for i, each in enumerate(turns)])
    settings = resolve(options=TrainConfig(**options))
    return prepare([group], settings, context=99, version=version)


def described(batch: RolloutBatch, version: int) -> dict[str, float]:
    metrics = Metrics()
    describe(metrics, batch, version)
    return metrics.compute()


def test_staleness_is_counted_in_versions_of_single_tokens():
    batch = batch_of(
        choice([4, 5, 6], policy_version=3, policy_versions=[3, 4, 6]),
        choice([4], policy_version=6),
        choice([4, 4], policy_version=None),  # of a server that doesn't say
    )
    metrics = described(batch, 6)
    assert metrics["staleness/mean"] == pytest.approx((3 + 2 + 0 + 0) / 4)
    assert metrics["staleness/max"] == 3
    assert metrics["staleness/mixed_share"] == pytest.approx(1 / 3)
    assert metrics["staleness/dropped"] == 0


def test_turns_of_different_versions_are_a_mixed_trajectory():
    first = choice([4, 5], [1], policy_version=1)
    second = choice([7], [1, 4, 5, 6], policy_version=2)
    apart = choice([7], [9], policy_version=2)  # another sample
    for turns in ([first, second], [first, apart]):
        batch = batch_of(turns, choice([4], policy_version=2))
        assert described(batch, 2)["staleness/mixed_share"] == 0.5


@pytest.mark.parametrize(("most", "left"), [(None, 3), (3, 3), (2, 2), (1, 2), (0, 1)])
def test_what_is_too_old_is_dropped_and_counted(most: int | None, left: int):
    """By its oldest token; versions that are not known count as young."""
    made = [
        choice([4, 5], policy_version=2, policy_versions=[2, 5]),
        choice([4], policy_version=4),
        choice([4], policy_version=None),
    ]
    batch = batch_of(*made, version=5, max_staleness=most)
    assert (len(batch.samples), batch.stale, batch.dropped) == (left, 3 - left, 0)
    assert described(batch, 5)["staleness/dropped"] == 3 - left
    # Its reward was part of the group's mean all the same.
    assert batch.samples[-1][0].advantage > 1
    assert batch.with_signal().stale == 3 - left


def test_without_a_version_nothing_is_too_old():
    assert batch_of(*[choice([4], policy_version=0)] * 2, max_staleness=0).stale == 0


def test_a_batch_that_is_too_old_as_a_whole_says_so():
    old = [choice([4], policy_version=0), choice([5], policy_version=0)]
    batch = batch_of(*old, version=2, max_staleness=1)
    assert (batch.samples, batch.stale) == ((), 2)
    assert described(batch, 2)["staleness/dropped"] == 2


ALTERED = [
    choice([4, 5, 6], altered_by=["top_p", "top_k"]),
    [choice([4], [1]), choice([7, 8], [1, 4, 5], altered_by=["grammar"])],
    choice([4, 5, 6, 7]),
]


def test_the_share_of_trained_tokens_that_were_drawn_otherwise():
    """The middle one has no advantage; with a KL term it is trained on as well."""
    batch = batch_of(*ALTERED)
    assert [[s.altered_tokens for s in samples] for samples in batch.samples] == [[3], [2], [0]]
    policy, objective = embedded(), PRESETS["gspo"].objective
    for coefficient, share in ((0.0, 3 / 7), (0.1, 5 / 10)):
        watch = Observer(policy, batch)
        watch.done(resolve(options=TrainConfig(kl_penalty_coef=coefficient)).objective)
        assert watch.metrics.compute()["tokens/altered_share"] == pytest.approx(share)
    assert objective.kl_coef == 0


def test_each_parameter_is_warned_of_once(caplog: pytest.LogCaptureFixture):
    warned: set[str] = set()
    with caplog.at_level(logging.WARNING, "gspo"):
        warn_of_altered(batch_of(choice([4]), choice([5])), warned)
        assert not caplog.records
        warn_of_altered(batch_of(*ALTERED), warned)
        warn_of_altered(batch_of(*ALTERED), warned)
        (record,) = caplog.records
        assert record.getMessage().startswith("grammar, top_k, top_p: 50 % of the sampled tokens")
        assert "biased" in record.getMessage() and "docs/serving.md" in record.getMessage()
        greedy = choice([4], altered_by=["temperature", "top_p"])
        warn_of_altered(batch_of(greedy, greedy), warned)
    assert caplog.records[1].getMessage().startswith("temperature: 100 %")
