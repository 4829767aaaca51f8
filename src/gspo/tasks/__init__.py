"""Tasks with verifiable rewards: built-in ones, `reasoning-gym:<dataset>`, and your own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from gspo.core.byname import load_object
from gspo.core.errors import ConfigError, check_names, suggestion
from gspo.tasks.built_in import BUILT_IN
from gspo.tasks.task import Problem, Split, Task

__all__ = ["Problem", "Split", "Task", "load_task", "task_names"]

GYM = "reasoning-gym:"


def task_names() -> list[str]:
    """The built-in tasks."""
    return sorted(BUILT_IN)


def load_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task of that name: built-in, `reasoning-gym:<dataset>`, or `module:Class` of your own.

    Your own class derives from `Task`; `options` are its constructor's keyword arguments.

    Raises:
        ConfigError: no such task, class or dataset; a class that is no `Task` or lacks something;
            or an option that it doesn't have.
        MissingDependencyError: reasoning-gym is not installed.

    >>> load_task("sort").problem("train", 0).prompt
    '722499585097'
    """
    given = dict(options or {})
    if name.startswith(GYM):
        from gspo.tasks.gym import GymTask

        return GymTask(name, given)
    if ":" not in name and name not in BUILT_IN:
        known = [*task_names(), GYM + "<dataset>", "<module>:<Class>"]
        raise ConfigError(
            f"unknown task {name!r}.{suggestion(name, task_names())} Known: {', '.join(known)}."
        )
    kind = BUILT_IN[name] if name in BUILT_IN else load_object(name, "task")
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        raise ConfigError(f"task = {name!r} must be a class that derives from gspo.tasks.Task")
    known = inspect.signature(kind).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        check_names(f"task_options of {name!r}", given, known, {})
    try:
        task = kind(**given)
    except TypeError as error:  # an argument or draw() is missing
        raise ConfigError(f"task = {name!r} with options {given}: {error}") from None
    if not hasattr(task, "max_tokens"):
        raise ConfigError(f"task = {name!r} needs max_tokens, the default limit of a completion")
    if not hasattr(task, "name"):
        task.name = name
    return task
