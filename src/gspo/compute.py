"""The one thread that touches a model: loading, sampling and training never overlap."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class ComputeThread:
    """Runs blocking work beside the event loop, one piece at a time, always in one thread.

    One thread, because the number of OpenMP threads is a setting of the calling thread.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gspo-compute")

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[ComputeThread]:
        """Wait until nothing else computes."""
        async with self._lock:
            yield self

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Inside `turn()`: the function's result, in the caller's context."""
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        return await loop.run_in_executor(
            self._executor, lambda: context.run(function, *args, **kwargs)
        )

    def close(self) -> None:
        """Let the thread end with what it does now; what waits for it is cancelled."""
        self._executor.shutdown(wait=False, cancel_futures=True)
