"""Threads that compute a microbatch each, if a model is too small to split an operation.

Torch's operations release the interpreter's lock, and so does the whole backward pass. Two threads
with a microbatch each do nearly twice the work of one, while two OpenMP threads inside each small
operation mostly wait for one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import wait
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from gspo.core.compute import Threads
from gspo.core.timing import beside
from gspo.kernels.token_parts import TokenParts

A = TypeVar("A")
B = TypeVar("B")


class Workers:
    """`count` threads; if it is one, the thread of the caller.

    >>> Workers(2).map(lambda x: x + 1, [1, 2, 3])
    [2, 3, 4]

    Several processes are another class with these methods, `gspo.train.mesh.Mesh`.

    Attributes:
        count: how many microbatches are computed side by side.
        threads: how many of them in this process.
        rank, size: which of how many processes this is.
        parts: which tokens of a microbatch this process computes.
        checkpoint_group: connects the processes for what they write beside training.
        ep_size: how many processes share one set of experts.
    """

    rank, size, ep_size = 0, 1, 1
    parts = TokenParts()
    checkpoint_group: Any = None

    def __init__(self, count: int = 1):
        self.count = self.threads = count
        if count > 1:
            self._pool = Threads(count, "gspo-microbatch", partial(torch.set_num_threads, 1))

    def map(self, function: Callable[[A], B], items: Sequence[A]) -> list[B]:
        """Call the function with each item; the results are in the order of the items.

        Grad mode is set for each thread separately: the function sets its own.

        Raises:
            Exception: the first that an item raised, once all have ended.
        """
        if self.count == 1 or len(items) == 1:
            return [function(item) for item in items]
        work = beside(function)  # a clock that is held sees what the threads do
        futures = [self._pool.submit(partial(work, item)) for item in items]
        wait(futures)
        return [future.result() for future in futures]

    def backward(self, loss: Tensor) -> None:
        """The backward pass of a microbatch's part of the loss."""
        loss.backward()

    def finish(self, lm: torch.nn.Module) -> None:
        """After the last backward pass of an optimizer step: `.grad` is the whole step's."""

    def everywhere(self, function: Callable[..., A], *args: Any) -> A:
        """Call a function of a module in every process that trains, with what each has of its own
        in place of `args`: a trainer, its policy. Only the first process asks for it.

        Returns:
            What it returned here.
        """
        return function(*args)

    def share(self, value: A) -> A:
        """The value that the first process gives."""
        return value

    def agree(self, name: str, value: object, remedy: str) -> None:
        """Refuse what is not the same in all processes."""
