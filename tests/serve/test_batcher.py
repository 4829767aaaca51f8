"""The batcher: whatever happens, everybody who waits gets an answer."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from gspo.core.compute import ComputeThread
from gspo.core.errors import NumericsError, ServeError
from gspo.serve.batcher import Batcher
from gspo.serve.engine import Request
from gspo.serve.fake_engine import FakeEngine

LIMIT = 20.0
ONE = Request((1, 2))


class Failing(FakeEngine):
    """Raises `error` once it is set."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None
        self.batches: list[int] = []

    def generate(self, requests: Sequence[Request]) -> Any:
        self.batches.append(len(requests))
        if self.error is not None:
            raise self.error
        return super().generate(requests)


@pytest.fixture
def engine() -> Failing:
    return Failing()


@pytest.fixture
def batcher(engine: Failing) -> Iterator[Batcher]:
    compute = ComputeThread()
    yield Batcher(engine, compute)
    compute.close()


async def several(batcher: Batcher, count: int = 4) -> list[Any]:
    answers = (batcher.complete(ONE) for _ in range(count))
    return await asyncio.wait_for(asyncio.gather(*answers, return_exceptions=True), LIMIT)


def test_one_loop_after_another(batcher: Batcher, engine: Failing):
    for _ in range(3):
        assert all(len(done) == 1 for done in asyncio.run(several(batcher)))
    assert engine.batches == [4, 4, 4]
    assert len(batcher._queues) <= 2  # closed loops are let go of


def test_several_loops_at_once(batcher: Batcher):
    answers: list[Any] = []
    callers = [
        threading.Thread(target=lambda: answers.extend(asyncio.run(several(batcher))))
        for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(LIMIT)
    assert len(answers) == 16
    assert all(len(done) == 1 for done in answers)


async def test_an_engine_that_fails_answers_all_and_goes_on(
    batcher: Batcher, engine: Failing, caplog: pytest.LogCaptureFixture
):
    for error in (MemoryError("no room"), StopIteration(), asyncio.CancelledError()):
        engine.error = error
        with caplog.at_level(logging.CRITICAL, "gspo"):
            results = await several(batcher)
        assert [type(result) for result in results] == [ServeError] * 4
        engine.error = None
        assert len(await batcher.complete(ONE)) == 1
    engine.error = MemoryError("no room")
    (result,) = await several(batcher, 1)
    assert str(result) == "sampling failed: MemoryError: no room"
    assert result.__cause__ is engine.error


async def test_gspos_own_errors_arrive_as_they_are(batcher: Batcher, engine: Failing):
    engine.error = NumericsError("nan")
    with pytest.raises(NumericsError, match="nan"):
        await batcher.complete(ONE)


async def test_a_worker_that_is_cancelled_answers_all(batcher: Batcher, engine: Failing):
    """As by a program that cancels every task it finds."""
    for turns in (3, 30):  # while it waits for more requests; while the engine samples
        entered, go_on = threading.Event(), threading.Event()

        def slow(requests: Any, entered: Any = entered, go_on: Any = go_on) -> Any:
            entered.set()
            go_on.wait(LIMIT)
            return []

        engine.generate = slow  # pyright: ignore[reportAttributeAccessIssue]
        waiting = asyncio.ensure_future(several(batcher))
        for _ in range(turns):
            await asyncio.sleep(0)
        if turns == 30:
            await asyncio.to_thread(entered.wait, LIMIT)
        worker = batcher._queues[asyncio.get_running_loop()].worker
        assert worker is not None
        worker.cancel()
        results = await waiting
        go_on.set()
        assert [type(result) for result in results] == [ServeError] * 4
        assert "CancelledError" in str(results[0])
    del engine.generate
    assert len(await batcher.complete(ONE)) == 1


async def test_a_wrong_number_of_answers_reaches_all(batcher: Batcher, engine: Failing):
    engine.generate = lambda requests: []  # pyright: ignore[reportAttributeAccessIssue]
    results = await several(batcher)
    assert [type(result) for result in results] == [ServeError] * 4


async def test_after_close_it_says_so(batcher: Batcher):
    batcher.close()
    with pytest.raises(ServeError, match="is closed"):
        await batcher.complete(ONE)
