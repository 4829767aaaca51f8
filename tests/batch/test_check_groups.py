"""Batches that cannot be trained on are refused at the door."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

import pytest

from gspo.batch.sample import check_groups
from gspo.errors import DataError
from gspo.trajectory import Trajectory, TrajectoryGroup
from support import trajectory


def group(*rewards: float) -> TrajectoryGroup:
    return TrajectoryGroup([trajectory(reward) for reward in rewards])


def test_good_groups_pass() -> None:
    check_groups([group(0.0, 1.0), group(1.0, 1.0, 1.0)])


def test_no_groups() -> None:
    with pytest.raises(DataError, match="empty list"):
        check_groups([])


@pytest.mark.parametrize("rewards", [[], [1.0]])
def test_a_group_compares_at_least_two(rewards: list[float]) -> None:
    with pytest.raises(DataError, match=rf"group 1 has {len(rewards)} trajectories .* at least 2"):
        check_groups([group(0.0, 1.0), group(*rewards)])


def test_failed_rollouts_do_not_count_but_are_told() -> None:
    failed = TrajectoryGroup([trajectory(1.0)], exceptions=[RuntimeError("boom")])
    with pytest.raises(DataError, match=r"1 trajectories \(1 failed\)"):
        check_groups([failed])
    check_groups([TrajectoryGroup(list(group(0.0, 1.0)), exceptions=[RuntimeError("boom")])])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_named(bad: float) -> None:
    with pytest.raises(DataError, match=r"group 1, trajectory 2: reward is"):
        check_groups([group(0.0, 1.0), group(0.0, 1.0, bad)])


class Rollout:
    """Awaitable, and silent when nobody awaits it."""

    def __await__(self) -> Generator[Any, None, Trajectory]:
        yield from ()
        return trajectory(1.0)


async def test_coroutines_must_have_run() -> None:
    pending = TrajectoryGroup([Rollout(), Rollout()])
    with pytest.raises(DataError, match="group 0 holds coroutines"):
        check_groups([pending])
    check_groups([await pending])


@pytest.mark.usefixtures("unhooked")
def test_a_list_of_trajectories_is_no_group() -> None:
    with pytest.raises(DataError, match="group 0 is a list, not a TrajectoryGroup"):
        check_groups([list(group(0.0, 1.0))])  # type: ignore[list-item]
