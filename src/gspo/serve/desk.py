"""Where requests of one event loop are gathered, and get what was made for them.

A first batch begins when the event loop has gone round `IDLE_TURNS` times without a new request.
Turns are counted, not milliseconds, so that a program whose rollouts run in this process forms the
same batches each time it runs. For the same reason its later requests wait until the batch is
over, unless they may join.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from gspo.core.errors import ServeError
from gspo.serve.admission import Group
from gspo.serve.engine import Completion, Piece, Request

IDLE_TURNS = 16
WINDOW = 0.005
"""Seconds for which a first batch waits for more requests, if they come through sockets."""

Item: TypeAlias = Piece | list[Completion] | Exception
"""What is made for a request: pieces if it is a stream, then its answer or the error."""


@dataclass(eq=False, kw_only=True)
class Ticket(Group):
    """A request that somebody waits for.

    Attributes:
        desk: of the event loop that it came from.
        sent: how many tokens of each completion are in pieces by now; empty if it is no stream.
        box: what was made for it.
        gone: nobody waits for it any more.
    """

    request: Request
    desk: Desk
    sent: list[int]
    box: asyncio.Queue[Item] = field(default_factory=asyncio.Queue)
    gone: bool = False


Made: TypeAlias = list[tuple[Ticket, Item]]


class Desk:
    """One event loop's requests. Only this loop calls its methods, but `call`.

    Args:
        loop: the event loop.
        send: takes those that come to the next batch.
        joins: whether requests may join those that run.
        sockets: whether they come through sockets.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        send: Callable[[list[Ticket]], None],
        joins: Callable[[], bool],
        *,
        sockets: bool,
    ):
        self._loop, self._send_on, self._joins, self._sockets = loop, send, joins, sockets
        self._waiting: list[Ticket] = []
        self._sent: set[Ticket] = set()  # and not answered
        self._gathering: asyncio.Task[None] | None = None

    def enter(self, ticket: Ticket) -> None:
        """Take in a request."""
        self._waiting.append(ticket)
        self._hand_over()

    def leave(self, ticket: Ticket) -> None:
        """Let go of a request that nobody waits for any more."""
        ticket.gone = True
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        self._sent.discard(ticket)
        self._hand_over()

    def receive(self, made: Made) -> None:
        """Hand out what was made."""
        for ticket, item in made:
            ticket.box.put_nowait(item)
            if not isinstance(item, Piece):
                self._sent.discard(ticket)
        self._hand_over()

    def fail(self, error: Exception) -> None:
        """Answer all with the error."""
        tickets, self._waiting = [*self._sent, *self._waiting], []
        for ticket in tickets:
            ticket.gone = True
        self.receive([(ticket, error) for ticket in tickets])

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a method in the event loop, if there still is one. From any thread."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # it is closed
            for ticket in self._sent:
                ticket.gone = True

    def _hand_over(self) -> None:
        """Send what waits; or wait for more first, or until a batch has ended."""
        if not self._waiting or (self._gathering is not None and not self._gathering.done()):
            return
        if not self._sent:
            self._gathering = self._loop.create_task(self._gather())
        elif self._joins():
            self._send()

    async def _gather(self) -> None:
        """Wait until no new request has come for a while, and send them."""
        try:
            if self._sockets:
                await asyncio.sleep(WINDOW)
            quiet, before = 0, len(self._waiting)
            while quiet < IDLE_TURNS:
                await asyncio.sleep(0)
                quiet = quiet + 1 if len(self._waiting) == before else 0
                before = len(self._waiting)
        except asyncio.CancelledError:
            self.fail(ServeError("sampling failed: a program cancelled the task that begins it"))
            raise
        self._send()

    def _send(self) -> None:
        tickets, self._waiting = self._waiting, []
        self._sent.update(tickets)
        if tickets:
            self._send_on(tickets)
