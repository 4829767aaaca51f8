"""A rollout batch, its minibatches, and how many tokens a microbatch has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gspo import TrajectoryGroup
from gspo.core.errors import DataError, SampleTooLongError
from gspo.dev import TrainConfig
from gspo.train.minibatches import (
    ACTIVATION_BYTES,
    activation_bytes,
    minibatches,
    prepare,
    shaped_reward,
    token_budget,
)
from gspo.train.settings import resolve
from support import choice, trajectory

CENTRED = resolve(options=TrainConfig(scale_rewards=False))


def groups(*rewards: tuple[float, ...]) -> list[TrajectoryGroup]:
    return [TrajectoryGroup([trajectory(r) for r in own]) for own in rewards]


def order(parts) -> list[int]:
    return [samples[0].trajectory_id for part in parts for samples in part]


def test_advantages_are_standardised_per_group():
    batch = prepare(groups((1, 0), (5, 5), (0, 4)), context=99)
    assert [s[0].advantage for s in batch.samples] == [1, -1, 0, 0, -1, 1]
    assert batch.flat_groups == 1


def test_unscaled_advantages_are_centred_only():
    batch = prepare(groups((1, 0), (0, 4)), CENTRED, context=99)
    assert [s[0].advantage for s in batch.samples] == [0.5, -0.5, -2, 2]


def test_an_advantage_beyond_float32_is_refused_with_the_group():
    huge = groups((0, 1), (1e99, 1.0))
    assert [s[0].advantage for s in prepare(huge, context=99).samples] == [-1, 1, 1, -1]
    with pytest.raises(DataError, match=r"group 1: an advantage is 5e\+98.*divide the rewards"):
        prepare(huge, CENTRED, context=99)


@pytest.mark.parametrize(("length", "fall"), [(79, 0.0), (80, 0.0), (90, 0.5), (100, 1), (150, 1)])
def test_the_overlong_punishment_falls_linearly_to_minus_one(length: int, fall: float):
    long = trajectory(2.0, choice([4] * length))
    options = TrainConfig(overlong_max_tokens=100, overlong_cache=20)
    assert shaped_reward(long, options) == 2.0 - fall
    assert shaped_reward(long, TrainConfig()) == 2.0


def test_the_overlong_punishment_is_in_the_advantages_and_not_in_the_rewards():
    """Lengths 2 and 8 of at most 10, cache 4: 8 tokens cost 0.5. All turns count."""
    short, long = choice([4, 5], [1]), [choice([4] * 5, [1]), choice([5] * 3, [2])]
    group = TrajectoryGroup([trajectory(0.25, short), trajectory(1.0, *long)])
    options = TrainConfig(scale_rewards=False, overlong_max_tokens=10, overlong_cache=4)
    batch = prepare([group], resolve(options=options), context=99)
    assert batch.rewards == (0.25, 1.0)
    assert [samples[0].advantage for samples in batch.samples] == [-0.125, 0.125]


def test_minibatches_keep_groups_together_and_lose_nothing():
    batch = prepare(groups(*[(0, 1, 2, 3)] * 8), context=99)
    parts = minibatches(batch, 4, seed=1)
    assert [len(part) for part in parts] == [8, 8, 8, 8]
    for part in parts:
        assert len({s[0].group_id for s in part}) == 2
    assert sorted(order(parts)) == list(range(32))
    assert order(parts) == order(minibatches(batch, 4, seed=1))
    assert order(parts) != order(minibatches(batch, 4, seed=2))


def test_fewer_trajectories_than_minibatches():
    parts = minibatches(prepare(groups((0, 1)), context=99), 4, seed=0)
    assert [len(part) for part in parts] == [1, 1]


def test_too_long_is_named_or_dropped_by_choice():
    batch = groups((0.0, 1.0))
    batch[0].trajectories.append(trajectory(2.0, choice([5] * 50)))
    with pytest.raises(SampleTooLongError, match=r"trajectory 2 has 53 tokens.*context is 20"):
        prepare(batch, context=20)
    drops = resolve(options=TrainConfig(on_too_long="drop"))
    kept = prepare(batch, drops, context=20)
    assert (len(kept.samples), kept.dropped) == (2, 1)
    # Its reward still was part of the group's mean.
    assert kept.samples[1][0].advantage == pytest.approx(0.0)


# Tokens of a microbatch, by the memory that their activations take


def shape(width: int, layers: int) -> SimpleNamespace:
    return SimpleNamespace(hidden_size=width, num_hidden_layers=layers)


def test_what_fits_is_within_the_bytes():
    model = shape(896, 24)
    fits = token_budget(model, False)
    each = activation_bytes(model, False)
    assert fits * each <= ACTIVATION_BYTES < (fits + 1) * each


def test_checkpointing_keeps_less_and_fits_more():
    model = shape(2048, 24)
    assert activation_bytes(model, True) < activation_bytes(model, False)
    assert token_budget(model, True) > token_budget(model, False)


def test_no_model_has_too_few_or_too_many():
    assert token_budget(shape(65_536, 200), False) == 256
    assert token_budget(shape(8, 1), False) == 16_384
