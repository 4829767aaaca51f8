"""SIGINT (Ctrl-C) and SIGTERM: the first ends a run in order, the second immediately."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from types import FrameType
from typing import Any, NoReturn, TypeVar

from gspo.core.errors import RolloutError

T = TypeVar("T")


def run_until_signal(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine as `asyncio.run` does, in the main thread; a signal cancels it.

    A signal that the program ignores from its start, as under `nohup`, stays ignored.

    Raises:
        SystemExit: 128 + the signal's number, once the coroutine has ended.
        RolloutError: code that the coroutine has started called `sys.exit`.
    """
    arrived: list[int] = []

    async def cancellable() -> T:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None

        def on_signal(number: int, frame: FrameType | None) -> None:
            if arrived:
                _end_at_once(number)
            arrived.append(number)
            # The loop may be asleep: this wakes it, a plain `cancel` would not.
            loop.call_soon_threadsafe(task.cancel)

        for number in handlers:
            signal.signal(number, on_signal)
        return await coroutine

    defaults = (signal.SIG_DFL, signal.default_int_handler)
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {n: handler for n in numbers if (handler := signal.getsignal(n)) in defaults}
    try:
        result = asyncio.run(cancellable())
        if not arrived:
            return result
    except asyncio.CancelledError:
        if not arrived:
            raise
    except SystemExit as error:
        raise RolloutError(
            f"sys.exit({error.code!r}) was called in the middle of the run, in a task of a "
            "rollout's own: raise an exception there instead"
        ) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    raise SystemExit(128 + arrived[0])


def _end_at_once(number: int) -> NoReturn:
    """End like `kill -9`, which harms no run, but show the cursor again."""
    if os.isatty(1):
        os.write(1, b"\x1b[?25h\r\n")
    os.write(2, b"ended at once; the same command goes on from the last step that was saved\n")
    os._exit(128 + number)
