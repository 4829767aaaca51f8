"""Refuse what cannot be trained on or written, before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from openai.types.chat.chat_completion import Choice

from gspo.core.choices import as_choice
from gspo.core.errors import DataError, shown
from gspo.core.plain import plain_reward, plain_turn_rewards, plain_values
from gspo.data.turn import read_fields
from gspo.trajectories import History, Trajectory, TrajectoryGroup


def listed(groups: Any) -> list[Any]:
    """What was given for trajectory groups, as a list.

    Raises:
        DataError: it is not iterable.
    """
    if isinstance(groups, str | Mapping) or not isinstance(groups, Iterable):
        raise DataError(f"the trajectory groups are {shown(groups)}; give a list of them")
    return list(groups)


def check_groups(groups: Sequence[TrajectoryGroup]) -> None:
    """Refuse groups that nothing can be learned from. Their values are those of `plain_groups`.

    A group of which failures left one trajectory, or none, is no mistake: it has no advantage.

    Raises:
        DataError: no groups, nothing left in any of them, or a group that was made of one
            trajectory.
    """
    if not groups:
        raise DataError("train got an empty list of trajectory groups: give at least one")
    for g, group in enumerate(groups):
        if len(group) < 2 and not group.exceptions:
            raise DataError(
                f"group {g} has {len(group)} trajectories and no failed ones: "
                "an advantage compares rollouts of one prompt, so a group needs at least 2"
            )
    if not any(len(group) for group in groups):
        failed = [error for group in groups for error in group.exceptions]
        raise DataError(
            f"no trajectory is left in any group: all {len(failed)} rollouts failed, the first "
            f"with {failed[0].type}: {failed[0].message}"
        )


def plain_groups(groups: Any) -> list[TrajectoryGroup]:
    """The groups with Python's own numbers as values; refuse what cannot be written.

    Raises:
        DataError: not a list of groups, a group whose rollouts have not run, a reward that is no
            finite number, turn rewards that are not one such number for each Choice, a metric or
            metadata of another kind, a message that is no JSON, or a
            Choice whose fields mean nothing.
    """
    plain = []
    for g, group in enumerate(listed(groups)):
        where = f"group {g}"
        if not isinstance(group, TrajectoryGroup):
            told = f"{where} is {shown(group)}, not a TrajectoryGroup: the rollouts of one prompt"
            raise DataError(told)
        for name in ("trajectories", "exceptions"):
            if not isinstance(values := getattr(group, name), list):
                raise DataError(f"{where}: {name} is {shown(values)}; it must be a list")
        if group.size > len(group) + len(group.exceptions):
            raise DataError(
                f"{where} holds coroutines that have not run: "
                "await it, or pass it through gather_trajectory_groups"
            )
        values = {
            "trajectories": [_plain(t, f"{where}, trajectory {i}") for i, t in enumerate(group)],
            "metadata": plain_values(group.metadata, f"{where}: metadata", texts=True),
            "metrics": plain_values(group.metrics, f"{where}: metrics"),
        }
        plain.append(group.model_copy(update=values))
    return plain


def _plain(trajectory: Any, where: str) -> Trajectory:
    if not isinstance(trajectory, Trajectory):
        raise DataError(f"{where} is {shown(trajectory)}, not a Trajectory")
    reward = plain_reward(trajectory.reward, f"{where}: reward")
    if not isinstance(histories := trajectory.additional_histories, list):
        raise DataError(f"{where}: additional_histories is {shown(histories)}; it must be a list")
    values = {
        "additional_histories": [
            _plain_history(history, f"{where}, additional history {h}")
            for h, history in enumerate(histories)
        ],
        "reward": reward,
        "metrics": plain_values(trajectory.metrics, f"{where}: metrics"),
        "metadata": plain_values(trajectory.metadata, f"{where}: metadata", texts=True),
    }
    plain = _plain_history(trajectory, where).model_copy(update=values)
    plain.turn_rewards = plain_turn_rewards(plain.turn_rewards, len(plain.sampled_turns()), where)
    return plain


def _plain_history(history: Any, where: str) -> Any:
    """A conversation with plain messages and Choices, which may be any client's; refuse what
    cannot be written or trained on."""
    if not isinstance(history, History | Trajectory):
        raise DataError(f"{where} is {shown(history)}, not a History")
    _check_json(history.tools, f"{where}: tools")
    if not isinstance(items := history.messages_and_choices, list):
        raise DataError(f"{where}: messages_and_choices is {shown(items)}; it must be a list")
    plain: list[Any] = []
    choices = 0
    for m, item in enumerate(items):
        place = f"{where}, message {m}"
        try:
            item = as_choice(item) or item
        except Exception as error:  # an object of another library may raise anything
            raise DataError(f"{place} cannot be read: {error}") from None
        if isinstance(item, Choice):
            item = _plain_choice(item, f"{where}, choice {choices}")
            choices += 1
        elif isinstance(item, dict):
            _check_json(item, place)
        else:
            raise DataError(
                f"{place} is {shown(item)}; it must be a dict with a role and a content, or the "
                "Choice that the model's client returned"
            )
        plain.append(item)
    return history.model_copy(update={"messages_and_choices": plain})


def _plain_choice(choice: Choice, where: str) -> Choice:
    """The Choice with Python's own lists and numbers in gspo's fields."""
    turn = read_fields(choice, where)
    reason: Any = choice.finish_reason
    if not isinstance(reason, str | None) or not str(reason).isascii():
        raise DataError(f"{where}: finish_reason is {shown(reason)}, not a word in ASCII")
    if not hasattr(choice.message, "model_dump"):
        raise DataError(f"{where}: message is {shown(choice.message)}, not the client's message")
    _check_json(choice.message.model_dump(exclude_none=True), f"{where}, its message")
    fields = {
        "token_ids": turn.tokens,
        "prompt_token_ids": turn.prompt,
        "token_logprobs": turn.logprobs,
    }
    for name in ("temperature", "policy_version"):
        if getattr(choice, name, None) is not None:
            fields[name] = getattr(turn, name)
    return choice.model_copy(update=fields)


def _check_json(message: Any, where: str) -> None:
    try:
        json.dumps(message, default=str)  # as it will be written
    except Exception as error:  # __str__ of an object may raise anything
        raise DataError(f"{where} cannot be written as JSON: {error}") from None
