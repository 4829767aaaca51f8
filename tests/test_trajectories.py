from __future__ import annotations

import asyncio
from typing import Any, get_origin

import numpy as np
import pytest
import torch

import gspo as art
from gspo.backend.base import group_means
from gspo.core.errors import DataError
from gspo.data.check import plain_groups
from support import choice, trajectory


def test_messages_show_choices_as_assistant_turns():
    t = trajectory(1.0, choice([4]))
    assert t.messages() == [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "x"},
    ]
    assert len(t.choices()) == 1


def test_misspelt_field_is_refused_with_the_nearest():
    with pytest.raises(DataError, match="Did you mean 'reward'"):
        art.Trajectory(messages_and_choices=[], rewrd=1.0)  # pyright: ignore[reportCallIssue]


def test_reward_must_be_a_number():
    with pytest.raises(DataError, match="reward"):
        art.Trajectory(messages_and_choices=[], reward="good")  # pyright: ignore[reportArgumentType]


def test_group_of_trajectories_and_exceptions_is_ready_at_once():
    group = art.TrajectoryGroup([trajectory(1.0), ValueError("no"), trajectory(0.0)])
    assert [t.reward for t in group] == [1.0, 0.0]
    assert [e.type for e in group.exceptions] == ["ValueError"]
    assert "no" in group.exceptions[0].traceback
    assert len(group) == 2


async def test_group_of_coroutines_keeps_the_order_given():
    async def rollout(reward: float) -> art.Trajectory:
        await asyncio.sleep(0.01 * (1 - reward))
        return trajectory(reward)

    group = await art.TrajectoryGroup(rollout(r / 4) for r in range(4))
    assert [t.reward for t in group] == [0.0, 0.25, 0.5, 0.75]


async def test_awaited_alone_a_failing_rollout_raises():
    async def rollout() -> art.Trajectory:
        raise RuntimeError("tool broke")

    with pytest.raises(RuntimeError, match="tool broke"):
        await art.TrajectoryGroup(rollout() for _ in range(2))


async def test_a_rollout_must_return_a_trajectory():
    async def rollout():
        return 3

    with pytest.raises(
        DataError, match=r"the rollout '.*rollout' returned 3 .*must return a Trajectory"
    ):
        await art.TrajectoryGroup([rollout()])  # pyright: ignore[reportArgumentType, reportCallIssue]


async def test_turn_rewards_are_checked_as_soon_as_a_rollout_returns():
    async def rollout(rewards: Any):
        said = [{"role": "user", "content": "?"}, choice([4, 5])]
        return art.Trajectory(messages_and_choices=said, turn_rewards=rewards)

    group = await art.TrajectoryGroup([rollout([0.5])])
    assert group.trajectories[0].turn_rewards == [0.5]
    with pytest.raises(DataError, match=r"rollout'.*turn_rewards.* of which there are 1"):
        await art.TrajectoryGroup([rollout([0.5, 1.0])])
    with pytest.raises(DataError, match="Trajectory: turn_rewards"):
        await rollout("much")


def test_group_refuses_other_things():
    with pytest.raises(DataError, match=r"got \d+ \(int\); it takes trajectories"):
        art.TrajectoryGroup([3])  # pyright: ignore[reportArgumentType, reportCallIssue]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"metadata": {"ids": [1]}},
            r"metadata\['ids'\] is \[1\] \(list\); it must be a text",
        ),
        ({"metadata": {"x": object()}}, r"metadata\['x'\] is <object"),
        ({"metrics": {"acc": None}}, r"metrics\['acc'\] is None \(NoneType\); it must be a number"),
        ({"metrics": {"acc": "x"}}, r"metrics\['acc'\] is 'x'"),
        ({"metrics": 5}, r"metrics is 5 \(int\); it must be a dict"),
    ],
)
def test_a_value_of_another_kind_is_named(fields: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        art.Trajectory(messages_and_choices=[], **fields)


def test_scalars_of_numpy_and_torch_are_numbers():
    made = art.Trajectory(
        messages_and_choices=[],
        reward=np.float32(0.5),  # pyright: ignore[reportArgumentType]
        metrics={"a": np.float32(0.5), "b": np.bool_(True), "c": torch.tensor(3)},  # pyright: ignore[reportArgumentType]
        metadata={"id": np.int64(7), "x": "7", "none": None},  # pyright: ignore[reportArgumentType]
    )
    assert (made.reward, made.metrics) == (0.5, {"a": 0.5, "b": True, "c": 3})
    assert made.metadata == {"id": 7, "x": "7", "none": None}


def test_arts_names_of_types():
    for alias in (art.Messages, art.MessagesAndChoices, art.Tools):
        assert get_origin(alias) is list


async def test_a_trajectory_keeps_a_log_and_times():
    own = art.Trajectory(messages_and_choices=[{"role": "user", "content": "?"}, choice([4, 5])])
    own.log("first")
    for _ in range(2):
        async with own.track_duration("tool"):
            await asyncio.sleep(0.01)
    with pytest.raises(ValueError, match="down"):
        async with own.track_duration("tool"):
            raise ValueError("down")
    assert own.finish() is own
    assert 0.02 <= own.metrics["tool_duration"] <= own.metrics["duration"] < 60
    shown = own.for_logging()
    assert shown["logs"] == ["first"]
    assert [message["trainable"] for message in shown["messages"]] == [False, True]
    assert [message["role"] for message in shown["messages"]] == ["user", "assistant"]
    assert art.Trajectory() == art.Trajectory()  # whenever they began
    assert "start_time" not in own.model_dump()
    assert own.model_copy().start_time == own.start_time


async def test_a_subclass_may_have_fields_of_its_own():
    class Mine(art.Trajectory):
        final_answer: str | None = None

    async def rollout() -> Mine:
        return Mine(reward=1.0, final_answer="x")

    (group,) = await art.gather_trajectory_groups([art.TrajectoryGroup([rollout()])])
    (own,) = group
    assert isinstance(own, Mine) and own.final_answer == "x"
    with pytest.raises(DataError, match=r"Did you mean 'final_answer'\?"):
        Mine(final_answr="x")  # pyright: ignore[reportCallIssue]


def test_metrics_of_a_group_are_logged_once_for_it():
    groups = [
        art.TrajectoryGroup([trajectory(), trajectory()], metrics={"difficulty": difficulty})
        for difficulty in (1, 4)
    ]
    assert group_means(groups, "train")["train/group_difficulty"] == 2.5
    assert group_means(plain_groups(groups), "val")["val/group_difficulty"] == 2.5
    with pytest.raises(DataError, match="metrics"):
        art.TrajectoryGroup([], metrics={"difficulty": "hard"})  # pyright: ignore[reportArgumentType]
    groups[0].metrics["late"] = None  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match=r"group 0: metrics\['late'\]"):
        plain_groups(groups)
