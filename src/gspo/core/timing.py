"""Where the time goes: spans, which cost next to nothing unless there is a clock.

@span("forward")                  # or: with span("backward"): ...
def policy.logprobs(batch): ...

with timing(Clock()) as clock:
    train()                       # its steps: with span("step")
clock.seconds                     # {"step": ..., "forward": ...}
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

from gspo.core.variables import holding

P = ParamSpec("P")
T = TypeVar("T")


STEP = "step"
"""The outermost span: what is left to it belongs to no other."""


class Clock:
    """Charges each moment inside a step to the innermost open span.

    So the seconds of all names add up to those of the `STEP` spans. Spans outside a step are not
    counted. Only threads inside `beside` have spans at the same time; then each moment is divided
    equally among them.

    Args:
        sync: called before each look at the time, such as `torch.cuda.synchronize`.
        now: seconds.

    Attributes:
        seconds: by name, the time of inner spans not included.
        calls: spans by name.

    >>> at = iter([0.0, 2.0, 5.0, 6.0])
    >>> clock = Clock(now=lambda: next(at))
    >>> with clock.span("step"), clock.span("forward"):
    ...     pass
    >>> dict(clock.seconds)
    {'step': 3.0, 'forward': 3.0}
    """

    def __init__(
        self, sync: Callable[[], None] | None = None, now: Callable[[], float] = time.perf_counter
    ):
        self.sync = sync
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._now = now
        self._open: list[str] = []
        self._beside: dict[int, list[str]] = {}
        self._lock = threading.RLock()
        self._since = 0.0

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Charge the time inside to `name`."""
        if not self._open and name != STEP:
            yield
            return
        with self._lock:
            self._charge()
            self._spans().append(name)
            self.calls[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._charge()
                self._spans().pop()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Inside the block, this thread may have spans while other threads have theirs."""
        thread = threading.get_ident()
        with self._lock:
            self._charge()
            self._beside[thread] = self._open[-1:]
        try:
            yield
        finally:
            with self._lock:
                self._charge()
                del self._beside[thread]

    def _spans(self) -> list[str]:
        return self._beside.get(threading.get_ident(), self._open)

    def _charge(self) -> None:
        if self.sync is not None:
            self.sync()
        now = self._now()
        if self._open:
            # A thread that waits for those beside one another is not charged.
            working = [spans[-1] for spans in self._beside.values() if spans] or self._open[-1:]
            for name in working:
                self.seconds[name] += (now - self._since) / len(working)  # pyright: ignore
        self._since = now


_current: ContextVar[Clock | None] = ContextVar("gspo_clock", default=None)


def timing(clock: Clock | None) -> AbstractContextManager[Clock | None]:
    """Charge spans inside the block to `clock`; if None, to no clock."""
    return holding(_current, clock)


def beside(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap a function for another thread, so that the caller's clock sees its spans there."""
    clock = _current.get()
    if clock is None:
        return function

    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        with timing(clock), clock.beside():
            return function(*args, **kwargs)

    return inner


@contextmanager
def span(name: str) -> Iterator[None]:
    """A span of the clock around it (see `Clock.span`); nothing if there is none. As a decorator it
    makes each call of a function one."""
    clock = _current.get()
    with nullcontext() if clock is None else clock.span(name):
        yield
