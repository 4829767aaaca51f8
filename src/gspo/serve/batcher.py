"""Requests that arrive together are sampled together.

A batch is closed when the event loop has gone round `IDLE_TURNS` times without a new request.
Turns are counted, not milliseconds, so that a program whose rollouts run in this process
forms the same batches each time it runs.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from gspo.core.compute import ComputeThread
from gspo.core.errors import GspoError, ServeError
from gspo.serve.engine import Completion, Engine, Request

IDLE_TURNS = 16

log = logging.getLogger("gspo")


_Waiting = tuple[Request, asyncio.Future[list[Completion]]]


@dataclass
class _Queue:
    """What waits in one event loop, and the task of that loop that answers it."""

    waiting: list[_Waiting] = field(default_factory=list)
    worker: asyncio.Task[None] | None = None

    def take(self) -> list[_Waiting]:
        """Take all that waits. A client that has gone needs no answer."""
        batch, self.waiting = self.waiting, []
        return [(request, answer) for request, answer in batch if not answer.done()]


class Batcher:
    """Collects concurrent requests for an engine and runs it on the compute thread.

    Each event loop has its own queue, since futures and tasks belong to the loop that made
    them: requests may come from one loop after another, and from the server's beside the user's.

    Args:
        engine: what samples.
        compute: where it samples; whoever changes the weights takes turns with it there.
        window: seconds to wait for more requests, for clients behind a socket.
    """

    def __init__(self, engine: Engine, compute: ComputeThread, *, window: float = 0.0):
        self._engine: Engine | None = engine
        self.window = window
        self._compute = compute
        self._queues: dict[asyncio.AbstractEventLoop, _Queue] = {}
        self._lock = threading.Lock()

    @property
    def engine(self) -> Engine:
        """What samples.

        Raises:
            ServeError: after `close`.
        """
        if self._engine is None:
            raise ServeError("the backend that served this model is closed")
        return self._engine

    def close(self) -> None:
        """Let go of the engine and its weights: a client may still hold the app."""
        self._engine = None

    async def complete(self, request: Request) -> list[Completion]:
        """Sample the request's n completions.

        Raises:
            RequestError: see `Engine.check`.
            ServeError: the engine failed, or its worker was cancelled.
        """
        self.engine.check(request)
        loop = asyncio.get_running_loop()
        queue = self._queue(loop)
        answer: asyncio.Future[list[Completion]] = loop.create_future()
        queue.waiting.append((request, answer))
        if queue.worker is None or queue.worker.done():
            queue.worker = loop.create_task(self._work(queue))
        return await answer

    def _queue(self, loop: asyncio.AbstractEventLoop) -> _Queue:
        with self._lock:
            if loop not in self._queues:
                alive = {k: v for k, v in self._queues.items() if not k.is_closed()}
                self._queues = {**alive, loop: _Queue()}
            return self._queues[loop]

    async def _work(self, queue: _Queue) -> None:
        """Answer batch after batch. If this task is cancelled, all that wait get the error."""
        while queue.waiting:
            batch: list[_Waiting] = []
            try:
                await self._settle(queue)
                batch = queue.take()
                requests = [request for request, _ in batch]
                done = await self._compute.run(self.engine.generate, requests) if batch else []
                for (_, answer), completions in zip(batch, done, strict=True):
                    if not answer.done():
                        answer.set_result(completions)
            except Exception as error:
                _fail(batch, error)
            except BaseException as error:
                _fail([*batch, *queue.take()], error)
                raise

    async def _settle(self, queue: _Queue) -> None:
        """Wait until no new request has come for a while."""
        if self.window:
            await asyncio.sleep(self.window)
        quiet, before = 0, len(queue.waiting)
        while quiet < IDLE_TURNS:
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(queue.waiting) == before else 0
            before = len(queue.waiting)


def _fail(batch: Iterable[_Waiting], error: BaseException) -> None:
    """Answer each request of a batch with the error, made one of gspo's."""
    if not isinstance(error, GspoError):
        if not isinstance(error, asyncio.CancelledError):
            log.error("sampling failed", exc_info=error)  # over HTTP the traceback is lost
        cause, error = error, ServeError(f"sampling failed: {type(error).__name__}: {error}")
        error.__cause__ = cause
    for _, answer in batch:
        if not answer.done():
            answer.set_exception(error)
