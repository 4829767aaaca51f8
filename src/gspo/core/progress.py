"""What a running gather counts, and the limits that it enforces: of failures and of time."""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from gspo.core.draws import numbered_task, purpose
from gspo.core.errors import ConfigError, DataError, RolloutTimeoutError, shown
from gspo.core.log import log
from gspo.core.variables import holding

T = TypeVar("T")

LET_GO_SECONDS = 5.0
"""How long a rollout that is cancelled may take to clean up."""


def check_seconds(name: str, value: Any) -> None:
    """Refuse a time limit that is none. None: no limit.

    Raises:
        ConfigError: it names the argument and the value.
    """
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if value is not None and not (number and 0 < value < math.inf):
        raise ConfigError(f"{name} = {shown(value)}: give seconds above 0, or None for no limit")


@dataclass
class Gather:
    """Counts and limits of one gather. `max_exceptions` below 1 is a share of `total`.

    >>> gather = Gather(total=4, max_exceptions=0.5)
    >>> gather.failed(ValueError("no")); gather.finished(1.0, {}, 9)
    >>> gather.exceptions, gather.mean_reward()
    (1, 1.0)

    Attributes:
        rollout_timeout: seconds that each rollout may take; None: no limit.
        timeout: seconds after which the gather gives up all that still run.
        metrics: sums of the rollouts' own metrics, and how many had them.
        completion_tokens: sampled so far.
        timed_out: rollouts given up. They don't count as `exceptions`: they were not wrong.

    Raises:
        ConfigError: a budget that is no number from 0, or a limit that is no time.
    """

    total: int
    max_exceptions: float = 0
    update: Callable[[Gather], None] = lambda gather: None
    rollout_timeout: float | None = None
    timeout: float | None = None
    done: int = 0
    exceptions: int = 0
    timed_out: int = 0
    completion_tokens: int = 0
    last_given_up: RolloutTimeoutError | None = None
    metrics: dict[str, tuple[float, int]] = field(default_factory=dict)
    _rewards: float = 0.0

    def __post_init__(self) -> None:
        budget = self.max_exceptions
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget >= 0:
            raise ConfigError(
                f"max_exceptions = {shown(budget)}: give how many rollouts may fail, or below "
                "1 their share, such as 0.1"
            )
        check_seconds("rollout_timeout", self.rollout_timeout)
        check_seconds("timeout", self.timeout)
        self._started = time.monotonic()

    def limit(self) -> tuple[float | None, str]:
        """Seconds that a rollout which starts now may take, and the argument that says so."""
        if self.timeout is None:
            return self.rollout_timeout, "rollout_timeout"
        left = max(0.0, self._started + self.timeout - time.monotonic())
        if self.rollout_timeout is not None and self.rollout_timeout < left:
            return self.rollout_timeout, "rollout_timeout"
        return left, "timeout"

    def finished(self, reward: float, metrics: Mapping[str, Any], completion_tokens: int) -> None:
        """Count a trajectory of a rollout that ended. Metrics that are no numbers are not shown."""
        self.done += 1
        self._rewards += reward
        self.completion_tokens += completion_tokens
        for name, value in metrics.items():
            if isinstance(value, int | float):
                total, count = self.metrics.get(name, (0.0, 0))
                self.metrics[name] = (total + value, count + 1)
        self.update(self)

    def gave_up(self, error: RolloutTimeoutError) -> None:
        """Count a rollout whose time is over, and tell which."""
        self.timed_out += 1
        self.update(self)
        log.warning("%s: it is left out", error)
        self.last_given_up = error

    def check_some_left(self) -> None:
        """Raise the last time limit that ended a rollout, if no rollout came to its end."""
        if self.last_given_up is not None and not self.done:
            raise self.last_given_up

    def failed(self, error: BaseException) -> None:
        """Count a rollout that raised; raises `error` when the budget is spent."""
        self.exceptions += 1
        self.update(self)
        allowed = self.max_exceptions
        if 0 < allowed < 1:
            allowed = allowed * self.total
        if self.exceptions > allowed:
            raise error

    def mean_reward(self) -> float | None:
        """Mean reward of the rollouts so far."""
        return self._rewards / self.done if self.done else None


_current: contextvars.ContextVar[Gather] = contextvars.ContextVar("gspo_gather")


def current_gather() -> Gather:
    """Return the gather around this coroutine; if there is none, one that allows no failure."""
    return _current.get(Gather(total=0))


def gathering(gather: Gather) -> AbstractContextManager[Gather]:
    """Make `gather` the current one for the coroutines started inside."""
    return holding(_current, gather)


rollout_belongings: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
    "gspo_rollout", default=None
)
"""What others keep for the rollout that the code is in; None outside of any."""


async def within_limits(work: Awaitable[T], gather: Gather, name: str) -> T:
    """Await a rollout in a task of its own: it ends there, whatever it cancels or ignores.

    Args:
        work: the rollout.
        gather: whose limits hold.
        name: of the rollout's function, for errors.

    Raises:
        RolloutTimeoutError: its time is over. It was cancelled, and with it what it had asked of
            an engine.
        DataError: it raised CancelledError, and nobody has cancelled it from outside.
    """
    began, (seconds, argument) = time.monotonic(), gather.limit()
    with holding(rollout_belongings, {}):
        task = asyncio.ensure_future(_outcome(work))
    try:
        await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:  # whoever runs the gather
        await _let_go(task, name)
        raise
    if not task.done():
        await _let_go(task, name)
        raise RolloutTimeoutError(
            f"{_place()} ({name}) was given up after {time.monotonic() - began:.1f} s "
            f"({argument}={getattr(gather, argument):g})"
        )
    result, error = task.result()
    if isinstance(error, asyncio.CancelledError):
        raise DataError(
            f"{_place()} ({name}) raised CancelledError, and nobody has cancelled it: catch what "
            "its own timeout or task raises, or raise TimeoutError"
        ) from error
    if error is not None:
        raise error
    return result


async def _outcome(work: Awaitable[T]) -> tuple[Any, BaseException | None]:
    """What came of it. As a value: SystemExit would leave a task, and the event loop, at once."""
    try:
        return await work, None
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        return None, error


async def _let_go(task: asyncio.Future[Any], name: str) -> None:
    """Cancel a task and wait until it has ended, for `LET_GO_SECONDS` at most."""
    task.cancel()
    await asyncio.wait({task}, timeout=LET_GO_SECONDS)
    if not task.done():
        log.warning(
            "%s (%s) goes on %.0f s after it was cancelled: something in it catches "
            "CancelledError. Nobody waits for it any more",
            *(_place(), name, LET_GO_SECONDS),
        )


def _place() -> str:
    """Which rollout this code belongs to, by its numbers."""
    *_, group, rollout = (None, None, *purpose())
    if rollout is None:
        return "a rollout"
    return f"rollout {rollout}" if group is None else f"group {group}, rollout {rollout}"


async def all_or_cancel(coroutines: list[Any]) -> list[Any]:
    """Run coroutines together; at the first error, cancel and await the others, and raise it.

    Returns:
        Results in the order given. Each coroutine's requests are seeded by its place.
    """
    tasks = [numbered_task(number, coroutine) for number, coroutine in enumerate(coroutines)]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        await cancelled(*tasks)
        raise


async def cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def in_order(
    works: Iterable[Coroutine[Any, Any, T]], most: int, first: int = 0
) -> AsyncGenerator[T, None]:
    """Run coroutines, `most` of them at once, and yield their results in the order given.

    The one that was yielded last counts until the next one is asked for. So in a loop that trains
    on each result, none begins before training on the one `most` places before it is over, and
    what it samples is at most `most - 1` versions of the weights old when it is trained on.

    Args:
        works: each is taken from here when it begins.
        most: how many at once, from 1.
        first: the place of the first one; a coroutine's requests are seeded by its place.

    Raises:
        Exception: what a coroutine raises, at its turn. At the end those that run are cancelled.
    """
    unstarted, running = enumerate(works, first), deque[asyncio.Task[T]]()
    try:
        while True:
            for place, work in islice(unstarted, most - len(running)):
                running.append(numbered_task(place, work))
            if not running:
                return
            yield await running[0]
            running.popleft()
    finally:
        await cancelled(*running)
