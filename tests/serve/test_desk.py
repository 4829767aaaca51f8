"""Requests of one event loop: gathered, handed over together, and answered."""

from __future__ import annotations

import asyncio

import pytest

from gspo.core.errors import ServeError
from gspo.serve.desk import Desk, Ticket
from gspo.serve.engine import Piece, Request


class Sent:
    """What a desk sends, batch by batch."""

    def __init__(self, *, joins: bool = False):
        self.batches: list[list[Ticket]] = []
        loop = asyncio.get_running_loop()
        self.desk = Desk(loop, self.batches.append, lambda: joins, sockets=False)

    def ticket(self) -> Ticket:
        ticket = Ticket(request=Request((1,)), desk=self.desk, sent=[])
        self.desk.enter(ticket)
        return ticket

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_batch_is_closed_after_16_turns_without_a_new_one():
    sent = Sent()
    for _ in range(5):
        sent.ticket()
        await turns(15)
        assert sent.sizes == []
    await turns(5)
    assert sent.sizes == [5]


@pytest.mark.parametrize(("joins", "sizes"), [(False, [1]), (True, [1, 1, 1])])
async def test_later_ones_wait_for_the_end_unless_they_join(joins: bool, sizes: list[int]):
    sent = Sent(joins=joins)
    first = sent.ticket()
    await turns(20)
    for _ in range(2):
        sent.ticket()
    await turns(40)
    assert sent.sizes == sizes
    if not joins:
        sent.desk.receive([(first, [])])
        await turns(20)
        assert sent.sizes == [1, 2]


async def test_a_batch_that_everybody_left_holds_up_nobody():
    sent = Sent()
    first = sent.ticket()
    await turns(20)
    sent.ticket()
    sent.desk.leave(first)
    await turns(20)
    assert sent.sizes == [1, 1] and first.gone


async def test_pieces_answers_and_errors_reach_their_box():
    sent = Sent()
    one, other = sent.ticket(), sent.ticket()
    await turns(20)
    piece = Piece(0, (5,), (-1.0,))
    sent.desk.receive([(one, piece), (one, [])])
    assert [one.box.get_nowait() for _ in range(2)] == [piece, []]
    error = ServeError("no")
    sent.desk.fail(error)
    assert other.box.get_nowait() is error and other.gone and not one.gone


def test_a_loop_that_is_closed_wants_nothing_more():
    async def leaves() -> tuple[Desk, Ticket]:
        sent = Sent()
        ticket = sent.ticket()
        await turns(20)
        return sent.desk, ticket

    desk, ticket = asyncio.run(leaves())
    desk.call(desk.receive, [])
    assert ticket.gone
