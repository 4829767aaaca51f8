from __future__ import annotations

import asyncio

import pytest

import gspo as art
from gspo.errors import DataError
from support import trajectory


async def fine(reward: float = 1.0) -> art.Trajectory:
    return trajectory(reward)


async def broken() -> art.Trajectory:
    raise RuntimeError("broken")


async def test_groups_come_back_in_order():
    groups = await art.gather_trajectory_groups(
        art.TrajectoryGroup(fine(float(g)) for _ in range(2)) for g in range(3)
    )
    assert [[t.reward for t in group] for group in groups] == [[0, 0], [1, 1], [2, 2]]


async def test_failures_within_the_budget_are_kept_apart():
    groups = await art.gather_trajectory_groups(
        [art.TrajectoryGroup([fine(), broken(), fine()])], max_exceptions=1
    )
    assert len(groups[0]) == 2
    assert groups[0].exceptions[0].message == "broken"


async def test_a_share_of_failures_may_be_allowed():
    group = art.TrajectoryGroup([fine(), broken(), fine(), fine()])
    assert len((await art.gather_trajectory_groups([group], max_exceptions=0.25))[0]) == 3
    group = art.TrajectoryGroup([fine(), broken(), broken(), fine()])
    with pytest.raises(RuntimeError, match="broken"):
        await art.gather_trajectory_groups([group], max_exceptions=0.25)


async def test_one_failure_too_many_cancels_the_rest():
    cancelled = asyncio.Event()

    async def slow() -> art.Trajectory:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return trajectory()

    with pytest.raises(RuntimeError, match="broken"):
        await art.gather_trajectory_groups(
            [art.TrajectoryGroup([slow()]), art.TrajectoryGroup([broken()])]
        )
    assert cancelled.is_set()


async def test_after_each_replaces_drops_and_splits():
    async def after(group: art.TrajectoryGroup):
        reward = group.trajectories[0].reward
        return None if reward == 0 else [group, group] if reward == 1 else group

    groups = await art.gather_trajectory_groups(
        (art.TrajectoryGroup([fine(float(r))]) for r in range(3)), after_each=after
    )
    assert [g.trajectories[0].reward for g in groups] == [1, 1, 2]


async def test_nothing_to_gather_is_an_error():
    with pytest.raises(DataError, match="at least one"):
        await art.gather_trajectory_groups([])


async def test_gather_trajectories_keeps_places():
    results = await art.gather_trajectories([fine(), broken(), fine(2.0)], max_exceptions=1)
    assert isinstance(results[1], RuntimeError)
    assert [r.reward for r in results if isinstance(r, art.Trajectory)] == [1.0, 2.0]


async def test_retry_tries_again_and_reports():
    seen: list[int] = []

    @art.retry(max_attempts=3, delay=0, on_retry=lambda error, attempt: seen.append(attempt))
    async def flaky() -> str:
        if len(seen) < 2:
            raise ValueError("not yet")
        return "done"

    assert await flaky() == "done"
    assert seen == [1, 2]


async def test_retry_gives_up_and_lets_other_errors_through():
    @art.retry(max_attempts=2, delay=0, exceptions=ValueError)
    async def other() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await other()
    with pytest.raises(DataError, match="at least 1"):
        art.retry(max_attempts=0)
