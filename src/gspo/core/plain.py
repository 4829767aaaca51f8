"""Numbers and texts of Python's own, from what a user puts into metrics, metadata and rewards."""

from __future__ import annotations

import numbers
from typing import Any

from gspo.core.errors import DataError, shown

LARGEST_REWARD = 1e100
"""The squares of larger ones leave float64, and with them the group's standard deviation."""
_REMEDY = f"rewards must be finite numbers, of {LARGEST_REWARD:g} at most"
NUMBER = "a number (int, float, bool, or a scalar of numpy or torch)"
"""What `plain_number` takes, for errors."""


def plain_number(value: Any) -> int | float | bool | None:
    """`value` as a number of Python's own; None if it is none, or too large for a float.

    >>> plain_number(True), plain_number("1"), plain_number(10**400)
    (True, None, None)
    """
    try:
        scalar = value.item() if hasattr(value, "shape") and hasattr(value, "item") else value
        if not isinstance(scalar, numbers.Real):
            return None
        wide = float(scalar)
    except Exception:  # a tensor of several elements, or without data; a number beyond a float
        return None
    if isinstance(scalar, bool):
        return scalar
    return int(scalar) if isinstance(scalar, int) else wide


def plain_reward(value: Any, where: str, remedy: str = _REMEDY) -> float:
    """A reward as a float of Python's own. `where` says what it is of, for errors.

    Raises:
        DataError: it is no finite number, or larger than `LARGEST_REWARD`.
    """
    reward = plain_number(value)
    if reward is None or not abs(reward) <= LARGEST_REWARD:  # NaN is within no limits
        raise DataError(f"{where} is {shown(value)}; {remedy}")
    return float(reward)


def plain_turn_rewards(rewards: Any, turns: int, where: str) -> list[float] | None:
    """Rewards of single turns as floats of Python's own; None stays None.

    Args:
        rewards: what the user gave.
        turns: how many turns the model took.
        where: names the trajectory in errors.

    Raises:
        DataError: no list, not one for each turn, or one that is no finite number.

    >>> plain_turn_rewards([0, 1], 2, "here")
    [0.0, 1.0]
    """
    if rewards is None:
        return None
    if not isinstance(rewards, list | tuple) or len(rewards) != turns:
        raise DataError(
            f"{where}: turn_rewards is {shown(rewards)}; it must be a list with one number for "
            f"each Choice, of which there are {turns}: 0 for a turn that earned nothing"
        )
    return [plain_reward(r, f"{where}: turn_rewards[{turn}]") for turn, r in enumerate(rewards)]


def plain_values(values: Any, where: str, *, texts: bool = False) -> dict[str, Any]:
    """A dict of metrics or metadata with Python's own numbers as values.

    Args:
        values: what the user gave.
        where: names the dict in errors.
        texts: also take texts and None, which metadata may hold.

    Raises:
        DataError: not a dict, a name that is no text, or a value of another kind.
    """
    if not isinstance(values, dict):
        raise DataError(f"{where} is {shown(values)}; it must be a dict")
    kinds = f"{NUMBER}, not larger than a float"
    if texts:
        kinds = f"a text, {NUMBER}, or None: put anything else into the messages or the logs"
    plain = {}
    for name, value in values.items():
        if not isinstance(name, str):
            raise DataError(f"{where} has the key {shown(name)}; keys must be texts")
        number = plain_number(value)
        if number is None and not (texts and isinstance(value, str | None)):
            raise DataError(f"{where}[{name!r}] is {shown(value)}; it must be {kinds}")
        plain[name] = value if number is None else number
    return plain


def deeper_than(levels: int, value: Any) -> bool:
    """Whether lists and dicts stand in one another more than so many deep: what walks through a
    value of JSON by recursion fails at some depth.

    >>> deeper_than(2, {"a": [1]}), deeper_than(1, {"a": [1]})
    (False, True)
    """
    inside = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        parts = (item.values() if isinstance(item, dict) else item for item in inside)
        inside = [part for items in parts for part in items if isinstance(part, dict | list)]
    return bool(inside)
