"""The failure budget of a gather, and what is cancelled when it is spent."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual_time import in_virtual_time

from gspo.core.errors import ConfigError
from gspo.core.progress import (
    Gather,
    all_or_cancel,
    current_gather,
    gathering,
    in_order,
    rollout_belongings,
    within_limits,
)


@pytest.mark.parametrize("budget", [-1, math.nan, "1", None, True])
def test_a_budget_that_means_nothing(budget: object):
    with pytest.raises(ConfigError, match=r"max_exceptions = .*give how many rollouts may fail"):
        Gather(total=4, max_exceptions=budget)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("budget", "tolerated"), [(0, 0), (2, 2), (0.5, 2), (1, 1)])
def test_a_budget_is_a_count_or_a_share(budget: float, tolerated: int):
    gather = Gather(total=4, max_exceptions=budget)
    for _ in range(tolerated):
        gather.failed(OSError("tolerated"))
    with pytest.raises(OSError, match="one too many"):
        gather.failed(OSError("one too many"))


def test_outside_of_a_gather_no_failure_is_tolerated():
    with pytest.raises(OSError, match="no"):
        current_gather().failed(OSError("no"))
    with gathering(Gather(total=1, max_exceptions=1)) as gather:
        assert current_gather() is gather


async def test_the_first_error_cancels_the_rest():
    cancelled = []

    async def waits() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def fails() -> None:
        await asyncio.sleep(0)
        raise OSError("first")

    with pytest.raises(OSError, match="first"):
        await all_or_cancel([waits(), fails(), waits()])
    assert cancelled == [True, True]


async def test_each_rollout_has_belongings_of_its_own():
    async def mine(name: str) -> dict:
        belongings = rollout_belongings.get()
        assert belongings is not None and not belongings
        belongings["name"] = name
        await asyncio.sleep(0)
        return rollout_belongings.get() or {}

    gather = Gather(total=2)
    found = await asyncio.gather(*(within_limits(mine(name), gather, name) for name in "ab"))
    assert found == [{"name": "a"}, {"name": "b"}] and rollout_belongings.get() is None


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=7), st.integers(1, 4))
def test_work_begins_as_soon_as_it_may_and_no_sooner(times: list[tuple[int, int]], most: int):
    """Of (seconds of the work, seconds of what is done with it)."""
    begun: dict[int, float] = {}
    done: list[tuple[int, float]] = []

    async def work(number: int) -> int:
        assert number not in begun
        begun[number] = asyncio.get_running_loop().time()
        await asyncio.sleep(times[number][0])
        return number

    async def uses_all() -> None:
        async for number in in_order(map(work, range(len(times))), most):
            await asyncio.sleep(times[number][1])
            done.append((number, asyncio.get_running_loop().time()))

    in_virtual_time(uses_all())
    assert [number for number, _ in done] == sorted(begun) == list(range(len(times)))
    for number, moment in begun.items():  # work ends between the ends of its neighbours
        assert moment == pytest.approx(done[number - most][1] if number >= most else 0)


async def test_work_that_fails_is_told_at_its_turn_and_the_rest_is_cancelled():
    ended: list[int] = []

    async def work(number: int) -> int:
        try:
            if number == 1:
                raise OSError("one")
            await asyncio.sleep(60 * (number > 1))
        finally:
            ended.append(number)
        return number

    batches = in_order(map(work, range(9)), 3)
    assert await anext(batches) == 0
    await asyncio.sleep(0)
    assert sorted(ended) == [0, 1]  # it has failed, but what came before it may be used in peace
    with pytest.raises(OSError, match="one"):
        await anext(batches)
    assert sorted(ended) == [0, 1, 2]  # the one after it has begun nothing yet
