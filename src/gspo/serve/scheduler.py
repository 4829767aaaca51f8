"""One decode step at a time: between two steps requests join, leave and are cancelled, and whoever
waits for the device has it.

Requests come from event loops; steps run in the compute thread. A job there goes on from step to
step as long as no other job waits, and is queued again behind those that do: a call of `train` or
a publication is one job, so no token is sampled in the midst of it.

A first batch begins when the event loop has gone round `IDLE_TURNS` times without a new request.
Turns are counted, not milliseconds, so that a program whose rollouts run in this process forms the
same batches each time it runs. For the same reason, its later requests wait until the batch is
over, unless the engine is exact.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from gspo.core.compute import ComputeThread
from gspo.core.errors import BusyError, GspoError, ServeError
from gspo.serve.admission import Group, Line
from gspo.serve.batch import Batch
from gspo.serve.engine import Completion, Piece, Request

if TYPE_CHECKING:
    from gspo.serve.torch_engine import TorchEngine

IDLE_TURNS = 16
WINDOW = 0.005
"""Seconds for which a first batch waits for more requests, if they come through sockets."""
MAX_OPEN = 16_384
"""Requests that may be unanswered at once."""
STEP_SECONDS = 1800.0
"""A step that takes longer is stuck: the prompts of a first batch may take minutes on a CPU."""
TURN_SECONDS = 24 * 3600.0
"""How long a step may wait for the jobs before it, such as a call of `train`."""

log = logging.getLogger("gspo")


@dataclass(eq=False)
class _Ticket:
    """A request and who waits for it.

    Attributes:
        desk: of the event loop that it came from.
        answer: of its completions, or of the error.
        pieces: what its stream has not read yet; None: it has no stream.
        sent: tokens of each completion that were put there.
        group: its completions, once it has left the inbox.
        gone: nobody waits any more.
    """

    request: Request
    desk: _Desk
    answer: asyncio.Future[list[Completion]]
    pieces: asyncio.Queue[Piece | None] | None = None
    sent: list[int] = field(default_factory=list)
    group: Group = field(default_factory=Group)
    gone: bool = False

    def take(self, item: Piece | list[Completion] | Exception) -> None:
        """Hand over what came for it. In its event loop."""
        if isinstance(item, Piece):
            assert self.pieces is not None
            self.pieces.put_nowait(item)
        elif not self.answer.done():
            if isinstance(item, Exception):
                self.answer.set_exception(item)
            else:
                self.answer.set_result(item)
            if self.pieces is not None:
                self.pieces.put_nowait(None)


@dataclass(eq=False)
class _Desk:
    """One event loop's requests; only this loop touches it.

    Attributes:
        waiting: those that come together to the next batch.
        sent: those that were handed over, and are not answered.
        gathering: the task that waits until no new one comes.
        watch: the next look at whether the engine is stuck.
    """

    loop: asyncio.AbstractEventLoop
    waiting: list[_Ticket] = field(default_factory=list)
    sent: set[_Ticket] = field(default_factory=set)
    gathering: asyncio.Task[None] | None = None
    watch: asyncio.TimerHandle | None = None


_Items: TypeAlias = list[tuple[_Ticket, Piece | list[Completion] | Exception]]


class Scheduler:
    """Answers requests of several event loops, one decode step after another.

    Args:
        engine: what makes the steps.
        compute: where; whoever changes the weights takes turns with it there.
        sockets: requests come through sockets too. Their order is not the same from run to run
            anyway, so each one joins those that run.
    """

    def __init__(self, engine: TorchEngine, compute: ComputeThread, *, sockets: bool = False):
        self._engine, self._compute, self._sockets = engine, compute, sockets
        self._desks: dict[asyncio.AbstractEventLoop, _Desk] = {}
        self._lock = threading.RLock()
        # Under the lock:
        self._inbox: list[_Ticket] = []
        self._open = 0
        self._queued = False  # a job runs or waits
        self._closed = False
        # Of the job that runs:
        self._active: list[_Ticket] = []
        self._line: Line | None = None
        self._batch: Batch | None = None
        self._steps = 0
        self._doing = ("nothing", time.monotonic(), TURN_SECONDS)

    @property
    def joins(self) -> bool:
        """Whether requests join those that run."""
        return self._sockets or self._engine.exact

    async def complete(self, request: Request) -> list[Completion]:
        """See `Engine.complete`."""
        ticket = self._enter(request)
        try:
            return await ticket.answer
        finally:
            self._leave(ticket)

    async def stream(self, request: Request) -> AsyncIterator[Piece]:
        """See `Engine.stream`."""
        ticket = self._enter(request, asyncio.Queue())
        assert ticket.pieces is not None
        try:
            while (piece := await ticket.pieces.get()) is not None:
                yield piece
            ticket.answer.result()
        finally:
            self._leave(ticket)

    def close(self) -> None:
        """Refuse new requests, and fail those that are not answered. From any thread."""
        with self._lock:
            self._closed = True
        self._fail_all(_closed())

    # In the event loops.

    def _enter(
        self, request: Request, pieces: asyncio.Queue[Piece | None] | None = None
    ) -> _Ticket:
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
                self._desks = {**alive, loop: _Desk(loop)}
            desk = self._desks[loop]
        sent = [0] * request.params.n if pieces else []
        ticket = _Ticket(request, desk, loop.create_future(), pieces, sent)
        desk.waiting.append(ticket)
        self._next(desk)
        return ticket

    def _leave(self, ticket: _Ticket) -> None:
        """Let go of a request that is answered, or that nobody waits for."""
        ticket.gone = True
        if not ticket.answer.cancel() and not ticket.answer.cancelled():
            ticket.answer.exception()  # nobody reads it: asyncio would say so
        with self._lock:
            self._open -= 1
        desk = ticket.desk
        if ticket in desk.waiting:
            desk.waiting.remove(ticket)
        desk.sent.discard(ticket)
        self._next(desk)

    def _next(self, desk: _Desk) -> None:
        """Hand over what waits, or begin to wait for more, unless a batch has to end first."""
        if not desk.sent and desk.watch is not None:
            desk.watch.cancel()
            desk.watch = None
        if not desk.waiting or (desk.gathering is not None and not desk.gathering.done()):
            return
        if not desk.sent:
            desk.gathering = desk.loop.create_task(self._gather(desk))
        elif self.joins:
            self._send(desk)

    async def _gather(self, desk: _Desk) -> None:
        """Wait until no new request has come for a while, and hand them over."""
        try:
            if self._sockets:
                await asyncio.sleep(WINDOW)
            quiet, before = 0, len(desk.waiting)
            while quiet < IDLE_TURNS:
                await asyncio.sleep(0)
                quiet = quiet + 1 if len(desk.waiting) == before else 0
                before = len(desk.waiting)
        except asyncio.CancelledError as error:  # by a program that cancels every task it finds
            for ticket in desk.waiting:
                ticket.take(_as_ours(error))
            desk.waiting.clear()
            raise
        self._send(desk)

    def _send(self, desk: _Desk) -> None:
        tickets, desk.waiting = desk.waiting, []
        if not tickets:
            return
        desk.sent.update(tickets)
        if desk.watch is None:
            self._look_later(desk)
        with self._lock:
            self._inbox += tickets
            if not self._queued:
                self._queue()

    def _arrive(self, desk: _Desk, items: _Items) -> None:
        """Hand over what a step has made."""
        for ticket, item in items:
            ticket.take(item)
            if not isinstance(item, Piece):
                desk.sent.discard(ticket)
        self._next(desk)

    def _look_later(self, desk: _Desk) -> None:
        desk.watch = desk.loop.call_later(min(30.0, STEP_SECONDS / 10), self._look, desk)

    def _look(self, desk: _Desk) -> None:
        """Fail what waits if the engine is stuck."""
        desk.watch = None
        what, since, limit = self._doing
        waited = time.monotonic() - since
        if waited > limit:
            began = time.strftime("%H:%M:%S", time.localtime(time.time() - waited))
            error = ServeError(
                f"the engine is stuck: {what.format(self._compute.running)} since {began}, "
                f"{waited:.0f} s ago, and may take {limit:.0f}. See where that thread is "
                "(py-spy dump), and load the model again"
            )
            log.error("%s", error)
            for ticket in [*desk.sent, *desk.waiting]:
                ticket.gone = True
                ticket.take(error)
            desk.sent.clear()
            desk.waiting.clear()
        elif desk.sent:
            self._look_later(desk)

    # In any thread.

    def _queue(self) -> None:
        """Queue the next steps behind the jobs that wait for the device. Under the lock."""
        self._doing = ("waiting for its turn behind {}", time.monotonic(), TURN_SECONDS)
        self._queued = True
        try:
            job = self._compute.submit(self._run)
        except GspoError as error:
            self._queued = False
            self._fail_all(error)
        else:
            job.add_done_callback(self._ended)

    def _ended(self, job: Future[None]) -> None:
        if job.cancelled():
            self._fail_all(_closed())
        elif error := job.exception():
            self._fail_all(_as_ours(error))

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            desks, self._inbox = list(self._desks.values()), []

        def fail(desk: _Desk) -> None:
            tickets = [*desk.sent, *desk.waiting]
            desk.waiting.clear()
            for ticket in tickets:
                ticket.gone = True
            self._arrive(desk, [(ticket, error) for ticket in tickets])

        for desk in desks:
            self._call(desk, fail, desk)

    def _call(self, desk: _Desk, function: Callable[..., None], *arguments: object) -> None:
        """Call a function in a desk's event loop, if there still is one."""
        try:
            desk.loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # it is closed
            for ticket in desk.sent:
                ticket.gone = True

    # In the compute thread.

    def _run(self) -> None:
        """Make steps until nothing is left to do, or until somebody else waits for the device."""
        try:
            with self._engine.computing():
                items = self._step()
                while self._active and not self._compute.contended():
                    self._deliver(items)
                    items = self._step()
            self._deliver(items)  # outside: the time of who gets them is no time of sampling
        except BaseException:
            self._active, self._line, self._batch = [], None, None
            self._queued = False
            raise  # `_ended` tells those that wait
        with self._lock:
            if self._inbox or self._active:
                self._queue()
            else:
                self._queued, self._line, self._batch = False, None, None

    def _step(self) -> _Items:
        """Let requests come and go, decode one token of each completion; returns what came of it."""
        items = self._admit()
        line, batch = self._line, self._batch
        if line is None or batch is None:
            return items
        self._drop(line, batch)
        try:
            busy = batch.busy
            self._note(f"choosing who joins {len(busy)} completions")
            new = line.take(busy)
            self._steps += 1
            self._note(f"in step {self._steps}: {len(busy)} completions, and {len(new)} that begin")
            goes_on = batch.step(new)
        except Exception as error:
            return items + self._failed(error)
        items += self._pieces(batch)
        if self.joins or not (goes_on or line):
            active, self._active = self._active, []
            for ticket in active:
                if ticket.group.done:
                    items.append((ticket, self._answer(ticket)))
                else:
                    self._active.append(ticket)
        return items

    def _note(self, what: str) -> None:
        self._doing = (what, time.monotonic(), STEP_SECONDS)

    def _admit(self) -> _Items:
        """Take in what has arrived, unless it has to wait until the batch is over."""
        with self._lock:
            if self._active and not self.joins:
                return []
            arrived, self._inbox = self._inbox, []
        items: _Items = []
        for ticket in arrived:
            if ticket.gone:
                continue
            try:
                ticket.group = self._engine.opened(ticket.request)
            except Exception as error:
                items.append((ticket, _as_ours(error)))
                continue
            if self._line is None or self._batch is None:
                self._line, self._batch = self._engine.line(), self._engine.batch()
            self._line.add(ticket.group)
            self._active.append(ticket)
        return items

    def _drop(self, line: Line, batch: Batch) -> None:
        """Free the places of requests that nobody waits for."""
        for ticket in [ticket for ticket in self._active if ticket.gone]:
            line.drop(ticket.group)
            for completion in ticket.group.completions[: ticket.group.next]:
                if completion.finish is None:
                    batch.cancel(completion)
            self._active.remove(ticket)

    def _failed(self, error: Exception) -> _Items:
        """Fail the requests that were in a step; the others go on."""
        if not any(ticket.group.next for ticket in self._active):
            raise error  # not even the first could be chosen: it is not the requests' fault
        failed = [ticket for ticket in self._active if ticket.group.next]
        self._active = [ticket for ticket in self._active if not ticket.group.next]
        self._line, self._batch = self._engine.line(), self._engine.batch()
        for ticket in self._active:
            self._line.add(ticket.group)
        error = _as_ours(error)
        return [(ticket, error) for ticket in failed]

    def _pieces(self, batch: Batch) -> _Items:
        items: _Items = []
        for ticket in self._active:
            for index in range(len(ticket.sent)):
                completion, first = ticket.group.completions[index], ticket.sent[index]
                tokens, logprobs = batch.sampled(completion, first)
                if tokens:
                    last = ticket.sent[index] = first + len(tokens)
                    versions, reason = completion.versions_of(first, last), completion.finish
                    assert reason != "cancelled"
                    items.append((ticket, Piece(index, tokens, logprobs, versions, reason)))
        return items

    def _answer(self, ticket: _Ticket) -> list[Completion] | Exception:
        try:
            return self._engine.closed(ticket.group)
        except Exception as error:
            return _as_ours(error)

    def _deliver(self, items: _Items) -> None:
        """Wake each event loop once."""
        by_desk: defaultdict[_Desk, _Items] = defaultdict(list)
        for ticket, item in items:
            by_desk[ticket.desk].append((ticket, item))
        for desk, made in by_desk.items():
            self._call(desk, self._arrive, desk, made)


def _closed() -> ServeError:
    return ServeError("the backend that served this model is closed")


def _as_ours(error: BaseException) -> GspoError:
    """The error, made one of gspo's."""
    if isinstance(error, GspoError):
        return error
    if not isinstance(error, asyncio.CancelledError):
        log.error("sampling failed", exc_info=error)  # over HTTP the traceback is lost
    ours = ServeError(f"sampling failed: {type(error).__name__}: {error}")
    ours.__cause__ = error
    return ours
