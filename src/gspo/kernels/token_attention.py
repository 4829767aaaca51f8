"""Attention while decoding: one new token of each completion, with the bits of `tile_attention`.

There a small product costs more than its arithmetic, and each operation more than its numbers. So
queries are written where products read them, and small key heads stand side by side in one product:

    query of head 0   .                  keys of head 0 | keys of head 1        (of one completion)
          .           query of head 1

What lies beside this diagonal is 0, and adds exact zeros to each score; the same places of the
output are not read. Heads stand so only where the loaded library's bits allow it (`beside`).

Shapes: as in `tile_attention`; g query heads share a key head, and M = g.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gspo.kernels.shared_contexts import Context
from gspo.kernels.tile_attention import (
    LOG2_E,
    PLAIN,
    ROWS,
    TILE,
    ContextScores,
    Scoring,
    add_tiles,
    attend,
    in_float32,
    products,
    softmax_,
)

_WIDEST = 64  # numbers side by side; with more of them the zeros cost more than is saved


@cache
@torch.no_grad()
def beside(kv_heads: int, share: int, depth: int, wide: int, dtype: torch.dtype) -> bool:
    """Whether the key heads of a completion stand side by side: small ones do, if this gives the
    bits of `attend` here. MKL on AMD sums products of 8 columns in another order than of 16.

    >>> beside(3, 3, 64, 64, torch.float32)
    False
    """
    if not share < ROWS <= kv_heads * share or kv_heads * max(depth, wide) > _WIDEST:
        return False
    draw, count = torch.Generator().manual_seed(0), 256  # roundings to bfloat16 hide most
    query, keys, values = (
        torch.randn(count, kv_heads, *shape, generator=draw).to(dtype)
        for shape in ((share, depth), (TILE, depth), (TILE, wide))
    )
    expected, _ = attend(query * LOG2_E, keys, values, None, None)
    slab, other = (x.transpose(1, 2).flatten(2)[:, None] for x in (keys, values))
    one = TokenAttention((count, kv_heads, share, depth, wide), kv_heads, query)
    return torch.equal(one.attend(query, LOG2_E, slab, other, None, None, TILE, PLAIN), expected)


def new_slabs(
    key: Float[Tensor, "M K D"], value: Float[Tensor, "M K E"], count: int, columns: int, share: int
) -> list[Tensor]:
    """Room for the keys and values of N completions, [N, K, columns, D] and [N, K, columns, E]; or
    [N, 1, columns, KD] and [N, 1, columns, KE], if the heads stand side by side."""
    kv_heads, depth, wide = key.shape[1], key.shape[2], value.shape[2]
    together = kv_heads if beside(kv_heads, share, depth, wide, key.dtype) else 1
    shape = count, kv_heads // together, columns
    return [x.new_zeros(*shape, together * x.shape[2]) for x in (key, value)]


def by_head(slab: Float[Tensor, "N k L d"], kv_heads: int) -> Float[Tensor, "N K L D"]:
    """A slab's heads, one after the other."""
    heads = kv_heads // slab.shape[1]
    return slab if heads == 1 else slab[:, 0].unflatten(-1, (heads, -1)).transpose(1, 2)


class TokenAttention:
    """Attention of one token of each of N completions, in memory that all layers and steps use.

    Args:
        shape: N, K, g, D, E.
        together: key heads that stand side by side.
        like: has the type and the device of the products.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], together: int, like: Tensor):
        count, kv_heads, share, depth, wide = shape
        rows = max(together * share, ROWS)
        size = count * kv_heads // together, rows

        def room(width: int) -> tuple[Tensor, Tensor, Tensor]:
            """All; what belongs to the heads, [N, K, g, width]; and what contexts are multiplied
            with, [N, k, M, d]."""
            line = together * width
            every = like.new_zeros(*size, line)
            of_head = share * line + width if together > 1 else rows * line
            strides = (kv_heads // together * rows * line, of_head, line, 1)
            of_heads = every.as_strided((count, kv_heads, share, width), strides)
            return every, of_heads, every.view(count, -1, rows, line)[:, :, : together * share]

        self._shape, self._rows = shape, together * share
        self._query, self._query_of, self._asked = room(depth)
        self._out, self._out_of, self._summed = room(wide)

    def attend(
        self,
        query: Float[Tensor, "N K g D"],
        scale: float,
        keys: Float[Tensor, "N k L d"],
        values: Float[Tensor, "N k L e"],
        context: Context | None,
        hidden: Float[Tensor, "n 1 1 1 U"] | Bool[Tensor, "n 1 1 1 U"] | None,
        tile: int | None,
        scoring: Scoring,
    ) -> Float[Tensor, "N K g E"]:
        """As `tile_attention.attend`.

        Args:
            query: without a scale.
            scale: that of the scores, times `LOG2_E`.
            keys, values: of each completion itself; k is 1 where heads stand side by side, in the
                context too.
            context, hidden, tile, scoring: as there.
        """
        torch.mul(query, scale, out=self._query_of)
        own = in_float32(products(self._query, keys.flatten(0, 1), tile))
        scores = own.view(*self._asked.shape[:2], -1, own.shape[2])[:, :, : self._rows]
        if scoring.sinks is not None:
            scoring = replace(scoring, sinks=scoring.sinks.view(scores.shape[1], -1))
        shared = None if context is None else ContextScores(self._asked, context, tile)
        total, _ = softmax_(scores, hidden, tile, scoring, shared)
        out = None
        if shared is not None:
            out = self._out
            shared.write_sums(self._summed)
        out = add_tiles(out, own.to(values.dtype), values.flatten(0, 1), tile)
        out = out.as_strided(self._out_of.shape, self._out_of.stride())
        return out / total.view(*self._shape[:3], 1)
