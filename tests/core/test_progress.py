"""The failure budget of a gather, and what is cancelled when it is spent."""

from __future__ import annotations

import asyncio
import math

import pytest

from gspo.core.errors import ConfigError
from gspo.core.progress import (
    Gather,
    all_or_cancel,
    current_gather,
    gathering,
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
        assert belongings == {}
        belongings["name"] = name
        await asyncio.sleep(0)
        return rollout_belongings.get() or {}

    gather = Gather(total=2)
    found = await asyncio.gather(*(within_limits(mine(name), gather, name) for name in "ab"))
    assert found == [{"name": "a"}, {"name": "b"}] and rollout_belongings.get() is None
