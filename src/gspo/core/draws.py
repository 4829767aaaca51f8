"""Seeds for random draws.

A seed depends on the purpose of the draw, never on the number of earlier draws. So
a killed run draws the same numbers when it goes on, whatever it had measured in between.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
from collections.abc import Coroutine
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from gspo.core.variables import holding

T = TypeVar("T")
Word = int | str

_purpose: contextvars.ContextVar[tuple[Word, ...]] = contextvars.ContextVar(
    "gspo_purpose", default=()
)


def seed_of(*words: Word) -> int:
    """A seed in 0..2**63 - 1 from whole numbers and texts.

    The same on every machine and in every process, as `hash` is not.

    >>> seed_of(0, "train", 3) == seed_of(0, "train", 3)
    True
    >>> seed_of(0, "train", 3) == seed_of(0, "heldout", 3)
    False
    """
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def purpose() -> tuple[Word, ...]:
    """The purpose of requests that have no seed, such as ("train", 3, 0): split, prompt, rollout.

    Empty outside a rollout.
    """
    return _purpose.get()


def drawing_for(*words: Word) -> AbstractContextManager[Any]:
    """Give requests inside the block this purpose."""
    return holding(_purpose, words)


def numbered_task(number: int, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start a task whose requests have this code's purpose and, after it, the number."""
    context = contextvars.copy_context()
    context.run(_purpose.set, (*purpose(), number))
    return asyncio.get_running_loop().create_task(coroutine, context=context)
