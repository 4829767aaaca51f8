"""Tasks with verifiable rewards: the built-in ones and `reasoning-gym:<dataset>`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gspo.errors import ConfigError, suggestion
from gspo.tasks.base import Problem, Split, Task
from gspo.tasks.digits import DIGIT_TASKS
from gspo.tasks.lengths import LENGTH_TASKS

__all__ = ["Problem", "Split", "Task", "load_task", "task_names"]

GYM = "reasoning-gym:"


def task_names() -> list[str]:
    """The built-in tasks."""
    return sorted([*DIGIT_TASKS, *LENGTH_TASKS])


def load_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task of that name.

    Raises:
        ConfigError: no such task or dataset, or an option that it doesn't have.
        MissingDependencyError: reasoning-gym is not installed.

    >>> load_task("sort").problem("train", 0).prompt
    '722499585097'
    """
    if name.startswith(GYM):
        from gspo.tasks.gym import GymTask

        return GymTask(name.removeprefix(GYM), dict(options or {}))
    tasks = {**DIGIT_TASKS, **LENGTH_TASKS}
    if name not in tasks:
        known = [*task_names(), GYM + "<dataset>"]
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
