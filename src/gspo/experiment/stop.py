"""SIGINT (Ctrl-C) and SIGTERM: the first ends a run in order, the second one at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from types import FrameType
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class Stop:
    """Catches the signals that ask a program to end. A context manager, in the main thread.

    Signals that the program was started without, as under `nohup`, stay ignored.

    Attributes:
        signal: that has come.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._task: asyncio.Task[Any] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result, as of `asyncio.run`; a signal cancels it.

        Raises:
            SystemExit: 128 + the signal's number, once the coroutine has ended.
        """

        async def cancellable() -> T:
            self._task = asyncio.current_task()
            try:
                return await coroutine
            finally:
                self._task = None

        try:
            return asyncio.run(cancellable())
        except asyncio.CancelledError:
            if self.signal is None:
                raise
            raise SystemExit(128 + self.signal) from None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            _end_at_once(number)
        self.signal = signal.Signals(number)
        task = self._task
        if task is None:  # outside `run` there is nothing to end in order
            raise SystemExit(128 + number)
        # The loop may be asleep: this wakes it, a plain `cancel` would not.
        task.get_loop().call_soon_threadsafe(task.cancel)


def leave(status: int) -> NoReturn:
    """End the process now. The interpreter would first wait for the thread that computes, and
    what it computes is not written any more."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end_at_once(number: int) -> NoReturn:
    """End like `kill -9`, which harms no run, but show the cursor again."""
    for stream in (1, 2):
        if os.isatty(stream):
            os.write(stream, b"\x1b[?25h\r\n")
            break
    os.write(2, b"ended at once; the same command goes on from the last step that was saved\n")
    os._exit(128 + number)
