"""Which tokens of samples are the same: a row holds a shared prefix once.

Sorted by their tokens, samples with a common prefix are neighbours, and what a sample has in common
with any sample before it, it has in common with the one just before it. So a row is laid out in
that order, and each sample adds the tokens that the one before it doesn't have: a trie, depth
first. Two samples `1 2 3` and `1 2 4 5` make the row `1 2 3 4 5`.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gspo.data.expert_choices import padded_routes, route_shape
from gspo.data.sample import Sample

GRAIN = 16
"""Prefixes are shared up to a multiple of this many tokens, or up to where a completion starts or
the sample ends: attention over odd pieces costs more than shorter coincidences save."""


@dataclass(frozen=True)
class Layout:
    """Where each token of some samples lies in a row.

    Attributes:
        index: [U] place in the row of every token of the samples, one sample after the other.
        shared: of each sample, how many of its first tokens another sample put into the row.
        size: T, tokens of the row.
    """

    index: np.ndarray
    shared: tuple[int, ...]
    size: int


class Prefixes:
    """Common prefixes of B samples.

    Args:
        samples: any.
        routed: a token is the same only where its routes are too, as replaying them needs.
    """

    def __init__(self, samples: Sequence[Sample], routed: bool = False):
        shape = route_shape([sample.routes for sample in samples]) if routed else None
        keys = [_key(sample, shape) for sample in samples]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        width = 8 if shape is None else 8 + 2 * shape[0] * shape[1]
        # In that order: tokens that each sample has in common with the one before it.
        self._common = [0] * len(order)
        for at in range(1, len(order)):
            self._common[at] = _common(keys[order[at - 1]], keys[order[at]]) // width
        self.rank = [0] * len(order)
        for at, sample in enumerate(order):
            self.rank[sample] = at
        self._lengths = [len(sample) for sample in samples]
        self._starts = [_completion_starts(sample.ratio_mask) for sample in samples]

    def layout(self, members: Sequence[int]) -> Layout:
        """A row of some of the samples; `index` is in the order in which they are given."""
        lengths = [self._lengths[member] for member in members]
        ends = np.cumsum(lengths).tolist()
        order = sorted(range(len(members)), key=lambda i: self.rank[members[i]])
        index = np.empty(sum(lengths), dtype=np.int64)
        place = np.arange(len(index))
        shared = [0] * len(members)
        size = begin_before = 0
        rank_before = -1
        for i in order:
            rank = self.rank[members[i]]
            keep = self._worth(members[i], self._between(rank_before, rank))
            end, begin = ends[i], ends[i] - lengths[i]
            index[begin : begin + keep] = index[begin_before : begin_before + keep]
            index[begin + keep : end] = place[size : size + lengths[i] - keep]
            size += lengths[i] - keep
            shared[i], begin_before, rank_before = keep, begin, rank
        return Layout(index, tuple(shared), size)

    def grow(self, ranks: list[int], members: Sequence[int]) -> int:
        """Put samples into a row whose samples have these `ranks`, in ascending order.

        Returns how many tokens the row grows by, at most.
        """
        added = 0
        for member in members:
            rank = self.rank[member]
            at = bisect.bisect_left(ranks, rank)
            before = ranks[at - 1] if at else -1
            added += self._lengths[member] - self._worth(member, self._between(before, rank))
            ranks.insert(at, rank)
        return added

    def _between(self, before: int, rank: int) -> int:
        """Tokens in common of the samples with these ranks; 0 without a sample before."""
        return min(self._common[before + 1 : rank + 1]) if before >= 0 else 0

    def _worth(self, member: int, common: int) -> int:
        """How many of the tokens in common are shared.

        It never falls where more are in common: a sample adds the less to a row, the more samples
        are there already.
        """
        if common == self._lengths[member]:
            return common
        starts = self._starts[member]
        at = bisect.bisect_right(starts, common)
        return max(common - common % GRAIN, starts[at - 1] if at else 0)


def _completion_starts(mask: np.ndarray) -> list[int]:
    """Where each run of sampled tokens starts, ascending.

    >>> _completion_starts(np.array([False, True, True, False, True]))
    [1, 4]
    """
    edges = np.flatnonzero(mask[1:] & ~mask[:-1]) + 1
    return [0, *edges.tolist()] if mask[0] else edges.tolist()


def _key(sample: Sample, shape: tuple[int, int] | None) -> bytes:
    """Of the same width for every token; equal bytes are equal tokens (and routes)."""
    tokens = np.ascontiguousarray(sample.tokens, dtype=np.int64)
    if shape is None:
        return tokens.tobytes()
    routes = padded_routes(sample.routes, len(sample), shape).view(np.uint8)
    columns = (tokens.view(np.uint8).reshape(len(sample), 8), routes.reshape(len(sample), -1))
    return np.concatenate(columns, axis=1).tobytes()


def _common(one: bytes, two: bytes) -> int:
    """Bytes that both start with.

    >>> _common(b"abc", b"abd"), _common(b"ab", b"abc")
    (2, 2)
    """
    size = min(len(one), len(two))
    differs = np.frombuffer(one, np.uint8, size) != np.frombuffer(two, np.uint8, size)
    first = int(differs.argmax()) if size else 0
    return first if size and differs[first] else size
