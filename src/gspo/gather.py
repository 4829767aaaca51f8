"""Run rollouts: all at once, with a failure budget and a progress bar."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from gspo.core.errors import DataError, check_names
from gspo.core.progress import Gather, all_or_cancel, gathering
from gspo.trajectories import Trajectory, TrajectoryGroup, settled

P = ParamSpec("P")
T = TypeVar("T")
_KNOWN = ("pbar_desc", "max_exceptions", "after_each")
_REFUSED = {
    "pbar_total_completion_tokens": "the bar shows rewards and failures; leave it out.",
    "max_metrics": "the bar shows the mean reward only; leave it out.",
}
AfterEach = Callable[[TrajectoryGroup], Awaitable[TrajectoryGroup | list[TrajectoryGroup] | None]]


async def gather_trajectory_groups(
    groups: Iterable[Awaitable[TrajectoryGroup] | TrajectoryGroup],
    *,
    pbar_desc: str | None = "gather",
    max_exceptions: int | float = 0,
    after_each: AfterEach | None = None,
    **unknown: Any,
) -> list[TrajectoryGroup]:
    """Run all groups concurrently and return them in the order given.

    Args:
        groups: `TrajectoryGroup`s of coroutines, or coroutines that return a group.
        pbar_desc: label of the progress bar on a terminal; None shows none.
        max_exceptions: rollouts that may fail; below 1, their share. One more raises its error,
            after the others were cancelled.
        after_each: awaited with each finished group; what it returns (a group, several, or None
            to drop it) takes the group's place.

    Raises:
        DataError: nothing was given.
        ConfigError: an unknown argument, or a budget that is no number from 0.
    """
    check_names("gather_trajectory_groups", unknown, _KNOWN, _REFUSED)
    pending = list(groups)
    if not pending:
        raise DataError("gather_trajectory_groups got no groups: give at least one")
    total = sum(g.size if isinstance(g, TrajectoryGroup) else 1 for g in pending)

    async def one(group: Awaitable[TrajectoryGroup]) -> list[TrajectoryGroup]:
        finished = await group
        if not isinstance(finished, TrajectoryGroup):
            raise DataError(f"a group's coroutine returned {type(finished).__name__}")
        result = finished if after_each is None else await after_each(finished)
        if result is None:
            return []
        return result if isinstance(result, list) else [result]

    with _gathering(pbar_desc, total, max_exceptions):
        finished = await all_or_cancel([one(group) for group in pending])
    return [group for groups_of_one in finished for group in groups_of_one]


async def gather_trajectories(
    trajectories: Iterable[Awaitable[Trajectory]],
    *,
    pbar_desc: str | None = "gather",
    max_exceptions: int | float = 0,
    **unknown: Any,
) -> list[Trajectory | BaseException]:
    """Run rollouts concurrently; in place of one that failed, if tolerated, is its exception.

    Raises:
        ConfigError: an unknown argument, or a budget that is no number from 0.
    """
    check_names("gather_trajectories", unknown, _KNOWN[:2], _REFUSED)
    pending = list(trajectories)
    with _gathering(pbar_desc, len(pending), max_exceptions):
        return await all_or_cancel([settled(rollout) for rollout in pending])


def retry(
    max_attempts: int = 3,
    delay: float = 1.0,
    backoff_factor: float = 2.0,
    exceptions: type[Exception] | tuple[type[Exception], ...] = Exception,
    on_retry: Callable[[Exception, int], None] | None = None,
) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Awaitable[T]]]:
    """Decorate a coroutine function so that it is tried again after a failure.

    Args:
        max_attempts: calls in all.
        delay: seconds before the second one.
        backoff_factor: growth of the delay from one to the next.
        exceptions: what is tried again; anything else raises at once.
        on_retry: called with the error and the number of the failed attempt.
    """
    if max_attempts < 1:
        raise DataError(f"retry(max_attempts={max_attempts}): must be at least 1")

    def decorate(function: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        @functools.wraps(function)
        async def again(*args: P.args, **kwargs: P.kwargs) -> T:
            wait = delay
            for attempt in range(1, max_attempts):
                try:
                    return await function(*args, **kwargs)
                except exceptions as error:
                    if on_retry is not None:
                        on_retry(error, attempt)
                    await asyncio.sleep(wait)
                    wait *= backoff_factor
            return await function(*args, **kwargs)

        return again

    return decorate


@contextmanager
def _gathering(description: str | None, total: int, max_exceptions: float) -> Iterator[None]:
    """Inside the block, rollouts are counted: with a bar on a terminal, unseen elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    hidden = description is None or not console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, console=console, transient=True, disable=hidden)

    def update(gather: Gather) -> None:
        reward = gather.mean_reward()
        told = f"{description}: reward {math.nan if reward is None else reward:.3f}"
        done = gather.done + gather.exceptions
        bar.update(task, completed=done, description=f"{told}, failed {gather.exceptions}")

    gather = Gather(total=total, max_exceptions=max_exceptions, update=update)
    with bar, gathering(gather):
        task = bar.add_task(description or "", total=total)
        yield
