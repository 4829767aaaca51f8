"""Threads that each compute a row of their own, where a model is too small to share one.

Torch's operations release the interpreter's lock, and so does the whole backward pass. Two threads
with a row each do nearly twice the work of one, while two OpenMP threads inside each small
operation mostly wait for one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from gspo.core.timing import beside

A = TypeVar("A")
B = TypeVar("B")


class Workers:
    """`count` threads; with one, the caller's own.

    >>> Workers(2).map(lambda x: x + 1, [1, 2, 3])
    [2, 3, 4]
    """

    def __init__(self, count: int = 1):
        self.count = count
        self._pool: ThreadPoolExecutor | None = None

    def map(self, function: Callable[[A], B], items: Sequence[A]) -> list[B]:
        """The function of each item, in order. Grad mode and autocast are the thread's own.

        Raises:
            Exception: the first that an item raised, once all have ended.
        """
        if self.count == 1 or len(items) == 1:
            return [function(item) for item in items]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(
                self.count, "gspo-row", lambda: torch.set_num_threads(1)
            )
        work = beside(function)  # a clock that is held sees what the threads do
        futures = [self._pool.submit(work, item) for item in items]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]

    def __deepcopy__(self, memo: object) -> Workers:
        return self  # threads are shared, not copied
