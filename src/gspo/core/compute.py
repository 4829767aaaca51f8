"""The one thread that touches a model: loading, sampling and training never overlap."""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn, ParamSpec, TypeVar

from gspo.core.errors import RunError
from gspo.core.log import log

P = ParamSpec("P")
T = TypeVar("T")

NOTICE_SECONDS = 600.0
"""After waiting so long, the log says once which job is running."""


def free_cores() -> int:
    """Number of cores that this process may use; all of them if the system doesn't say."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def leave(status: int) -> NoReturn:
    """End the process now. The interpreter would first wait for the thread that computes, and
    what it computes is not written any more."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class ComputeThread:
    """Runs blocking work beside the event loop, one piece at a time, always in one thread.

    One thread, because the number of OpenMP threads is a setting of the calling thread. Its queue
    is the only lock there is, so that nothing is bound to an event loop: work may come from one
    loop after another (two calls of `asyncio.run`), and from several at once.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gspo-compute")
        self._process = os.getpid()
        self._jobs: deque[Future[Any]] = deque()
        self._lock = threading.Lock()
        self._closed = False
        self.running = "nothing"
        """Name of the job that runs."""

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue work, from any thread; it runs in the caller's context. `close` cancels it.

        Raises:
            RunError: after `close`, or in a process that was forked from the one with the thread.
        """
        name = getattr(function, "__qualname__", repr(function))
        if os.getpid() != self._process:
            raise RunError(
                f"this model was loaded in process {self._process}, and a fork has no threads: "
                "load it in the process that uses it"
            )
        context = contextvars.copy_context()

        def work() -> T:
            self.running = name
            try:
                return context.run(function, *args, **kwargs)
            except StopIteration as error:  # no future can carry it: the caller would wait for ever
                raise RuntimeError(f"{name} raised StopIteration") from error
            finally:
                self.running = "nothing"

        with self._lock:
            if self._closed:
                raise RunError(f"the backend is closed: {name} cannot run")
            while self._jobs and self._jobs[0].done():
                self._jobs.popleft()
            job = self._executor.submit(work)
            self._jobs.append(job)
        return job

    def contended(self) -> bool:
        """Whether other work waits for the thread: asked by a job that could be cut here."""
        with self._lock:
            return any(not (job.running() or job.done()) for job in self._jobs)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result, after all work that was given earlier; see `submit`."""
        job = self.submit(function, *args, **kwargs)
        name = getattr(function, "__qualname__", repr(function))
        notice = asyncio.get_running_loop().call_later(NOTICE_SECONDS, self._tell, name)
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise RunError(f"the backend was closed while {name} waited for it") from None
            raise
        finally:
            notice.cancel()

    def close(self) -> None:
        """End the thread. The running job finishes; waiting jobs get a RunError."""
        with self._lock:
            self._closed = True
            self._jobs.clear()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _tell(self, name: str) -> None:
        log.warning("%s has waited %.0f s; running: %s", name, NOTICE_SECONDS, self.running)
