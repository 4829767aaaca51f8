"""Tasks with verifiable rewards: built-in ones, `reasoning-gym:<dataset>`, and your own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gspo.core.byname import load_object
from gspo.core.errors import ConfigError, suggestion
from gspo.tasks.digits import DIGIT_TASKS
from gspo.tasks.lengths import LENGTH_TASKS
from gspo.tasks.task import Problem, Split, Task

__all__ = ["Problem", "Split", "Task", "load_task", "task_names"]

GYM = "reasoning-gym:"


def task_names() -> list[str]:
    """The built-in tasks."""
    return sorted([*DIGIT_TASKS, *LENGTH_TASKS])


def load_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task of that name: built-in, `reasoning-gym:<dataset>`, or `module:Class` of your own.

    A class of your own derives from `Task`; `options` are its constructor's keyword arguments.

    Raises:
        ConfigError: no such task, class or dataset, or an option that it doesn't have.
        MissingDependencyError: reasoning-gym is not installed.

    >>> load_task("sort").problem("train", 0).prompt
    '722499585097'
    """
    if name.startswith(GYM):
        from gspo.tasks.gym import GymTask

        return GymTask(name.removeprefix(GYM), dict(options or {}))
    if ":" in name:
        return _own_task(name, dict(options or {}))
    tasks = {**DIGIT_TASKS, **LENGTH_TASKS}
    if name not in tasks:
        known = [*task_names(), GYM + "<dataset>", "<module>:<Class>"]
        raise ConfigError(
            f"unknown task {name!r}.{suggestion(name, task_names())} Known: {', '.join(known)}."
        )
    given, make = dict(options or {}), tasks[name]
    for option in given:
        if not make.options:
            raise ConfigError(f"task {name!r} has no options, but got {sorted(given)}")
        if option not in make.options:
            raise ConfigError(
                f"task {name!r} has no option {option!r}.{suggestion(option, make.options)} "
                f"Known: {', '.join(make.options)}."
            )
    return make(**given)


def _own_task(name: str, options: dict[str, Any]) -> Task:
    """The task of a class that the user wrote.

    Raises:
        ConfigError: no subclass of `Task`, one that lacks something, or options it doesn't take.
    """
    found = load_object(name, "task")
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"task = {name!r} must be a class that derives from gspo.tasks.Task")
    try:
        task = found(**options)
    except TypeError as error:  # an unknown option, or draw() or score() is missing
        raise ConfigError(f"task = {name!r} with options {options}: {error}") from None
    if not hasattr(task, "max_tokens"):
        raise ConfigError(f"task = {name!r} needs max_tokens, the default limit of a completion")
    if not hasattr(task, "name"):
        task.name = name
    return task
