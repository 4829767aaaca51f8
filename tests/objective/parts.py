"""Threads that have a part of the tokens each, as processes that meet by all_reduce do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from gspo.objective import Segments

T = TypeVar("T")

# Python 3.11 computes a cached property of one object at a time: threads that meet inside it would
# wait for one another. Processes don't.
vars(Segments)["lengths"].lock = nullcontext()


class Meeting:
    """Adds up the tensors of `size` threads, in forward and in backward pass."""

    def __init__(self, size: int):
        self.size = size
        self._barrier, self._held = threading.Barrier(size, timeout=5), [torch.zeros(0)] * size

    def add(self, part: int, values: Tensor) -> Tensor:
        self._held[part] = values.detach().clone()
        self._barrier.wait()
        total = torch.stack(self._held).sum(0)
        self._barrier.wait()  # nobody writes the next one before all have read this
        return total

    def each(self, work: Callable[[int, Callable[[Tensor], Tensor]], T]) -> list[T]:
        """What `work` returns for each part; it gets the part's number and `sum_parts`."""
        with ThreadPoolExecutor(self.size) as pool:
            sums = [lambda x, part=part: _Sum.apply(x, self, part) for part in range(self.size)]
            return list(pool.map(work, range(self.size), sums))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, meeting: Meeting, part: int) -> Tensor:
        ctx.where = meeting, part
        return meeting.add(part, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        meeting, part = ctx.where
        return meeting.add(part, grad), None, None
