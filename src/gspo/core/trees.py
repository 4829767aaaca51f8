"""Trees of options, such as a TOML file's tables: with dotted keys, and with a value put in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of options with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def put(table: Any, keys: list[str], value: Any) -> dict[str, Any]:
    """A copy of the table, with the value at the keys. What is no table is replaced by one.

    >>> put({"steps": 5, "train": {"epochs": 2}}, ["train", "seed"], 1)
    {'steps': 5, 'train': {'epochs': 2, 'seed': 1}}
    """
    table = table if isinstance(table, dict) else {}
    first, *rest = keys
    return table | {first: put(table.get(first), rest, value) if rest else value}
