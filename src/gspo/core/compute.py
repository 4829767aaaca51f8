"""The one thread that touches a model: loading, sampling and training never overlap."""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import math
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, NoReturn, ParamSpec, TypeVar

from gspo.core.errors import RunError, ServeError
from gspo.core.log import log

P = ParamSpec("P")
T = TypeVar("T")

LIMIT = 24 * 3600.0
"""Seconds that a job may run, such as a call of `train`; a longer one is stuck."""
EXIT_SECONDS = 30.0
"""A program that ends waits so long for the job that runs."""
NOTICE_SECONDS = 600.0
"""After waiting so long, the log says once which job is running."""
LOOK_SECONDS = 30.0
"""Between two looks whether the thread is stuck."""
_living: weakref.WeakSet[ComputeThread] = weakref.WeakSet()


def free_cores() -> int:
    """Number of cores that this process may use; all of them if the system doesn't say."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


class Threads:
    """Daemon threads that take work from one queue: Python doesn't wait for them at its end, as it
    does, for ever, for those of an executor. They end when nobody holds this object any more.

    Args:
        count: how many.
        name: begins the name of each.
        begin: what each calls first.
    """

    def __init__(self, count: int, name: str, begin: Callable[[], None] = lambda: None):
        self._queue = queue = SimpleQueue[Any]()  # the threads know this, not the object
        given: Any = {"target": _work, "args": (queue, begin), "daemon": True}
        self.each = [threading.Thread(name=f"{name}-{n}", **given) for n in range(count)]
        self.close = weakref.finalize(self, lambda: [queue.put(None) for _ in range(count)])
        for thread in self.each:
            thread.start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        job: Future[T] = Future()
        self._queue.put((job, function))
        return job


def _work(queue: SimpleQueue[Any], begin: Callable[[], None]) -> None:
    begin()
    while (item := queue.get()) is not None:
        job, function = item
        if job.set_running_or_notify_cancel():
            try:
                job.set_result(function())
            except BaseException as error:
                job.set_exception(error)
        del item, job, function  # while this waits, nothing that they hold is needed


class ComputeThread:
    """Runs blocking work beside the event loop, one piece at a time, always in one thread.

    One thread, because the number of OpenMP threads is a setting of the calling thread. Its queue
    is the only lock there is, so that nothing is bound to an event loop: work may come from one
    loop after another (two calls of `asyncio.run`), and from several at once.

    If a job is stuck, whoever waits gets an error (see `check`), and the process ends at most
    `EXIT_SECONDS` after its program.
    """

    def __init__(self) -> None:
        self._threads = Threads(1, "gspo-compute")
        self._process = os.getpid()
        self._jobs: deque[Future[Any]] = deque()
        self._lock = threading.Lock()
        self._closed = False
        self._doing = ("nothing", 0.0, math.inf)
        _living.add(self)

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue work, from any thread; it runs in the caller's context. `close` cancels it.

        Raises:
            RunError: after `close`, or in a process that was forked from the one with the thread.
        """
        name = _name(function)
        if os.getpid() != self._process:
            raise RunError(
                f"this model was loaded in process {self._process}, and a fork has no threads: "
                "load it in the process that uses it"
            )
        context = contextvars.copy_context()

        def work() -> T:
            self.doing(name, LIMIT)
            try:
                return context.run(function, *args, **kwargs)
            except StopIteration as error:  # no future can carry it: the caller would wait for ever
                raise RuntimeError(f"{name} raised StopIteration") from error
            finally:
                self.doing("nothing", math.inf)

        with self._lock:
            if self._closed:
                raise RunError(f"the backend is closed: {name} cannot run")
            while self._jobs and self._jobs[0].done():
                self._jobs.popleft()
            job = self._threads.submit(work)
            self._jobs.append(job)
        return job

    def contended(self) -> bool:
        """Whether other work waits for the thread: asked by a job that could be cut here."""
        with self._lock:
            return any(not (job.running() or job.done()) for job in self._jobs)

    def doing(self, what: str, limit: float) -> None:
        """Note what the running job begins now, and the seconds that it may take."""
        self._doing = (what, time.monotonic(), limit)

    def check(self) -> None:
        """Say if the thread is stuck.

        Raises:
            ServeError: what runs has not ended within its limit.
        """
        what, since, limit = self._doing
        seconds = time.monotonic() - since
        if seconds > limit:
            at = time.strftime("%H:%M:%S", time.localtime(time.time() - seconds))
            raise ServeError(
                f"the thread that computes is stuck: it has been in {what} for {seconds:.0f} s, "
                f"since {at}, and {limit:.0f} s are allowed. End this program and start it again: "
                "a run goes on from its last checkpoint"
            )

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result, after all work that was given earlier; see `submit`.

        Raises:
            ServeError: the thread is stuck, see `check`.
        """
        job = asyncio.wrap_future(self.submit(function, *args, **kwargs))
        name, notice = _name(function), time.monotonic() + NOTICE_SECONDS
        try:
            while not (await asyncio.wait([job], timeout=LOOK_SECONDS))[0]:
                self.check()
                if time.monotonic() > notice:
                    told = name, NOTICE_SECONDS, self._doing[0]
                    log.warning("%s has waited %.0f s; running: %s", *told)
                    notice = math.inf
            if job.cancelled():
                raise RunError(f"the backend was closed while {name} waited for it")
            return job.result()
        finally:
            job.cancel()

    def close(self) -> None:
        """End the thread. The running job finishes; waiting jobs get a RunError."""
        with self._lock:
            self._closed = True
            jobs, self._jobs = self._jobs, deque()
        for job in jobs:
            job.cancel()
        self._threads.close()


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))


@atexit.register
def _end() -> None:
    """Wait for the jobs that run: a thread that is inside torch when Python ends may abort it."""
    end = time.monotonic() + EXIT_SECONDS
    for compute in [one for one in _living if one._process == os.getpid()]:
        compute.close()
        (thread,) = compute._threads.each
        thread.join(max(0.0, end - time.monotonic()))
        if thread.is_alive():
            told = compute._doing[0], EXIT_SECONDS
            log.error("%s still runs %.0f s after the program: it is left undone", *told)
            leave(1)


def leave(status: int) -> NoReturn:
    """End the process now, whatever is still computed: it is not written any more."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
