"""Run rollouts: all at once, with limits of failures and of time, and a progress bar."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, ParamSpec, TypeVar

from gspo.core.errors import DataError, RolloutTimeoutError, check_names, check_whole, shown
from gspo.core.progress import LET_GO_SECONDS, Gather, all_or_cancel, gathering, in_order
from gspo.trajectories import Rolled, Trajectory, TrajectoryGroup, settled

P = ParamSpec("P")
T = TypeVar("T")
AfterEach = Callable[[TrajectoryGroup], Awaitable[TrajectoryGroup | list[TrajectoryGroup] | None]]
_MARGIN = LET_GO_SECONDS + 1.0
"""Seconds that a group has after its rollouts' time is over."""


async def gather_trajectory_groups(
    groups: Iterable[Awaitable[TrajectoryGroup] | TrajectoryGroup],
    *,
    pbar_desc: str | None = "gather",
    pbar_total_completion_tokens: bool = False,
    max_exceptions: int | float = 0,
    max_metrics: int | None = None,
    after_each: AfterEach | None = None,
    rollout_timeout: float | None = None,
    timeout: float | None = None,
    **unknown: Any,
) -> list[TrajectoryGroup]:
    """Run all groups concurrently and return them in the order given.

    Args:
        groups: `TrajectoryGroup`s of coroutines, or coroutines that return a group.
        pbar_desc: label of the progress bar on a terminal; None shows none.
        pbar_total_completion_tokens: also show how many tokens the rollouts have sampled.
        max_exceptions: rollouts that may fail; below 1, their share. One more raises its error,
            after the others were cancelled.
        max_metrics: of the rollouts' metrics, how many the bar shows; None: all.
        after_each: awaited with each finished group; what it returns (a group, several, or None
            to drop it) takes the group's place. It may take `timeout` too.
        rollout_timeout: seconds that each rollout may take. One that takes longer is cancelled,
            with what it had asked of the engine, and left out of its group, whose `exceptions`
            name it; it doesn't count against `max_exceptions`.
        timeout: seconds after which all rollouts that still run are given up in the same way.

    Raises:
        DataError: nothing was given, or what cannot be awaited.
        ConfigError: an unknown argument, a budget that is no number from 0, or no time limit.
        RolloutTimeoutError: no rollout came to its end in time, or a group's own coroutine or
            `after_each` did not.
    """
    pending = list(groups)
    with _refusing(gather_trajectory_groups, pending, unknown, max_metrics):
        total = sum(g.size if isinstance(g, TrajectoryGroup) else 1 for g in pending)
        gather = Gather(total, max_exceptions, rollout_timeout=rollout_timeout, timeout=timeout)
    if not pending:
        raise DataError("gather_trajectory_groups got no groups: give at least one")

    async def one(group: Awaitable[TrajectoryGroup]) -> list[TrajectoryGroup]:
        # Its rollouts have the limit. A coroutine has a little more, and may wait for other things.
        own = None if isinstance(group, TrajectoryGroup) or not timeout else timeout + _MARGIN
        finished = await _limited(group, own, "a group")
        if not isinstance(finished, TrajectoryGroup):
            raise DataError(f"a group's coroutine returned {type(finished).__name__}")
        if after_each is None:
            return [finished]
        result = await _limited(after_each(finished), timeout, "after_each")
        if result is None:
            return []
        return result if isinstance(result, list) else [result]

    with _shown(gather, pbar_desc, max_metrics, tokens=pbar_total_completion_tokens):
        finished = await all_or_cancel([one(group) for group in pending])
    return [group for groups_of_one in finished for group in groups_of_one]


async def gather_trajectories(
    trajectories: Iterable[Awaitable[Rolled]],
    *,
    pbar_desc: str | None = "gather",
    pbar_total_completion_tokens: bool = False,
    max_exceptions: int | float = 0,
    max_metrics: int | None = None,
    rollout_timeout: float | None = None,
    timeout: float | None = None,
    **unknown: Any,
) -> list[Trajectory | BaseException]:
    """Run rollouts concurrently; in place of one that failed, if tolerated, is its exception.

    A rollout that returns a list of trajectories has all of them in the result. For the arguments,
    see `gather_trajectory_groups`.

    Raises:
        DataError: what cannot be awaited was given.
        ConfigError: an unknown argument, a budget that is no number from 0, or no time limit.
        RolloutTimeoutError: no rollout came to its end in time.
    """
    pending = list(trajectories)
    with _refusing(gather_trajectories, pending, unknown, max_metrics):
        total = len(pending)
        gather = Gather(total, max_exceptions, rollout_timeout=rollout_timeout, timeout=timeout)
    with _shown(gather, pbar_desc, max_metrics, tokens=pbar_total_completion_tokens):
        finished = await all_or_cancel([settled(rollout) for rollout in pending])
    return [trajectory for results in finished for trajectory in results]


async def trajectory_group_batches(
    groups: Iterable[Awaitable[TrajectoryGroup] | TrajectoryGroup],
    *,
    batch_size: int,
    max_batch_exceptions: int | float = 0,
    max_concurrent_batches: int = 4,
    skip_batches: int = 0,
    pbar_desc: str | None = "batches",
    **options: Any,
) -> AsyncIterator[list[TrajectoryGroup]]:
    """Gather groups batch by batch, in the order given, while later batches run already.

        async for batch in art.trajectory_group_batches(groups, batch_size=8):
            await model.train(batch)

    So rollouts overlap with `train`. A batch begins once the one `max_concurrent_batches` places
    before it is trained: when its own turn comes, its tokens are of weights that are at most
    `max_concurrent_batches - 1` versions old. No rollout is dropped for being slow. With 1 nothing
    runs ahead, and a run repeats exactly.

    Args:
        groups: as of `gather_trajectory_groups`.
        batch_size: groups of one batch; the last one may have fewer.
        max_batch_exceptions: rollouts of one batch that may fail; below 1, their share.
        max_concurrent_batches: how many batches run at once.
        skip_batches: batches that are done, such as `await model.get_step()`; they don't run.
        pbar_desc, options: see `gather_trajectory_groups`; `timeout` is each batch's.

    Raises:
        ConfigError: a number out of range, or an unknown argument.
        Exception: what `gather_trajectory_groups` raises for a batch; the others are cancelled.
    """
    unstarted = list(groups)
    with _refusing(trajectory_group_batches, unstarted):
        check_whole("batch_size", batch_size, 1)
        check_whole("max_concurrent_batches", max_concurrent_batches, 1)
        check_whole("skip_batches", skip_batches, 0)
    first = skip_batches * batch_size
    _close(unstarted[:first])
    works = (
        gather_trajectory_groups(
            unstarted[at : at + batch_size],
            # A terminal has room for one bar.
            pbar_desc=pbar_desc if max_concurrent_batches == 1 or at == first else None,
            max_exceptions=max_batch_exceptions,
            **options,
        )
        for at in range(first, len(unstarted), batch_size)
    )
    try:
        async with aclosing(in_order(works, max_concurrent_batches, skip_batches)) as batches:
            async for batch in batches:
                yield batch
    finally:
        _close(unstarted[first:])


@contextmanager
def _refusing(
    function: Callable[..., Any],
    pending: list[Any],
    unknown: Iterable[str] = (),
    max_metrics: int | None = None,
) -> Iterator[None]:
    """Refuse what cannot be run. What was given is closed then, and if the block refuses it: else
    Python warns that nobody has awaited it."""
    title, (_, *names) = function.__name__, inspect.signature(function).parameters
    try:
        check_names(title, unknown, names[:-1], {})
        if max_metrics is not None:
            check_whole("max_metrics", max_metrics, 0)
        for item in pending:  # a function that nobody has called is a common mistake
            if not inspect.isawaitable(item):
                raise DataError(
                    f"{title} got {shown(item)}: give coroutines, such as rollout(scenario)"
                )
        yield
    except BaseException:
        _close(pending)
        raise


def _close(groups: list[Any]) -> None:
    """Give up groups that have not begun; else Python warns that nobody has awaited them."""
    for group in groups:
        if isinstance(group, TrajectoryGroup) or inspect.iscoroutine(group):
            group.close()


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
    if type(max_attempts) is not int or max_attempts < 1:
        raise DataError(
            f"retry(max_attempts={shown(max_attempts)}): must be at least 1; decorate with "
            "@art.retry()"
        )

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


async def _limited(work: Awaitable[T], seconds: float | None, name: str) -> T:
    """Await something other than a rollout, for at most so many seconds."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await work
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise RolloutTimeoutError(
            f"{name} ({getattr(work, '__qualname__', type(work).__name__)}) has not ended after "
            f"{seconds:g} s (timeout): give it more time, or find out what it waits for"
        ) from error


@contextmanager
def _shown(
    gather: Gather, description: str | None, most: int | None, *, tokens: bool
) -> Iterator[None]:
    """Inside the block, rollouts are counted: with a bar on a terminal, unseen elsewhere.

    Raises:
        RolloutTimeoutError: at the end of the block: no rollout came to its end in time.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    hidden = description is None or not console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, console=console, transient=True, disable=hidden)

    def update(gather: Gather) -> None:
        reward = gather.mean_reward()
        told = [f"{description}: reward {math.nan if reward is None else reward:.3f}"]
        means = [f"{name} {total / count:.3g}" for name, (total, count) in gather.metrics.items()]
        told += [f"failed {gather.exceptions + gather.timed_out}", *means[:most]]
        told += [f"{gather.completion_tokens:,} tokens"] * tokens
        done = gather.done + gather.exceptions + gather.timed_out
        bar.update(task, completed=done, description=", ".join(told))

    gather.update = update
    with bar, gathering(gather):
        task = bar.add_task(description or "", total=gather.total)
        yield
    gather.check_some_left()
