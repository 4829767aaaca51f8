from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

import gspo as art
from gspo.core.errors import ConfigError, DataError
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


async def cancels_itself() -> art.Trajectory:
    raise asyncio.CancelledError


async def test_a_rollouts_own_cancelled_error_counts_as_a_failure():
    async def waits_for_a_cancelled_task() -> art.Trajectory:
        task = asyncio.ensure_future(asyncio.sleep(60))
        asyncio.get_running_loop().call_soon(task.cancel)
        await task
        return trajectory()

    group = art.TrajectoryGroup([fine(), cancels_itself(), waits_for_a_cancelled_task()])
    (done,) = await art.gather_trajectory_groups([group], max_exceptions=2)
    assert [len(done), len(done.exceptions)] == [1, 2]
    assert "nobody has cancelled it" in done.exceptions[0].message
    with pytest.raises(DataError, match="nobody has cancelled it"):
        await art.gather_trajectory_groups([art.TrajectoryGroup([fine(), cancels_itself()])])


async def test_a_gather_that_is_cancelled_ends_whatever_its_budget():
    started = asyncio.Event()

    async def slow() -> art.Trajectory:
        started.set()
        await asyncio.sleep(60)
        return trajectory()

    work = art.gather_trajectory_groups([art.TrajectoryGroup([slow(), slow()])], max_exceptions=9)
    task = asyncio.ensure_future(work)
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("budget", [float("nan"), True, "x", None, -1, -0.5])
async def test_a_budget_that_means_nothing(budget: Any):
    calls: tuple[Any, ...] = (art.gather_trajectory_groups, art.gather_trajectories)
    for call in calls:
        with pytest.raises(ConfigError, match=r"max_exceptions = .*how many rollouts may fail"):
            await call([art.TrajectoryGroup([trajectory()])], max_exceptions=budget)


async def test_arguments_that_are_not_there_are_named():
    groups = [art.TrajectoryGroup([trajectory()])]
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"max_metrics": 3}, "'max_metrics' is not supported: .*leave it out"),
        ({"pbar_total_completion_tokens": True}, "'pbar_total_completion_tokens' is not supported"),
        ({"max_exception": 3}, "Did you mean 'max_exceptions'"),
    )
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            await art.gather_trajectory_groups(groups, **options)
    with pytest.raises(ConfigError, match="unknown argument 'after_each'"):
        await art.gather_trajectories([], after_each=None)


@pytest.mark.parametrize("reward", [None, "1.5", 1j])
async def test_a_reward_that_is_no_number_is_named_at_once(reward: Any):
    async def rollout() -> art.Trajectory:
        own = trajectory()
        own.reward = reward
        return own

    with pytest.raises(DataError, match=r"a Trajectory whose reward is .*must be a number"):
        await art.gather_trajectory_groups([art.TrajectoryGroup([rollout()])], max_exceptions=9)


async def test_metrics_of_any_kind_do_not_stop_a_gather():
    """They are refused by `train`, with their place; numpy's scalars are numbers."""

    async def rollout() -> art.Trajectory:
        own = trajectory()
        own.reward = np.float32(0.5)  # pyright: ignore[reportAttributeAccessIssue]
        own.metrics["acc"] = None  # pyright: ignore[reportArgumentType]
        return own

    (group,) = await art.gather_trajectory_groups([art.TrajectoryGroup([rollout()])])
    assert group.trajectories[0].reward == 0.5
