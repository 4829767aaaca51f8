"""A context variable's value inside a block."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

import pytest

from gspo.core.variables import holding

_NUMBER: ContextVar[int] = ContextVar("number", default=0)


async def test_it_holds_in_tasks_of_the_block_and_ends_with_it():
    async def seen() -> int:
        return _NUMBER.get()

    with holding(_NUMBER, 1) as one, holding(_NUMBER, 2):
        task = asyncio.create_task(seen())
    assert (one, _NUMBER.get(), await task) == (1, 0, 2)
    with pytest.raises(ValueError, match="no"), holding(_NUMBER, 3):
        raise ValueError("no")
    assert _NUMBER.get() == 0
