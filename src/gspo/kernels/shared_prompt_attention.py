"""Who sees whom in a packed row, in which samples may share their prefixes.

Each sample's tail (the tokens that no sample before it put into the row) sees its context (the
prefix that was there already) and, causally, itself. Depth first, a token is seen by what follows
it up to the end of its subtree: `q` sees `k` where k <= q < until[k].

No T x T mask is made. Tails of like size with contexts of like size are attended in one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gspo.data.packing import Microbatch

WASTE = 1.15
SLACK = 4
"""Padding adds to no block more than 15 % or this many tokens."""
SHORT = 64
"""Contexts up to this length are padded to one another; longer ones meet in a call where equal."""


@dataclass
class Block:
    """Neighbouring tails of one tree that are attended together.

    Attributes:
        start: its first token in the row.
        width: its tokens, one after the other.
        context: tokens before it that all of it sees.
        path: where the first tail's sample starts in the batch's `index`.
        tails: how many.
    """

    start: int
    width: int
    context: int
    path: int
    tails: int = 1


@dataclass(frozen=True)
class Piece:
    """One call of scaled_dot_product_attention: B blocks of Q queries and K keys.

    Attributes:
        mask: True where a query sees a key; None: plainly causal, Q = K.
    """

    blocks: int
    queries: int
    keys: int
    mask: Bool[Tensor, "B 1 Q K"] | Bool[Tensor, "1 1 Q K"] | None


@dataclass(frozen=True)
class Attention:
    """How the layers with one attention window attend.

    Attributes:
        queries: [sum of B Q] place in the row of each piece's queries, piece after piece.
        keys: [sum of B K] the same of its keys.
        pieces: their sizes and masks.
        order: [T] place among `queries` of each token of the row; the other places are padding.
    """

    queries: Int[Tensor, " q"]
    keys: Int[Tensor, " k"]
    pieces: tuple[Piece, ...]
    order: Int[Tensor, " T"]


class RowAttention:
    """Built for one forward pass of a row, used by all of its layers."""

    def __init__(self, microbatch: Microbatch, device: torch.device | None = None):
        self.device = device or torch.device("cpu")
        self.size = microbatch.token_count
        self._index = microbatch.index.numpy()
        self.positions = microbatch.positions[0].numpy()
        lengths, shared = np.array(microbatch.lengths), np.array(microbatch.shared)
        paths = np.cumsum(lengths) - lengths
        has = lengths > shared  # a sample that is another's prefix, or its equal, adds nothing
        starts = self._index[(paths + shared)[has]]
        order = np.argsort(starts)
        columns = (starts, (lengths - shared)[has], shared[has], paths[has])
        self._tails = np.stack(columns, axis=1)[order].tolist()
        self._known: dict[int | None, Attention] = {}

    @cached_property
    def until(self) -> np.ndarray:
        """[T] where the subtree of each token's run ends in the row."""
        out = np.zeros(self.size, dtype=np.int64)
        for start, width, context, path in self._tails:  # the last one through a token counts
            out[self._index[path : path + context]] = start + width
            out[start : start + width] = start + width
        return out

    @property
    def padded(self) -> int:
        """Positions computed where every layer sees everything: T and the padding."""
        return sum(len(group) * group[0].width for group in self._grouped(None))

    def within(self, window: int | None) -> Attention:
        """For layers whose tokens see the last `window` positions, themselves included."""
        if window is not None and window > int(self.positions.max()):
            window = None
        if window not in self._known:
            self._known[window] = self._attention(window)
        return self._known[window]

    def _blocks(self, window: int | None) -> list[Block]:
        """Tails, short ones next to one another together: a long context is gathered once for each
        block, and the keys that a block gathers stay below nine times its own tokens."""
        blocks: list[Block] = []
        for start, width, context, path in self._tails:
            last = blocks[-1] if blocks else None
            enough = _reach(last.context, window) // 8 if last else 0
            if last and last.context <= context and last.width < enough:
                last.width += width
                last.tails += 1
            else:
                blocks.append(Block(start, width, context, path))
        return blocks

    def _grouped(self, window: int | None) -> list[list[Block]]:
        """Blocks that are attended in one call, the widest of each group first."""

        def like(block: Block) -> int:
            seen = _reach(block.context, window)
            return -(-seen // 8) if seen <= SHORT else seen

        groups: list[list[Block]] = []
        for block in sorted(self._blocks(window), key=lambda b: (like(b), -b.width, b.start)):
            first = groups[-1][0] if groups else None
            room = max(WASTE * block.width, block.width + SLACK)
            if first and like(first) == like(block) and first.width <= room:
                groups[-1].append(block)
            else:
                groups.append([block])
        return groups

    def _attention(self, window: int | None) -> Attention:
        queries, keys, pieces = [], [], []
        order = np.empty(self.size, dtype=np.int64)
        done = 0
        for group in self._grouped(window):
            start = np.array([block.start for block in group])[:, None]
            own = np.array([block.width for block in group])[:, None]
            at = np.arange(group[0].width)[None]
            rows = start + np.where(at < own, at, 0)  # padding repeats the first token
            order[rows[at < own]] = done + np.flatnonzero(at < own)
            seen, real = self._context(group, window)
            piece = self._piece(group, rows, seen, real, window)
            queries.append(rows.ravel())
            keys.append(np.concatenate([seen, rows], axis=1).ravel())
            pieces.append(piece)
            done += rows.size
        return Attention(
            self._tensor(np.concatenate(queries)),
            self._tensor(np.concatenate(keys)),
            tuple(pieces),
            self._tensor(order),
        )

    def _context(self, group: list[Block], window: int | None) -> tuple[np.ndarray, np.ndarray]:
        """[B, C] places in the row of the last C tokens before each block; padding, which is not
        real, is on the left."""
        context = np.array([block.context for block in group])[:, None]
        reach = np.array([_reach(block.context, window) for block in group])[:, None]
        path = np.array([block.path for block in group])[:, None]
        back = np.arange(int(reach.max()), 0, -1)[None]
        real = back <= reach
        return self._index[path + np.where(real, context - back, 0)], real

    def _piece(
        self,
        group: list[Block],
        rows: np.ndarray,
        seen: np.ndarray,
        real: np.ndarray,
        window: int | None,
    ) -> Piece:
        wide, before = rows.shape[1], seen.shape[1]
        sizes = (len(group), wide, before + wide)
        inside = window is None or before + wide <= window
        if before == 0 and inside:
            return Piece(*sizes, None)
        whole = np.tri(wide, dtype=bool)[None]
        single = all(block.tails == 1 for block in group)
        if not single:  # tails of a block don't see one another, unless one continues the other
            whole = whole & (rows[:, :, None] < self.until[rows][:, None, :])
        context = real[:, None, :] if not real.all() else np.ones((1, 1, before), dtype=bool)
        count = max(len(whole), len(context))
        mask = np.concatenate(
            [
                np.broadcast_to(context, (count, wide, before)),
                np.broadcast_to(whole, (count, wide, wide)),
            ],
            axis=2,
        )
        if not inside:
            if single:
                place = np.arange(before + wide)
                distance = (place[before:, None] - place[None, :])[None]
            else:
                columns = np.concatenate([seen, rows], axis=1)
                at = self.positions
                distance = at[rows][:, :, None] - at[columns][:, None, :]
            mask = mask & (distance < window)
        if len(mask) > 1 and (mask == mask[:1]).all():
            mask = mask[:1]
        return Piece(*sizes, self._tensor(mask[:, None]))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


def _reach(context: int, window: int | None) -> int:
    """Tokens of a context that anything after it can see."""
    return context if window is None else min(context, window - 1)
