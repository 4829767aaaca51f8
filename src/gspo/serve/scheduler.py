"""One decode step at a time: between two steps requests join, leave and are cancelled, and whoever
waits for the device has it.

Requests come from event loops; steps run in the compute thread. A job there goes on from step to
step as long as no other job waits, and is queued again behind those that do. A call of `train` or
a publication is one job, so no token is sampled in the midst of it.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gspo.core.compute import LOOK_SECONDS, ComputeThread
from gspo.core.errors import BusyError, GspoError, ServeError
from gspo.core.log import log
from gspo.serve.admission import Line
from gspo.serve.batch import Batch
from gspo.serve.desk import Desk, Made, Ticket
from gspo.serve.engine import Completion, Piece, Request

if TYPE_CHECKING:
    from gspo.serve.torch_engine import TorchEngine

MAX_OPEN = 16_384
"""Requests that may be unanswered at once."""
MAX_PIECES = 256
"""Pieces of a stream that may wait for their reader."""
STEP_SECONDS = 1800.0
"""A longer step is stuck. The prompts of a first batch may take minutes on a CPU."""


class Scheduler:
    """Answers requests of several event loops, one decode step after another.

    Args:
        engine: what makes the steps.
        compute: where; whoever changes the weights takes turns with it there.
        sockets: requests come through sockets too. Their order is another in each run anyway, so
            they join those that run.
    """

    def __init__(self, engine: TorchEngine, compute: ComputeThread, *, sockets: bool = False):
        self._engine, self._compute, self._sockets = engine, compute, sockets
        self._desks: dict[asyncio.AbstractEventLoop, Desk] = {}
        self._lock = threading.RLock()
        # Under the lock:
        self._inbox: list[Ticket] = []
        self._open = 0
        self._queued = self._closed = False  # whether a job runs or waits
        # Of the job that runs:
        self._active: list[Ticket] = []
        self._decoding: tuple[Line, Batch] | None = None
        self._steps = 0

    @property
    def joins(self) -> bool:
        """Whether requests join those that run."""
        return self._sockets or self._engine.policy.exact

    @property
    def traffic(self) -> tuple[int, int]:
        """How many requests run, and how many wait."""
        running = sum(ticket.next > 0 for ticket in self._active)
        return running, max(0, self._open - running)

    async def complete(self, request: Request) -> list[Completion]:
        """See `Engine.complete`."""
        with self._ticket(request, streams=False) as ticket:
            answer = await self._next_item(ticket)
            assert isinstance(answer, list)
            return answer

    async def stream(self, request: Request) -> AsyncGenerator[Piece, None]:
        """See `Engine.stream`."""
        with self._ticket(request, streams=True) as ticket:
            while isinstance(piece := await self._next_item(ticket), Piece):
                yield piece

    def close(self) -> None:
        """Refuse new requests, and fail those that are not answered. From any thread."""
        with self._lock:
            self._closed = True
        self._fail_all(_closed())

    # In the event loops.

    @contextmanager
    def _ticket(self, request: Request, *, streams: bool) -> Iterator[Ticket]:
        """A request, as long as somebody waits for it."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._closed:
                raise _closed()
            if self._open >= MAX_OPEN:
                raise BusyError(
                    f"{self._open} requests are not answered yet, the most that this engine lets "
                    "wait: send this one again later"
                )
            self._open += 1
            if loop not in self._desks:
                alive = {k: desk for k, desk in self._desks.items() if not k.is_closed()}
                desk = Desk(loop, self._send, lambda: self.joins, sockets=self._sockets)
                self._desks = {**alive, loop: desk}
            desk = self._desks[loop]
        ticket = Ticket(request=request, desk=desk, sent=[0] * request.params.n * streams)
        desk.enter(ticket)
        try:
            yield ticket
        finally:
            with self._lock:
                self._open -= 1
            desk.leave(ticket)

    async def _next_item(self, ticket: Ticket) -> Piece | list[Completion]:
        """What is made next for a request.

        Raises:
            ServeError: the engine failed or is stuck.
        """
        while True:
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    item = await ticket.box.get()
            except TimeoutError:
                self._compute.check()
            else:
                if isinstance(item, Exception):
                    raise item
                return item

    def _send(self, tickets: list[Ticket]) -> None:
        """Take what a desk has gathered."""
        with self._lock:
            self._inbox += tickets
            if not self._queued:
                self._queue()

    # In any thread.

    def _queue(self) -> None:
        """Queue the next steps behind the jobs that wait for the device. Under the lock."""
        try:
            job = self._compute.submit(self._run)
        except GspoError as error:
            self._queued = False
            self._fail_all(error)
        else:
            self._queued = True
            job.add_done_callback(self._ended)

    def _ended(self, job: Future[None]) -> None:
        if job.cancelled():  # by `ComputeThread.close`
            self._queued = False
            self._fail_all(_closed())

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            desks, self._inbox = list(self._desks.values()), []
        for desk in desks:
            desk.call(desk.fail, error)

    # In the compute thread.

    def _run(self) -> None:
        """Make steps until nothing is left to do, or until somebody else waits for the device."""
        try:
            with self._engine.computing():
                made = self._step()
                while self._active and not self._compute.contended():
                    self._deliver(made)
                    made = self._step()
            self._deliver(made)  # outside: what they do with it is no time of sampling
        except BaseException as error:
            self._active, self._decoding = [], None
            self._fail_all(_as_ours(error))
        with self._lock:
            if self._inbox or self._active:
                self._queue()
            else:
                self._queued, self._decoding = False, None

    def _step(self) -> Made:
        """Let requests come and go, and decode one token of each completion."""
        made = self._admit()
        if self._decoding is None:
            return made
        line, batch = self._decoding
        self._drop_gone(line, batch)
        self._steps += 1
        self._compute.doing(f"decode step {self._steps}", STEP_SECONDS)
        try:
            goes_on = batch.step(line.take(batch.busy))
        except Exception as error:
            return made + self._failed(error)
        for ticket in self._active:
            made += self._pieces(ticket, batch)
        if self.joins or not (goes_on or line):
            active, self._active = self._active, []
            for ticket in active:
                if all(completion.finish for completion in ticket.completions):
                    made.append((ticket, [*map(self._engine.whole, ticket.completions)]))
                else:
                    self._active.append(ticket)
        return made

    def _admit(self) -> Made:
        """Take in what has arrived, unless it has to wait until the batch is over."""
        with self._lock:
            if self._active and not self.joins:
                return []
            arrived, self._inbox = self._inbox, []
        if arrived and self._decoding is None:
            self._decoding = (self._engine.line(), self._engine.batch())
        made: Made = []
        for ticket in arrived:
            try:
                ticket.completions = self._engine.opened(ticket.request)
            except Exception as error:
                made.append((ticket, _as_ours(error)))
            else:
                self._active.append(ticket)
                assert self._decoding is not None
                self._decoding[0].add(ticket)
        return made

    def _drop_gone(self, line: Line, batch: Batch) -> None:
        """Free the places of requests that nobody waits for."""
        for ticket in [ticket for ticket in self._active if ticket.gone]:
            self._active.remove(ticket)
            line.drop(ticket)
            for completion in ticket.completions[: ticket.next]:
                if completion.finish is None:
                    batch.cancel(completion)

    def _failed(self, error: Exception) -> Made:
        """Fail the requests that were in a step; the others go on."""
        failed = [ticket for ticket in self._active if ticket.next]
        if not failed:
            raise error
        self._active = [ticket for ticket in self._active if not ticket.next]
        self._decoding = (self._engine.line(), self._engine.batch())
        for ticket in self._active:
            self._decoding[0].add(ticket)
        ours = _as_ours(error)
        return [(ticket, ours) for ticket in failed]

    def _pieces(self, ticket: Ticket, batch: Batch) -> Made:
        """What a step added to a stream; a slow reader gets it later, with what comes after it."""
        made: Made = []
        if ticket.box.qsize() >= MAX_PIECES and not all(c.finish for c in ticket.completions):
            return made
        for index, first in enumerate(ticket.sent):
            completion = ticket.completions[index]
            tokens, logprobs = batch.sampled(completion, first)
            if tokens:
                ticket.sent[index] += len(tokens)
                top = tuple(completion.top_logprobs[first : first + len(tokens)])
                whole = self._engine.whole(completion) if completion.finish else None
                made.append((ticket, Piece(index, tokens, logprobs, top, whole)))
        return made

    def _deliver(self, made: Made) -> None:
        """Wake each event loop once."""
        by_desk: defaultdict[Desk, Made] = defaultdict(list)
        for ticket, item in made:
            by_desk[ticket.desk].append((ticket, item))
        for desk, items in by_desk.items():
            desk.call(desk.receive, items)


def _closed() -> ServeError:
    return ServeError("the backend that served this model is closed")


def _as_ours(error: BaseException) -> GspoError:
    """The error, made one of gspo's."""
    if isinstance(error, GspoError):
        return error
    log.error("sampling failed", exc_info=error)  # over HTTP the traceback is lost
    ours = ServeError(f"sampling failed: {type(error).__name__}: {error}")
    ours.__cause__ = error
    return ours
