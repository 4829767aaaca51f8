"""Values that hold inside a block, for the tasks and threads that are started there too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def holding(variable: ContextVar[T], value: T) -> Iterator[T]:
    """Give a context variable a value inside the block.

    >>> variable = ContextVar("name", default=0)
    >>> with holding(variable, 1):
    ...     variable.get()
    1
    >>> variable.get()
    0
    """
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)
