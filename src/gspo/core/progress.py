"""What a running gather counts, and the failure budget that it enforces."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gspo.core.draws import numbered_task
from gspo.core.errors import ConfigError, shown


@dataclass
class Gather:
    """Counts of one gather. `max_exceptions` below 1 is a share of `total`.

    >>> gather = Gather(total=4, max_exceptions=0.5)
    >>> gather.failed(ValueError("no")); gather.finished(1.0)
    >>> gather.exceptions, gather.mean_reward()
    (1, 1.0)

    Raises:
        ConfigError: a budget that is no number from 0.
    """

    total: int
    max_exceptions: float = 0
    update: Callable[[Gather], None] = lambda gather: None
    done: int = 0
    exceptions: int = 0
    _rewards: float = 0.0

    def __post_init__(self) -> None:
        budget = self.max_exceptions
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget >= 0:
            raise ConfigError(
                f"max_exceptions = {shown(budget)}: give how many rollouts may fail, or below "
                "1 their share, such as 0.1"
            )

    def finished(self, reward: float) -> None:
        """Count a rollout that ended."""
        self.done += 1
        self._rewards += reward
        self.update(self)

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


@contextmanager
def gathering(gather: Gather) -> Iterator[Gather]:
    """Make `gather` the current one for the coroutines started inside."""
    token = _current.set(gather)
    try:
        yield gather
    finally:
        _current.reset(token)


async def all_or_cancel(coroutines: list[Any]) -> list[Any]:
    """Run coroutines together; at the first error, cancel and await the others, and raise it.

    Returns:
        Results in the order given. Each coroutine's requests are seeded by its place.
    """
    tasks = [numbered_task(number, coroutine) for number, coroutine in enumerate(coroutines)]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
