"""The one exception tree of gspo.

    GspoError
    ├── ConfigError            an option, a value or a combination that means nothing
    ├── DataError              rollouts that cannot be trained on
    │   ├── MissingLogprobsError   a Choice without token ids or log-probs
    │   └── SampleTooLongError     a trajectory longer than the model's context
    ├── ModelError             a base model that cannot be found or used
    ├── RunError               a run folder in conflict, read-only or from a newer version
    │   └── CheckpointError        a checkpoint that is incomplete or damaged
    ├── ServeError             the server cannot start or cannot answer
    │   ├── RequestError           a request that the engine refuses (HTTP 400)
    │   └── BusyError              more requests than the engine lets wait (HTTP 429)
    ├── NumericsError          a gradient or a probability that is not finite
    ├── RolloutError           a rollout function or a task of the user raised
    │   └── RolloutTimeoutError    a rollout that took too long
    ├── JudgeError             a judge cannot be reached, or answers nonsense
    └── MissingDependencyError an optional package is not installed

Every message names the thing, its value and the remedy.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any


class GspoError(Exception):
    """Base of all errors that gspo raises on purpose."""


class ConfigError(GspoError):
    """An option, a value or a combination of options that means nothing."""


class DataError(GspoError):
    """Rollouts that cannot be trained on."""


class MissingLogprobsError(DataError):
    """A Choice without token ids or without the log-probs of its tokens."""


class SampleTooLongError(DataError):
    """A trajectory that is longer than the model's context."""


class ModelError(GspoError):
    """A base model that cannot be found or that gspo cannot compute exactly."""


class RunError(GspoError):
    """A run folder in conflict, read-only, full, or written by a newer version."""


class CheckpointError(RunError):
    """A checkpoint that is incomplete or damaged."""


class ServeError(GspoError):
    """The server cannot start or cannot answer."""


class RequestError(ServeError):
    """A request that the engine refuses; the server answers it with HTTP 400."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class BusyError(ServeError):
    """More requests than the engine lets wait; the server answers it with HTTP 429."""


class NumericsError(GspoError):
    """A gradient or a probability that is not finite; nothing was updated."""


class RolloutError(GspoError):
    """A rollout function or a task of the user raised, in `gspo train`."""


class RolloutTimeoutError(RolloutError, TimeoutError):
    """A rollout that took longer than `rollout_timeout`, or than its gather's `timeout`."""


class JudgeError(GspoError):
    """A judge cannot be reached, or answers nonsense; the rewards are untouched."""


class MissingDependencyError(GspoError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str):
        how = f"-e '.[{extra}]' in your clone of gspo (it is not on PyPI)"
        if not extra:
            how = f"--no-deps {package}; what it then misses: see docs/environments.md"
        super().__init__(f"{purpose} needs the package {package!r}: pip install {how}")


def suggestion(name: str, choices: Iterable[str], cutoff: float = 0.55) -> str:
    """' Did you mean 'x'?' for the nearest of `choices`, or '' if none is `cutoff` alike.

    >>> suggestion("sequnce", ["token", "sequence"])
    " Did you mean 'sequence'?"
    """
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""


def shown(value: Any) -> str:
    """A value as an error shows it: short, whatever its size or its `__repr__`.

    >>> shown(None), shown(["a"] * 100)[:20]
    ('None (NoneType)', "['a', 'a', 'a', 'a',")
    """
    try:
        text = reprlib.repr(value)
    except Exception:  # a whole number of more than 4,300 digits has no text
        text = "a value that cannot be shown"
    return f"{text} ({type(value).__name__})"


def check_whole(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuse a value that is no whole number in [low, high]. `name` is the argument's.

    Raises:
        ConfigError: it names the argument, the value and the range.
    """
    if type(value) is not int or not low <= value <= high:
        limits = f" from {low}" * (low > -math.inf) + f" to {high}" * (high < math.inf)
        raise ConfigError(f"{name} = {shown(value)}: must be a whole number{limits}")


def check_flag(name: str, value: Any) -> None:
    """Refuse a value that is neither True nor False.

    Raises:
        ConfigError: it names the argument and the value.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} = {shown(value)}: give True or False")


def check_names(
    title: str,
    given: Iterable[str],
    names: Collection[str],
    refused: Mapping[Any, str],
    kind: str = "argument",
) -> None:
    """Refuse the first name that a function or a set of options doesn't have.

    Args:
        title: of the function or the options.
        given: names that were given.
        names: those that it has.
        refused: names that another library knows, to the reason and the remedy.
        kind: what it is that has these names.

    Raises:
        ConfigError: with the reason, or the nearest right name.
    """
    for name in given:
        if name in names:
            continue
        if name in refused:
            raise ConfigError(f"{title}: {name!r} is not supported: {refused[name]}")
        raise ConfigError(
            f"{title}: unknown {kind} {name!r}.{suggestion(name, names)} "
            f"Known {kind}s: {', '.join(names) or 'none'}."
        )
