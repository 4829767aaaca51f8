"""An event loop whose clock jumps to the next moment at which something happens."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_FOR_A_THREAD = 10.0
"""Real seconds to wait for a thread, where no moment of the loop is left to jump to."""


class _Jumping(selectors.DefaultSelector):
    """Advances the loop's clock in place of waiting."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(_FOR_A_THREAD if timeout is None else 0)
        if not ready:
            assert timeout is not None, "everything waits, and nothing will happen"
            self.now += timeout
        return ready


class VirtualTime(asyncio.SelectorEventLoop):
    """Seconds cost nothing here, and what uses no threads runs in the same order each time."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def in_virtual_time(program: Coroutine[Any, Any, T]) -> T:
    """What the program returns.

    >>> async def sleeps():
    ...     await asyncio.sleep(3600)
    ...     return round(asyncio.get_running_loop().time())
    >>> in_virtual_time(sleeps())
    3600
    """
    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        return runner.run(program)
