"""Which tokens of samples are the same: a microbatch holds a shared prompt once.

Sorted by their tokens, samples that start alike are neighbours, and what a sample shares with any
sample before it, it shares with the one just before it. So a microbatch is laid out in that order,
and each sample adds the tokens that the one before it doesn't have: a trie, depth first. Two
samples `1 2 3` and `1 2 4`, whose last token was sampled, make the microbatch `1 2 3 4`.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from gspo.data.expert_choices import padded_expert_choices
from gspo.data.sample import Sample

GRAIN = 16
"""Tokens are shared up to a multiple of this many, or up to where a completion starts or the sample
ends: attention over odd pieces costs more than shorter coincidences save."""


class SharedPrompts:
    """What B samples share.

    Args:
        samples: any.
        replay: a token is the same only if its expert choices are too, as replaying them needs.

    Attributes:
        rank: place of each sample in the order of their tokens.
    """

    def __init__(self, samples: Sequence[Sample], replay: bool = False):
        self._lengths = [len(sample) for sample in samples]
        keys = _keys(samples, self._lengths, replay)
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self.rank = [0] * len(order)
        # By rank: tokens that each sample has in common with the one before it.
        self._common = [0] * len(order)
        for rank, number in enumerate(order):
            self.rank[number] = rank
            if rank:
                before = order[rank - 1]
                same = _same_bytes(keys[before], keys[number])
                self._common[rank] = same * self._lengths[number] // len(keys[number])
        self._starts = [_completion_starts(sample.ratio_mask) for sample in samples]

    def layout(self, members: Sequence[int]) -> tuple[np.ndarray, tuple[int, ...]]:
        """A microbatch of some of the samples, each given by its number.

        Returns:
            [U] the place in the microbatch of each token of these samples, one sample after the
            other in the order in which they are given; and for each sample, how many of its first
            tokens another sample put there.

        >>> from gspo.data.sample import sample_of
        >>> from gspo.data.turn import Turn
        >>> turns = [Turn([1, 2], [sampled], [-0.5]) for sampled in (3, 4)]
        >>> index, shared = SharedPrompts([sample_of([turn]) for turn in turns]).layout([1, 0])
        >>> index.tolist(), shared  # of 1 2 4 and of 1 2 3, in the microbatch 1 2 3 4
        ([0, 1, 3, 0, 1, 2], (2, 0))
        """
        lengths = [self._lengths[member] for member in members]
        ends = np.cumsum(lengths).tolist()
        index = np.empty(sum(lengths), dtype=np.int64)
        place = np.arange(len(index))
        shared = [0] * len(members)
        size = begin_before = 0
        rank_before = None
        for i in sorted(range(len(members)), key=lambda i: self.rank[members[i]]):
            shared[i] = self._shared(members[i], rank_before)
            begin, end = ends[i] - lengths[i], ends[i]
            split = begin + shared[i]
            index[begin:split] = index[begin_before : begin_before + shared[i]]
            index[split:end] = place[size : size + end - split]
            size += end - split
            begin_before, rank_before = begin, self.rank[members[i]]
        return index, tuple(shared)

    def grow(self, ranks: list[int], members: Sequence[int]) -> int:
        """Put samples into a microbatch whose samples have these `ranks`, in ascending order.

        Returns how many tokens the microbatch grows by, at most.
        """
        added = 0
        for member in members:
            place = bisect.bisect_left(ranks, self.rank[member])
            added += self._lengths[member]
            added -= self._shared(member, ranks[place - 1] if place else None)
            ranks.insert(place, self.rank[member])
        return added

    def _shared(self, member: int, rank_before: int | None) -> int:
        """Tokens that a sample takes from the one before it in a microbatch."""
        if rank_before is None:
            return 0
        common = min(self._common[rank_before + 1 : self.rank[member] + 1])
        if common == self._lengths[member]:
            return common
        started = [start for start in self._starts[member] if start <= common]
        return max(common - common % GRAIN, *started[-1:], 0)


def _completion_starts(mask: np.ndarray) -> list[int]:
    """The first places of the runs of sampled tokens, ascending.

    >>> _completion_starts(np.array([False, True, True, False, True]))
    [1, 4]
    """
    return (np.flatnonzero(mask[1:] > mask[:-1]) + 1).tolist()  # no sample starts with one


def _keys(samples: Sequence[Sample], lengths: Sequence[int], replay: bool) -> list[bytes]:
    """Each sample as bytes, a fixed number per token; tokens are equal if their bytes are."""
    columns = [sample.tokens.astype(np.int64).view(np.int16).reshape(-1, 4) for sample in samples]
    chosen = padded_expert_choices([s.expert_choices for s in samples], lengths) if replay else None
    if chosen is not None:
        pairs = zip(columns, chosen, strict=True)
        columns = [np.column_stack([ids, experts.reshape(len(ids), -1)]) for ids, experts in pairs]
    return [array.tobytes() for array in columns]


def _same_bytes(first: bytes, second: bytes) -> int:
    """Bytes that both start with.

    >>> _same_bytes(b"abc", b"abd"), _same_bytes(b"ab", b"abc")
    (2, 2)
    """
    size = min(len(first), len(second))
    differs = np.frombuffer(first, np.uint8, size) != np.frombuffer(second, np.uint8, size)
    return int(differs.argmax()) if differs.any() else size
