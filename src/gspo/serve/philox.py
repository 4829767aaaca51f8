"""A stream of random numbers for each completion.

Philox is counter-based (Salmon et al., 2011): number i of a stream is a function of (key, i), so
no state is kept but how many were drawn. The numbers are numpy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt64
from torch import Tensor

_BLOCKS = (16, 64)
"""Numbers that are computed at once: of new streams, many of which end soon; and after that."""
_LARGEST = 1.0 - 2.0**-23  # below 1 after rounding to float32 and scaling


class RandomStreams:
    """Uniform numbers, one stream per completion.

    A stream's numbers depend on its key only, so that a completion doesn't change with what
    happens to be decoded beside it.
    """

    def __init__(self, device: torch.device):
        self._keys = np.empty((2, 0), dtype=np.uint64)
        self._computed = np.empty(0, dtype=np.uint64)  # numbers of each stream so far
        self._block = torch.empty(0, 0, device=device)
        self._next = 0

    def add(self, keys: Sequence[tuple[int, int]]) -> None:
        """Add streams; their first numbers come with the next draw."""
        words = [[word % 2**64 for word in key] for key in keys]
        new = np.array(words, dtype=np.uint64).reshape(-1, 2).T
        self._keys = np.concatenate([self._keys, new], axis=1)
        self._computed = np.pad(self._computed, (0, len(keys)))
        missing = len(self._block) - self._next
        block = self._block.new_zeros(len(self._block), len(keys))
        block[self._next :] = self._more(slice(len(self._computed) - len(keys), None), missing)
        self._block = torch.cat([self._block, block], dim=1)

    def draw(self) -> Float[Tensor, " R"]:
        """Draw the next number in [0, 1) of each stream."""
        if self._next == len(self._block):
            young = not self._computed.all()
            self._block = self._more(slice(None), _BLOCKS[0] if young else _BLOCKS[1])
            self._next = 0
        self._next += 1
        return self._block[self._next - 1]

    def keep(self, index: Int[Tensor, " K"]) -> None:
        """Drop all other streams."""
        places = index.cpu().numpy()
        self._keys, self._computed = self._keys[:, places], self._computed[places]
        self._block = self._block[:, index]

    def _more(self, streams: slice, count: int) -> Float[Tensor, "C R"]:
        raw = philox(self._keys[:, streams], self._computed[streams], count)
        self._computed[streams] += np.uint64(count)
        # From the bits as numpy's Generator does it.
        uniform = ((raw >> np.uint64(11)) * 2.0**-53).clip(max=_LARGEST)
        return torch.from_numpy(uniform).float().to(self._block.device)


def philox(
    keys: UInt64[np.ndarray, "2 R"], first: UInt64[np.ndarray, " R"], count: int
) -> UInt64[np.ndarray, "C R"]:
    """Return `count` numbers of 64 bits of each stream, from number `first` of each on.

    They are those of `numpy.random.Philox(key=key).random_raw()`.

    >>> philox(np.zeros((2, 1), dtype=np.uint64), np.zeros(1, dtype=np.uint64), 1).item()
    213000021201967259
    """
    numbers = np.empty((len(first), count), dtype=np.uint64)
    generator = np.random.Philox(0)  # one for all: to make one takes longer than its numbers do
    state: Any = generator.state
    for row, key, done in zip(numbers, keys.T, first.tolist(), strict=True):
        state["state"] = {"key": key, "counter": [done // 4, 0, 0, 0]}  # each gives four numbers
        generator.state = state
        row[:] = generator.random_raw(done % 4 + count)[done % 4 :]
    return numbers.T
