"""Attention whose result for a token does not depend on how much is computed beside it.

Training, prefill and decoding attend by one function, so that their log-probs can be equal to the
bit. The keys of a sample are cut into tiles at multiples of `TILE` positions, and what a query
gathers is added up tile after tile, in the order of the positions. A tile that a query does not see
adds exact zeros; so neither the width of a call, nor padding, nor which completions share a prompt
changes a bit. Inside a tile, torch's products give a row the same bits whatever stands beside it if
there are at least `ROWS` rows (measured at load: `exact`).

No running maximum is needed, as in flash attention: the largest score is the same in any order, so
all powers are taken relative to it before anything is added.

Shapes: N sequences of M query rows (tokens x the heads that share a key head) in K key heads; each
has L keys of itself, a multiple of the tile, and W keys of a context that several sequences share.
P contexts; D wide keys, E wide values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from gspo.kernels.running_softmax import exp2
from gspo.kernels.shared_contexts import Context, ContextGroup

TILE = 32
"""Positions of a tile. 32 was faster than 64 and 128 on all shapes that were tried."""
LOG2_E = math.log2(math.e)
ROWS = 4
"""Fewest rows of a product: with 1 to 3, MKL sums in another order."""
DEPTH = 64
"""Most numbers of a query that are multiplied at once: with 4 rows of more than 80, MKL sums in
another order than with many."""


def whole_tiles(length: int) -> int:
    """Round up to whole tiles.

    >>> whole_tiles(33)
    64
    """
    return -(-length // TILE) * TILE


@dataclass(frozen=True)
class Scoring:
    """What some architectures do with scores, beside a softmax.

    Attributes:
        softcap: scores are softcap * tanh(score / softcap), as in Gemma 2; None: they are not.
        sinks: scores of keys without a value, one of each head, as in GPT-OSS; None: there is none.
    """

    softcap: float | None = None
    sinks: Float[Tensor, "K g"] | None = None

    @property
    def cap(self) -> float | None:
        """The soft cap in powers of 2."""
        return None if self.softcap is None else self.softcap * LOG2_E

    @property
    def share(self) -> int:
        """Heads that share a key head, if there are sinks."""
        return 0 if self.sinks is None else self.sinks.shape[1]

    def by_row(self, rows: int) -> Float[Tensor, "1 K M 1"] | None:
        """The score of each query row's sink in powers of 2."""
        if self.sinks is None:
            return None
        return (self.sinks * LOG2_E).repeat(1, rows // self.share)[None, :, :, None]


PLAIN = Scoring()


def widened(x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B d"]:
    """Zeros behind each row, to a multiple of 4: then products of any number of rows sum in one
    order. Those of 2 numbers torch computes in a loop of its own if there are few rows, and rows
    of 6 or 10 MKL by where they begin in memory.

    >>> widened(torch.ones(3, 66)).shape
    torch.Size([3, 68])
    """
    return functional.pad(x, (0, -x.shape[-1] % 4)) if x.shape[-1] % 4 else x


def attend(
    query: Float[Tensor, "N K M D"],
    keys: Float[Tensor, "N K L D"],
    values: Float[Tensor, "N K L E"],
    context: Context | None,
    hidden: Float[Tensor, "n 1 Q 1 U"] | Bool[Tensor, "n 1 Q 1 U"] | None,
    tile: int | None = TILE,
    scoring: Scoring = PLAIN,
) -> tuple[Float[Tensor, "N K M E"], Float[Tensor, "N K M 1"]]:
    """Attention of all sequences of a call, without a gradient. The softmax is in float32.

    Args:
        query: times the scale and `LOG2_E`; token by token, and inside a token head by head:
            M = Q x heads.
        keys, values: of each sequence itself.
        context: what stands before them.
        hidden: which keys a query does not see, as `unseen.hiding` makes it: of the last U of
            W + L, the context first. The others are seen by all. None: all are.
        tile: positions that are summed in one product; None: all of them, where the order of the
            sum does not matter.
        scoring: caps and sinks.

    Returns:
        The output, and the base-2 logarithm of the sum of all 2^score, the sink's included.
    """
    rows = query.shape[2]
    own = in_float32(_product(query, keys, tile))
    shared = None if context is None else ContextScores(query, context, tile)
    total, largest = softmax_(own[:, :, :rows], hidden, tile, scoring, shared)
    out = None
    if shared is not None:
        out = query.new_zeros(*own.shape[:3], values.shape[-1])
        shared.write_sums(out[:, :, :rows])
    out = _add_tiles(out, own, values, tile)[:, :, :rows]
    return out / total, total.log2().add_(largest)


def in_float32(x: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ContextScores:
    """Scores of a context's keys, of all queries that share it in one tensor; then their weights.

    They stay under their contexts, as one product for all sequences makes them: what is written
    to sequences is one number a query, or one a tile, and not all scores.

    Args:
        query, context, tile: as of `attend`.

    Attributes:
        scores: of each group, [p, K, nM, W]; n sequences share each of p contexts.
    """

    def __init__(self, query: Float[Tensor, "N K M D"], context: Context, tile: int | None):
        self._context, self._tile = context, tile
        self.scores: list[Tensor] = []
        for group in context.groups:
            rows = group.gather(query)
            products = _product(rows, context.keys[group.contexts], tile)
            self.scores.append(in_float32(products[:, :, : rows.shape[2]]))

    def hide(self, hidden: Float[Tensor, "n 1 Q 1 U"] | Bool[Tensor, "n 1 Q 1 U"]) -> None:
        """Of the last U keys, those that a query does not see."""
        for group, scores in self._groups():
            of_group = hidden[group.members] if len(hidden) > 1 else hidden[None]
            shape = group.members.shape[1], hidden.shape[2], -1
            _hide(scores.unflatten(2, shape), of_group.transpose(1, 2))

    def largest(self, like: Float[Tensor, "N K M 1"]) -> Float[Tensor, "N K M 1"]:
        """The largest score of each query."""
        out = torch.empty_like(like)
        for group, scores in self._groups():
            group.scatter(out, scores.amax(-1, keepdim=True))
        return out

    def weigh_(self, largest: Float[Tensor, "N K M 1"]) -> Float[Tensor, "N K M t"]:
        """Turn the scores into weights; returns the sum of each tile."""
        out = None
        for group, scores in self._groups():
            weights = exp2(scores.sub_(group.gather(largest)), scores)
            sums = _tile_sums(weights, self._tile)
            if out is None:
                out = sums.new_empty(*largest.shape[:3], sums.shape[-1])
            group.scatter(out, sums)
        assert out is not None
        return out

    def write_sums(self, out: Float[Tensor, "N K M E"]) -> None:
        """Write the weighted sums of the context's values."""
        for group, weights in self._groups():
            values = self._context.values[group.contexts]
            sums = _add_tiles(None, weights, values, self._tile)
            group.scatter(out, sums[:, :, : weights.shape[2]])

    def _groups(self) -> Iterator[tuple[ContextGroup, Tensor]]:
        return zip(self._context.groups, self.scores, strict=True)


def softmax_(
    scores: Float[Tensor, "N K M S"],
    hidden: Float[Tensor, "n 1 Q 1 U"] | Bool[Tensor, "n 1 Q 1 U"] | None,
    tile: int | None,
    scoring: Scoring,
    shared: ContextScores | None = None,
) -> tuple[Float[Tensor, "N K M 1"], Float[Tensor, "N K M 1"]]:
    """Turn scores into the weights 2^(score - largest score); see `attend`.

    Args:
        scores: of each sequence's own keys; without `shared`, of its context's keys before them.
        hidden, tile, scoring: as there.
        shared: the scores of the context's keys.

    Returns:
        The sums of the weights, and the largest scores.
    """
    if scoring.cap is not None:
        for x in [scores] if shared is None else [scores, *shared.scores]:
            x.div_(scoring.cap).tanh_().mul_(scoring.cap)
    if hidden is not None:
        before = hidden.shape[4] - scores.shape[3]  # keys of the context that the mask speaks of
        _hide(scores.unflatten(2, (hidden.shape[2], -1)), hidden[..., max(0, before) :])
        if shared is not None and before > 0:
            shared.hide(hidden[..., :before])
    # Powers of 2: torch's exp takes ten times as long for -inf.
    largest = scores.amax(-1, keepdim=True)
    if shared is not None:
        largest = torch.maximum(largest, shared.largest(largest))
    sinks = scoring.by_row(scores.shape[2])
    if sinks is not None:
        largest = torch.maximum(largest, sinks)
    sums = _tile_sums(exp2(scores.sub_(largest), scores), tile)
    if shared is not None:
        sums = torch.cat([shared.weigh_(largest), sums], -1)
    total = sums.cumsum(-1)[..., -1:]
    if sinks is not None:
        total = total + exp2(sinks - largest, None)
    return total, largest


def _tile_sums(weights: Float[Tensor, "N K M S"], tile: int | None) -> Float[Tensor, "N K M t"]:
    """The sum of each tile's weights."""
    if tile is None or weights.shape[-1] <= tile:
        return weights.sum(-1, keepdim=True)
    return weights.unflatten(-1, (-1, tile)).sum(-1)


def _hide(scores: Tensor, hidden: Tensor) -> None:
    """Make the scores of the last keys that a query does not see -inf, in place."""
    seen = scores[..., scores.shape[-1] - hidden.shape[-1] :]
    seen.masked_fill_(hidden, -torch.inf) if hidden.dtype == torch.bool else seen.add_(hidden)


def _product(
    rows: Float[Tensor, "N K M D"], keys: Float[Tensor, "N K L D"], tile: int | None
) -> Float[Tensor, "N K R L"]:
    """`products` of at least `ROWS` rows: more than `rows` has if that has fewer."""
    return products(_enough(rows).flatten(0, 1), keys.flatten(0, 1), tile).unflatten(
        0, rows.shape[:2]
    )


def products(
    rows: Float[Tensor, "B R D"], keys: Float[Tensor, "B L D"], tile: int | None
) -> Float[Tensor, "B R L"]:
    """rows @ keys.mT; `DEPTH` numbers at a time where the order of sums matters (`tile`)."""
    return add_tiles(None, rows, keys.mT, DEPTH if tile else None)


def _add_tiles(
    out: Float[Tensor, "N K R E"] | None,
    weights: Float[Tensor, "N K M L"],
    values: Float[Tensor, "N K L E"],
    tile: int | None,
) -> Float[Tensor, "N K R E"]:
    """out + weights @ values, tile after tile; of at least `ROWS` rows."""
    weights = _enough(weights.to(values.dtype))
    total = None if out is None else out.flatten(0, 1)
    total = add_tiles(total, weights.flatten(0, 1), values.flatten(0, 1), tile)
    return total.unflatten(0, weights.shape[:2])


def add_tiles(
    out: Float[Tensor, "B R E"] | None,
    weights: Float[Tensor, "B R L"],
    values: Float[Tensor, "B L E"],
    tile: int | None,
) -> Float[Tensor, "B R E"]:
    """out + weights @ values, tile after tile, in the memory of `out`."""
    if tile is None or weights.shape[2] <= tile:
        pieces = [(weights, values)]
    else:
        pieces = zip(weights.split(tile, 2), values.split(tile, 1), strict=True)
    for x, y in pieces:
        out = torch.bmm(x, y) if out is None else out.baddbmm_(x, y)
    assert out is not None
    return out


def _enough(rows: Float[Tensor, "*B M X"]) -> Float[Tensor, "*B R X"]:
    missing = ROWS - rows.shape[-2]
    return functional.pad(rows, (0, 0, 0, missing)) if missing > 0 else rows
