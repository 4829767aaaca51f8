"""Refuse what cannot be trained on or written, before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from openai.types.chat.chat_completion import Choice

from gspo.core.choices import as_choice
from gspo.core.errors import DataError, shown
from gspo.data.turn import read_fields
from gspo.trajectory import NUMBER, Trajectory, TrajectoryGroup, plain_number

_LARGEST_REWARD = 1e100
"""The squares of larger ones leave float64, and with them the group's standard deviation."""


def listed(groups: Any) -> list[Any]:
    """What was given for trajectory groups, as a list.

    Raises:
        DataError: it is not iterable.
    """
    if not isinstance(groups, Iterable):
        raise DataError(f"the trajectory groups are {shown(groups)}; give a list of them")
    return list(groups)


def check_groups(groups: Any) -> None:
    """Refuse batches that cannot be trained on.

    A group of which failures left one trajectory, or none, is no mistake: it has no advantage.

    Raises:
        DataError: no groups, nothing left in any of them, a group that was made of one trajectory,
            or a reward that is no finite number.
    """
    groups = listed(groups)
    if not groups:
        raise DataError("train got an empty list of trajectory groups: give at least one")
    for g, group in enumerate(groups):
        _check_group(group, f"group {g}")
        if len(group) < 2 and not group.exceptions:
            raise DataError(
                f"group {g} has {len(group)} trajectories and no failed ones: "
                "an advantage compares rollouts of one prompt, so a group needs at least 2"
            )
        for t, trajectory in enumerate(group):
            _reward(trajectory, f"group {g}, trajectory {t}")
    if not any(len(group) for group in groups):
        failed = sum(len(group.exceptions) for group in groups)
        first = next(error for group in groups for error in group.exceptions)
        raise DataError(
            f"no trajectory is left in any group: all {failed} rollouts failed, the first with "
            f"{first.type}: {first.message}"
        )


def plain_groups(groups: Any) -> list[TrajectoryGroup]:
    """The groups, their values replaced by Python's own numbers; refuse what cannot be written.

    Raises:
        DataError: not a list of groups, a reward, metric or metadata of another kind, a message
            that is no JSON, or a Choice whose fields mean nothing.
    """
    plain = []
    for g, group in enumerate(listed(groups)):
        _check_group(group, f"group {g}")
        copies = [_plain(own, f"group {g}, trajectory {t}") for t, own in enumerate(group)]
        metadata = _plain_metadata(group.metadata, f"group {g}")
        plain.append(group.model_copy(update={"trajectories": copies, "metadata": metadata}))
    return plain


def _check_group(group: Any, where: str) -> None:
    if not isinstance(group, TrajectoryGroup):
        raise DataError(f"{where} is a {type(group).__name__}, not a TrajectoryGroup")
    for name in ("trajectories", "exceptions"):
        if not isinstance(values := getattr(group, name), list):
            raise DataError(f"{where}: {name} is {shown(values)}; it must be a list")
    if group.size > len(group) + len(group.exceptions):
        raise DataError(
            f"{where} holds coroutines that have not run: "
            "await it, or pass it through gather_trajectory_groups"
        )
    for t, trajectory in enumerate(group):
        if not isinstance(trajectory, Trajectory):
            raise DataError(f"{where}, trajectory {t} is {shown(trajectory)}, not a Trajectory")


def _reward(trajectory: Trajectory, where: str) -> float:
    reward = plain_number(trajectory.reward)
    if reward is None or not abs(reward) <= _LARGEST_REWARD:
        raise DataError(
            f"{where}: reward is {shown(trajectory.reward)}; rewards must be finite numbers, "
            f"of {_LARGEST_REWARD:g} at most"
        )
    return float(reward)


def _plain(trajectory: Trajectory, where: str) -> Trajectory:
    values = {
        "messages_and_choices": _plain_items(trajectory, where),
        "reward": _reward(trajectory, where),
        "metrics": dict(named_numbers(trajectory.metrics, f"{where}: metrics")),
        "metadata": _plain_metadata(trajectory.metadata, where),
    }
    return trajectory.model_copy(update=values)


def named_numbers(values: Any, where: str) -> list[tuple[str, int | float]]:
    """The entries of a dict of metrics. `where` names it in errors.

    Raises:
        DataError: not a dict, a name that is no text, or a value that is no number.
    """
    entries = []
    for name, value in _named(values, where):
        number = plain_number(value)
        if number is None:
            raise DataError(
                f"{where}[{name!r}] is {shown(value)}; it must be {NUMBER}, not larger than a float"
            )
        entries.append((name, number))
    return entries


def _plain_metadata(metadata: Any, where: str) -> dict[str, Any]:
    plain = {}
    for name, value in _named(metadata, f"{where}: metadata"):
        number = plain_number(value)
        plain[name] = value if number is None else number
        if number is None and value is not None and not isinstance(value, str):
            raise DataError(
                f"{where}: metadata[{name!r}] is {shown(value)}; it must be a text, {NUMBER}, "
                "or None: put anything else into the messages or the logs"
            )
    return plain


def _named(values: Any, where: str) -> Iterable[tuple[str, Any]]:
    """The entries of a dict whose keys are texts."""
    if not isinstance(values, dict):
        raise DataError(f"{where} is {shown(values)}; it must be a dict")
    for name in values:
        if not isinstance(name, str):
            raise DataError(f"{where} has the key {shown(name)}; keys must be texts")
    return values.items()


def _plain_items(trajectory: Trajectory, where: str) -> list[Any]:
    """The messages and Choices, whatever client they are of; refuse what cannot be written, and
    Choices whose fields mean nothing."""
    items = trajectory.messages_and_choices
    if not isinstance(items, list):
        raise DataError(f"{where}: messages_and_choices is {shown(items)}; it must be a list")
    plain = []
    choices = 0
    for m, item in enumerate(items):
        plain.append(_one_form(item, f"{where}, message {m}"))
        if isinstance(plain[-1], Choice):
            plain[-1] = _plain_choice(plain[-1], f"{where}, choice {choices}")
            choices += 1
        else:
            _check_json(plain[-1], f"{where}, message {m}")
    return plain


def _one_form(item: Any, where: str) -> dict[Any, Any] | Choice:
    try:
        item = as_choice(item) or item
    except Exception as error:  # also whatever a foreign object raises
        raise DataError(f"{where} cannot be read: {error}") from None
    if not isinstance(item, dict | Choice):
        raise DataError(
            f"{where} is {shown(item)}; it must be a dict with a role and a content, or the Choice "
            "that the model's client returned"
        )
    return item


def _plain_choice(choice: Choice, where: str) -> Choice:
    """The Choice with lists where it has arrays, which could not be written."""
    fields = read_fields(choice, where)
    _check_message(choice, where)
    lists = {
        "token_ids": fields.tokens,
        "prompt_token_ids": fields.prompt,
        "token_logprobs": fields.logprobs,
    }
    arrays = {
        name: values
        for name, values in lists.items()
        if not isinstance(getattr(choice, name, None), list | tuple | None)
    }
    return choice.model_copy(update=arrays) if arrays else choice


def _check_message(choice: Choice, where: str) -> None:
    if not isinstance(choice.finish_reason, str | None):
        raise DataError(f"{where}: finish_reason is {shown(choice.finish_reason)}, not a text")
    if not hasattr(choice.message, "model_dump"):
        raise DataError(f"{where}: message is {shown(choice.message)}, not the client's message")
    _check_json(choice.message.model_dump(exclude_none=True), f"{where}, its message")


def _check_json(message: dict[Any, Any], where: str) -> None:
    try:
        json.dumps(message, default=str)  # as it will be written
    except Exception as error:  # also whatever an object's __str__ raises
        raise DataError(f"{where} cannot be written as JSON: {error}") from None
