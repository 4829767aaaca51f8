"""Who sees whom in a microbatch whose samples may share prompts, and its attention on a CPU.

Each sample's tail (the tokens that no sample before it put into the microbatch) sees its context
(the shared tokens before it) and, causally, itself. The tokens stand depth first, so that a token
is seen by all that follows it up to the end of its subtree: `q` sees `k` if k <= q < until[k].

Only pairs inside a sample are looked at. Tails of about the same size are attended in one call of
`tile_attention`, padded inside it. The whole tiles of a context are multiplied once for all tails
that see it; the rest of it, less than a tile, is copied to the front of each tail.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gspo.data.packing import Microbatch
from gspo.kernels.attention_call import AttentionCall, CalledAttention
from gspo.kernels.layer_input import LayerInput
from gspo.kernels.shared_contexts import context_groups
from gspo.kernels.tile_attention import TILE, in_float32, whole_tiles
from gspo.kernels.token_parts import TokenParts
from gspo.kernels.unseen import hiding

_WHOLE = TokenParts()
WASTE, SLACK = 1.3, 8
"""Padding makes a tail at most 1.3 x as long, or at most 8 tokens longer."""
QUERIES = 256
"""Longer tails are cut, so that what a piece cannot see is not multiplied."""


class Tail(NamedTuple):
    """Tokens of a microbatch, one after the other, that see the same context.

    Attributes:
        start: the first of them in the microbatch.
        width: how many they are.
        context: tokens before them that all of them see; so the first one's position.
        path: place in the microbatch's `index` at which their sample starts.
    """

    start: int
    width: int
    context: int
    path: int

    def tiles(self, window: int | None) -> tuple[int, int, int]:
        """The shared positions [first, base) of the context that it sees, in whole tiles, and the
        keys from `base` on."""
        first = 0 if window is None else max(0, self.context - window + 1) // TILE * TILE
        base = self.context // TILE * TILE
        return first, base, whole_tiles(self.context - base + self.width)


class SharedPromptAttention:
    """Attention of one microbatch, for one forward pass, used by all of its layers.

    Args:
        microbatch: as a whole.
        device: of the tensors.
        parts: the part of its tokens whose outputs are computed here; the keys and values of the
            others come from other processes.

    Attributes:
        size: T, the tokens of the microbatch.
        positions: [T] position of each token in its samples.
    """

    def __init__(
        self, microbatch: Microbatch, device: torch.device | None = None, parts: TokenParts = _WHOLE
    ):
        self.device = device or torch.device("cpu")
        self.size, self._parts = microbatch.token_count, parts
        self._first, self._end = parts.span(self.size)
        self._index = microbatch.index.numpy()
        self.positions = microbatch.positions[0].numpy()
        lengths, shared = np.array(microbatch.lengths), np.array(microbatch.shared)
        paths = np.cumsum(lengths) - lengths
        adds = lengths > shared  # a sample that begins another, or equals it, adds no tokens
        starts = self._index[(paths + shared)[adds]]
        columns = (starts, (lengths - shared)[adds], shared[adds], paths[adds])
        tails = np.stack(columns, axis=1)[np.argsort(starts)].tolist()
        self._tails = [Tail(*tail) for tail in tails]
        self._by_window: dict[int | None, list[AttentionCall]] = {}

    @cached_property
    def until(self) -> np.ndarray:
        """[T] for each token the first one after it that is not in its subtree: it is not seen."""
        out = np.zeros(self.size, dtype=np.int64)
        for start, width, context, path in self._tails:  # the last tail below a token decides
            out[self._index[path : path + context]] = start + width
            out[start : start + width] = start + width
        return out

    @property
    def padded(self) -> int:
        """Tokens and padding that layers without a window compute."""
        return sum(len(group) * group[0].width for group in self._groups(None))

    def attend(self, given: LayerInput) -> Float[Tensor, "1 T H E"]:
        """Attention of the whole microbatch in one layer, in float32 whatever the inputs are.

        T may be larger than `size`: tokens behind the samples, whose output is 0. Of a part of the
        tokens, they are those of the part.
        """
        key, value = given.key, given.value
        if self._parts.size > 1:
            both = torch.cat([key, value], -1)[0].transpose(0, 1)  # token by token
            both = in_float32(both)  # gradients are added up
            whole = self._parts.join(both).transpose(0, 1)[None]
            key, value = whole.split([key.shape[-1], value.shape[-1]], -1)
        calls = self.within(given.window)
        tensors, scoring = (given.query, key, value), (given.scale, given.softcap, given.sinks)
        return CalledAttention.apply(*tensors, calls, *scoring)[None]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalSubscript]

    def within(self, window: int | None) -> list[AttentionCall]:
        """Make the calls for layers whose tokens see the last `window` positions, with theirs."""
        if window is not None and window > int(self.positions.max()):
            window = None
        if window not in self._by_window:
            groups = self._groups(window)
            self._by_window[window] = [self._call(group, window) for group in groups]
        return self._by_window[window]

    def _groups(self, window: int | None) -> list[list[Tail]]:
        """Tails that are attended in one call, the widest of each group first."""
        pieces = [
            Tail(tail.start + done, min(QUERIES, end - done), tail.context + done, tail.path)
            for tail in self._tails
            for end in [min(tail.width, self._end - tail.start)]
            for done in range(max(0, self._first - tail.start), end, QUERIES)
        ]

        def size(tail: Tail) -> tuple[int, int, int, int]:
            first, base, keys = tail.tiles(window)
            return keys, first - base, -tail.width, tail.start

        groups: list[list[Tail]] = []
        largest = (0, 0, 0, 0)
        for tail in sorted(pieces, key=size):
            keys, context, width, _ = size(tail)
            alike = keys == largest[0] and context <= largest[1] / WASTE
            room = max(-WASTE * width, -width + SLACK)
            if groups and alike and -largest[2] <= room:
                groups[-1].append(tail)
            else:
                groups.append([tail])
                largest = (keys, context, width, 0)
        return groups

    def _call(self, group: list[Tail], window: int | None) -> AttentionCall:
        spans = [tail.tiles(window) for tail in group]
        # Tails of one context beside one another, the contexts that most of them share first.
        names = [
            (first, int(self._index[tail.path + base - 1]) if base > first else -1)
            for tail, (first, base, _) in zip(group, spans, strict=True)
        ]
        counts = Counter(names)
        order = sorted(range(len(group)), key=lambda i: (-counts[names[i]], names[i]))
        contexts: dict[tuple[int, int], int] = {}
        context_of = np.array([contexts.setdefault(names[i], len(contexts)) for i in order])
        columns = np.array([(*group[i], *spans[i]) for i in order])[:, :, None]
        start, width, before, path, first, base, own = columns.transpose(1, 0, 2)

        place = np.arange(int(width.max()))[None]
        real = place < width
        queries = start - self._first + np.where(real, place, 0)
        at = before + np.where(real, place, 0)  # position of each query
        key = base + np.arange(int(own[0, 0]))[None]  # position of each key
        keys = self._index[path + np.where(key < before + width, key, 0)]
        back = np.arange(int((base - first).max()))[None]
        older = first + back
        leader = np.unique(context_of, return_index=True)[1]
        held = self._index[path[leader] + np.where(older < base, older, 0)[leader]]

        seen = np.concatenate([np.where(older < base, older, at.max() + 1), key], axis=1)
        hidden = seen[:, None, :] > at[:, :, None]
        if window is not None:
            hidden |= seen[:, None, :] <= at[:, :, None] - window
        sizes = np.bincount(context_of)
        return AttentionCall(
            self._tensor(queries),
            None if real.all() else self._tensor(~real),
            self._tensor(keys),
            self._tensor(held),
            self._tensor(context_of),
            context_groups(context_of, sizes, self.device) if back.size else (),
            hiding(hidden, self.device),
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)
