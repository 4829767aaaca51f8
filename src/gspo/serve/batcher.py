"""Requests that arrive together are sampled together.

A batch is closed when the event loop has gone round `IDLE_TURNS` times without a new request.
That counts turns and not milliseconds, so that a program whose rollouts run in this process
forms the same batches each time it runs.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from gspo.compute import ComputeThread
from gspo.errors import ServeError
from gspo.serve.engine import Completion, Engine, Request, check_fits

IDLE_TURNS = 16


@dataclass
class _Waiting:
    request: Request
    answer: asyncio.Future[list[Completion]]


class Batcher:
    """Collects concurrent requests for an engine and runs it on the compute thread.

    Args:
        engine: what samples.
        compute: where it samples; whoever changes the weights takes turns with it there.
        window: seconds to wait for more requests, for clients behind a socket.
    """

    def __init__(self, engine: Engine, compute: ComputeThread, *, window: float = 0.0):
        self._engine: Engine | None = engine
        self.window = window
        self._compute = compute
        self._waiting: list[_Waiting] = []
        self._worker: asyncio.Task[None] | None = None

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
        """Let go of the engine and its weights, whoever may still hold the routes to it."""
        self._engine = None

    async def complete(self, request: Request) -> list[Completion]:
        """The request's n completions.

        Raises:
            RequestError: it doesn't fit the context, or asks for routes that there aren't.
        """
        check_fits(request, self.engine.context)  # before it can spoil a batch
        if request.params.routes:
            self.engine.check_routes()
        answer: asyncio.Future[list[Completion]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(request, answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        while self._waiting:
            await self._settle()
            async with self._compute.turn() as compute:
                batch, self._waiting = self._waiting, []
                # A client that has gone needs no answer.
                batch = [waiting for waiting in batch if not waiting.answer.cancelled()]
                try:
                    requests = [waiting.request for waiting in batch]
                    done = await compute.run(self.engine.generate, requests)
                except BaseException as error:
                    for waiting in batch:
                        if not waiting.answer.done():
                            waiting.answer.set_exception(error)
                    if not isinstance(error, Exception):
                        raise
                    continue
            for waiting, completions in zip(batch, done, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(completions)

    async def _settle(self) -> None:
        """Until no new request has come for a while."""
        if self.window:
            await asyncio.sleep(self.window)
        quiet, seen = 0, len(self._waiting)
        while quiet < IDLE_TURNS:
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._waiting) == seen else 0
            seen = len(self._waiting)
