"""The one thread that touches a model: loading, sampling and training never overlap."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from gspo.core.errors import RunError

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("gspo")

NOTICE_SECONDS = 600.0
"""After so long a wait, a caller is told once, in the log, what is computing."""


def free_cores() -> int:
    """Number of cores that this process may use; all of them if the system doesn't say."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


class ComputeThread:
    """Runs blocking work beside the event loop, one piece at a time, always in one thread.

    One thread, because the number of OpenMP threads is a setting of the calling thread. Its queue
    is the only lock there is, so that nothing is bound to an event loop: work may come from one
    loop after another (two calls of `asyncio.run`), and from several at once.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gspo-compute")
        self._process = os.getpid()
        self._running = "nothing"
        self._closed = False

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result, in the caller's context, after all work that was given earlier.

        Raises:
            RunError: after `close`, or in a process that was forked from the one with the thread.
        """
        name = getattr(function, "__qualname__", repr(function))
        if self._closed:
            raise RunError(f"the backend is closed: {name} cannot run")
        if os.getpid() != self._process:
            raise RunError(
                f"this model was loaded in process {self._process}, and a fork has no threads: "
                "load it in the process that uses it"
            )
        context = contextvars.copy_context()

        def work() -> T:
            self._running = name
            try:
                return context.run(function, *args, **kwargs)
            except StopIteration as error:  # no future can carry it: the caller would wait for ever
                raise RuntimeError(f"{name} raised StopIteration") from error
            finally:
                self._running = "nothing"

        loop = asyncio.get_running_loop()
        notice = loop.call_later(NOTICE_SECONDS, self._tell, name)
        try:
            return await loop.run_in_executor(self._executor, work)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise RunError(f"the backend was closed while {name} waited for it") from None
            raise
        finally:
            notice.cancel()

    def close(self) -> None:
        """End the thread. The running job finishes; waiting jobs get a RunError."""
        self._closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _tell(self, name: str) -> None:
        log.warning("%s has waited %.0f s; running: %s", name, NOTICE_SECONDS, self._running)
