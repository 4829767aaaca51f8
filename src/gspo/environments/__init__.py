"""Environments: games, simulators and checkers that a model acts in, turn after turn.

`gspo.environments.play` plays an episode.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from gspo.core.byname import load_class, made_of
from gspo.core.errors import ConfigError, check_whole, shown, suggestion
from gspo.environments.environment import Action, Call, Environment, Step

__all__ = ["Action", "Call", "Environment", "Step", "load_environment"]

FAMILIES = ("bfcl", "gymnasium", "openenv", "reasoning-gym", "textarena", "textworld", "verifiers")
"""A new family is a file in this folder, with one class, and stands here."""


def load_environment(
    name: str, options: Mapping[str, Any] | None = None
) -> Callable[[], Environment]:
    """What makes environments of that name: `family:name`, or `module:Class` of your own.

    Your own class derives from `Environment`; `options` are its constructor's keyword arguments.

    Raises:
        ConfigError: no such family, name or class; an option that it doesn't have; or a limit that
            is none.
        MissingDependencyError: the family's package is not installed.
    """
    family, colon, rest = name.partition(":")
    if family in FAMILIES:
        file = importlib.import_module(f"gspo.environments.{family.replace('-', '_')}")
        (kind,) = (k for k in Environment.__subclasses__() if k.__module__ == file.__name__)
        found = functools.partial(kind, rest)
    elif colon:
        try:
            found = load_class(name, "environment", Environment)
        except ConfigError as error:
            raise ConfigError(f"{error}.{suggestion(family, FAMILIES, 0.8)}") from None
    else:
        known = ", ".join([*(f"{family}:<name>" for family in FAMILIES), "<module>:<Class>"])
        raise ConfigError(
            f"unknown environment {name!r}.{suggestion(name, FAMILIES)} Known: {known}."
        )
    make = functools.partial(made_of, found, "environment", name, dict(options or {}))
    made = make()
    for limit in ("max_turns", "max_tokens"):
        check_whole(f"{name}: {limit}", getattr(made, limit), 1)
    if not isinstance(made.step_timeout, int | float) or made.step_timeout <= 0:
        raise ConfigError(f"{name}: step_timeout = {shown(made.step_timeout)}: give seconds")
    made.close()
    return make
