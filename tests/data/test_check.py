"""Batches that cannot be trained on, and values that cannot be written, are refused at the door."""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch
from openai.types.completion_choice import CompletionChoice

from gspo.core.errors import DataError
from gspo.data.check import check_groups, listed, plain_groups
from gspo.trajectories import History, Trajectory, TrajectoryGroup
from support import choice, trajectory


def group(*rewards: float) -> TrajectoryGroup:
    return TrajectoryGroup([trajectory(reward) for reward in rewards])


def test_good_groups_pass() -> None:
    check_groups([group(0.0, 1.0), group(1.0, 1.0, 1.0)])


def test_no_groups() -> None:
    with pytest.raises(DataError, match="empty list"):
        check_groups([])


@pytest.mark.parametrize("rewards", [[], [1.0]])
def test_a_group_compares_at_least_two(rewards: list[float]) -> None:
    message = rf"group 1 has {len(rewards)} trajectories and no failed ones: .* at least 2"
    with pytest.raises(DataError, match=message):
        check_groups([group(0.0, 1.0), group(*rewards)])


def failed(count: int, *rewards: float) -> TrajectoryGroup:
    """A group some of whose rollouts failed."""
    errors = [RuntimeError(f"boom {i}") for i in range(count)]
    return TrajectoryGroup([trajectory(reward) for reward in rewards], exceptions=errors)


def test_a_group_that_failures_thinned_is_no_mistake() -> None:
    check_groups([failed(3, 1.0), group(0.0, 1.0)])
    check_groups([failed(3), group(0.0, 1.0)])
    check_groups([failed(1, 1.0)])


def test_nothing_left_at_all_tells_why() -> None:
    with pytest.raises(DataError, match="all 5 rollouts failed, the first with RuntimeError: boom"):
        check_groups([failed(2), failed(3)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200, -1e300])
def test_a_reward_that_is_no_number_is_named(bad: float) -> None:
    with pytest.raises(DataError, match=r"group 1, trajectory 2: reward is"):
        plain_groups([group(0.0, 1.0), group(0.0, 1.0, bad)])


class Rollout:
    """Awaitable, and silent when nobody awaits it."""

    def __await__(self) -> Generator[Any, None, Trajectory]:
        yield from ()
        return trajectory(1.0)


async def test_coroutines_must_have_run() -> None:
    pending = TrajectoryGroup([Rollout(), Rollout()])
    with pytest.raises(DataError, match="group 0 holds coroutines"):
        plain_groups([pending])
    plain_groups([await pending])


def test_a_list_of_trajectories_is_no_group() -> None:
    with pytest.raises(DataError, match=r"group 0 is \[.*\(list\), not a TrajectoryGroup: the"):
        plain_groups([list(group(0.0, 1.0))])


@pytest.mark.parametrize("groups", [None, 5, "groups", {"reward": 1.0}])
def test_what_is_no_list_at_all(groups: Any) -> None:
    for function in (plain_groups, listed):
        with pytest.raises(DataError, match="give a list"):
            function(groups)


def test_scalars_of_numpy_and_torch_are_numbers() -> None:
    one = trajectory(1.0)
    one.reward = torch.tensor(0.5, requires_grad=True)  # pyright: ignore[reportAttributeAccessIssue]
    one.metrics = {"a": np.float32(0.5), "b": np.bool_(True), "c": torch.tensor(3), "d": np.ones(1)}  # pyright: ignore[reportAttributeAccessIssue]
    one.metadata = {"id": np.int64(7), "text": "x", "none": None, "flag": np.bool_(False)}  # pyright: ignore[reportAttributeAccessIssue]
    (plain,) = plain_groups([TrajectoryGroup([one])])[0].trajectories
    assert plain.reward == 0.5
    assert json.loads(json.dumps(plain.metrics)) == {"a": 0.5, "b": True, "c": 3, "d": 1.0}
    assert plain.metadata == {"id": 7, "text": "x", "none": None, "flag": False}
    assert type(plain.metadata["id"]) is int
    assert type(one.metrics["a"]) is np.float32  # the user's own object stays as it is


class Rude:
    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__


CYCLE: dict[str, Any] = {"role": "user"}
CYCLE["content"] = CYCLE

ODD: dict[str, tuple[str, Any, str]] = {
    "reward None": ("reward", None, r"reward is None \(NoneType\)"),
    "reward text": ("reward", "1.5", "reward is '1.5'"),
    "reward huge": ("reward", 10**400, "reward is 10000"),
    "reward beyond text": ("reward", 10**5000, "reward is a value that cannot be shown"),
    "reward complex": ("reward", 1j, "reward is 1j"),
    "reward vector": ("reward", np.ones(2), "reward is "),
    "metric text": (
        "metrics",
        {"acc": "x"},
        r"metrics\['acc'\] is 'x' \(str\); it must be a number",
    ),
    "metric None": ("metrics", {"acc": None}, r"metrics\['acc'\] is None"),
    "metric huge": ("metrics", {"acc": 10**400}, "not larger than a float"),
    "metric rude": ("metrics", {"acc": Rude()}, r"metrics\['acc'\] is "),
    "metrics None": ("metrics", None, "metrics is None .* must be a dict"),
    "metrics key": ("metrics", {("a", 1): 1.0}, "keys must be texts"),
    "metadata list": ("metadata", {"ids": [1, 2]}, r"metadata\['ids'\] is \[1, 2\] .* text"),
    "metadata object": ("metadata", {"x": object()}, r"metadata\['x'\] is <object"),
    "messages None": ("messages_and_choices", None, "messages_and_choices is None"),
    "message text": ("messages_and_choices", ["hi"], "message 0 is 'hi'"),
    "choice of another client": ("messages_and_choices", [{"text": 5}], "message 0 cannot be read"),
    "message cyclic": ("messages_and_choices", [CYCLE], "message 0 cannot be written as JSON"),
    "message key": ("messages_and_choices", [{("a", 1): 2}], "cannot be written as JSON: keys"),
    "histories None": ("additional_histories", None, "additional_histories is None"),
    "history text": ("additional_histories", ["hi"], "additional history 0 is 'hi'"),
    "history odd": (
        "additional_histories",
        [History(), History.model_construct(messages_and_choices=[3], tools=None)],
        "additional history 1, message 0 is 3",
    ),
    "tools rude": ("tools", [{"name": Rude()}], "tools cannot be written as JSON"),
    "message rude": ("messages_and_choices", [{"content": Rude()}], "cannot be written as JSON"),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_value_is_named_with_its_place(case: str) -> None:
    field, value, message = ODD[case]
    odd = trajectory(0.0)
    setattr(odd, field, value)
    with pytest.raises(DataError, match=f"group 1, trajectory 2.*{message}"):
        plain_groups([group(0.0, 1.0), TrajectoryGroup([*group(0.0, 1.0), odd])])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("message", None, "message is None"),
        ("finish_reason", 5, "finish_reason is 5"),
        ("finish_reason", "\ud800", "finish_reason is .* not a word"),
        ("temperature", math.nan, "temperature is nan"),
    ],
)
def test_an_odd_choice_is_named_with_its_place(field: str, value: Any, message: str) -> None:
    odd = choice([4])
    setattr(odd, field, value)
    with pytest.raises(DataError, match=f"group 0, trajectory 1, choice 1: {message}"):
        plain_groups([TrajectoryGroup([trajectory(0.0), trajectory(1.0, choice([4]), odd)])])


def test_something_else_among_the_trajectories() -> None:
    mixed = group(0.0, 1.0)
    mixed.trajectories.append("x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="group 0, trajectory 2 is 'x'"):
        plain_groups([mixed])


def test_a_choice_of_another_client_that_was_appended_is_taken() -> None:
    appended = trajectory(1.0)
    made = choice([4, 5]).model_dump()
    appended.messages_and_choices.append(CompletionChoice(text="x", **{**made, "logprobs": None}))  # pyright: ignore[reportArgumentType]
    (plain,) = plain_groups([TrajectoryGroup([appended])])[0].trajectories
    assert [c.token_ids for c in plain.choices()] == [[4, 5], [4, 5]]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("value", [np.float32(0.5), np.array(0.5), torch.tensor(0.5)])
def test_a_temperature_becomes_a_number_of_pythons_own(value: Any):
    made = choice([4])
    made.temperature = value  # pyright: ignore[reportAttributeAccessIssue]
    (group,) = plain_groups([TrajectoryGroup([trajectory(1.0, made), trajectory()])])
    (plain,) = group.trajectories[0].choices()
    assert type(plain.temperature) is float and plain.temperature == 0.5  # pyright: ignore[reportAttributeAccessIssue]


def test_arrays_in_a_choice_become_lists():
    arrays = {
        "token_ids": np.array([4, 5]),
        "prompt_token_ids": np.array([1, 2, 3], np.int32),
        "token_logprobs": np.array([-1.0, -0.5], np.float32),
    }
    made = choice([4, 5])
    for name, values in arrays.items():
        setattr(made, name, values)
    (group,) = plain_groups([TrajectoryGroup([trajectory(1.0, made), trajectory()])])
    (plain,) = next(iter(group)).choices()
    for name, values in arrays.items():
        assert getattr(plain, name) == values.tolist()
    assert made.token_ids is arrays["token_ids"]  # pyright: ignore[reportAttributeAccessIssue]


def test_turn_rewards_are_one_finite_number_for_each_choice_of_all_histories() -> None:
    def with_rewards(rewards: Any) -> list[TrajectoryGroup]:
        further = [History(messages_and_choices=[choice([6], [9])])]
        one = trajectory(1.0, choice([4]), choice([5], [1, 2, 3, 4, 7]))
        one.additional_histories, one.turn_rewards = further, rewards
        return [TrajectoryGroup([trajectory(0.0), one])]

    (checked,) = plain_groups(with_rewards((1, np.float32(0.5), torch.tensor(2))))
    assert [t.turn_rewards for t in checked] == [None, [1.0, 0.5, 2.0]]
    assert all(type(reward) is float for reward in checked.trajectories[1].turn_rewards or ())
    for bad, message in (
        ([1.0, 2.0], r"trajectory 1: turn_rewards is \[1.0, 2.0\] .* each Choice, of which .* 3"),
        ([0.0, math.nan, 1.0], r"turn_rewards\[1\] is nan"),
        ([0.0, 0.0, 1e200], r"turn_rewards\[2\] is 1e\+200"),
        (["1", 0.0, 0.0], r"turn_rewards\[0\] is '1'"),
        (3.0, "turn_rewards is 3.0"),
    ):
        with pytest.raises(DataError, match=message):
            plain_groups(with_rewards(bad))
