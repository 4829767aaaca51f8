"""Tasks with verifiable rewards: built-in ones, `reasoning-gym:<dataset>`, and your own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gspo.core.byname import load_class, made_of
from gspo.core.errors import ConfigError, suggestion
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
    kind = BUILT_IN[name] if name in BUILT_IN else load_class(name, "task", Task)
    task = made_of(kind, "task", name, given)
    if not hasattr(task, "max_tokens"):
        raise ConfigError(f"task = {name!r} needs max_tokens, the default limit of a completion")
    task.name = getattr(task, "name", name)
    return task
