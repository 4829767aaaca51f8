from __future__ import annotations

import asyncio

import gspo as art
from gspo.core.draws import drawing_for, purpose, seed_of


def test_seeds_are_the_same_on_every_machine():
    assert seed_of(0, "train", 3) == 5684830522523107084
    assert seed_of(1, 23) != seed_of(12, 3)
    assert 0 <= seed_of() < 2**63


async def test_a_rollout_knows_its_group_and_its_place():
    seen = {}

    async def rollout(name: str) -> art.Trajectory:
        await asyncio.sleep(0)
        seen[name] = purpose()
        return art.Trajectory(reward=0.0)

    groups = [art.TrajectoryGroup(rollout(f"{g}{r}") for r in range(2)) for g in range(2)]
    await art.gather_trajectory_groups(groups, pbar_desc=None)
    assert seen == {"00": (0, 0), "01": (0, 1), "10": (1, 0), "11": (1, 1)}
    with drawing_for("heldout", 7):
        await art.TrajectoryGroup(rollout(f"in {r}") for r in range(2))
    assert seen["in 1"] == ("heldout", 7, 1)
    await art.gather_trajectories([rollout("alone"), rollout("beside")], pbar_desc=None)
    assert seen["beside"] == (1,)
    assert purpose() == ()


async def test_requests_made_side_by_side_inside_a_rollout_are_for_that_rollout():
    seen = []

    async def request() -> None:
        seen.append(purpose())

    async def rollout() -> art.Trajectory:
        await asyncio.gather(request(), asyncio.create_task(request()))
        return art.Trajectory(reward=0.0)

    await art.TrajectoryGroup([rollout(), rollout()])
    assert sorted(seen) == [(0,), (0,), (1,), (1,)]
