"""Who sees whom in a microbatch whose samples may share prompts, and its attention on a CPU.

Each sample's tail (the tokens that no sample before it put into the microbatch) sees its context
(the shared tokens before it) and, causally, itself. The tokens stand depth first, so that a token
is seen by all that follows it up to the end of its subtree: `q` sees `k` if k <= q < until[k].

No T x T mask is made. Tails of about the same size are attended in one call of `tile_attention`,
padded inside it. The whole tiles of a context are multiplied once for all tails that see it; the
rest of it, less than a tile, is copied to the front of each tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gspo.data.packing import Microbatch
from gspo.kernels.tile_attention import (
    LOG2_E,
    TILE,
    Context,
    ContextGroup,
    attend,
    attend_backward,
    context_groups,
    whole_tiles,
)

WASTE, SLACK = 1.3, 8
"""Padding makes a tail at most 1.3 x as long, or at most 8 tokens longer."""
QUERIES = 256
"""Longer tails are cut, so that what a piece cannot see is not multiplied."""
KEPT_BYTES = 32 * 2**20
"""Memory per layer for weights that wait for the backward pass; others are computed again."""


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


@dataclass(frozen=True)
class AttentionCall:
    """One call of `tile_attention`: N tails of Q queries and L keys, P contexts of W keys.

    Attributes:
        queries: the token of each query; padding repeats a tail's first token.
        padding: True at the padding; None: there is none.
        keys: the token of each key; padding is token 0.
        context: the token of each key of the contexts. W may be 0.
        groups: which tails belong to which contexts.
        hidden: True if a query does not see a key, the context's first.
    """

    queries: Int[Tensor, "N Q"]
    padding: Bool[Tensor, "N Q"] | None
    keys: Int[Tensor, "N L"]
    context: Int[Tensor, "P W"]
    groups: Sequence[ContextGroup]
    hidden: Bool[Tensor, "n 1 Q 1 S"]


class SharedPromptAttention:
    """Attention of one microbatch, for one forward pass, used by all of its layers.

    Attributes:
        size: T, the tokens of the microbatch.
        positions: [T] position of each token in its samples.
    """

    def __init__(self, microbatch: Microbatch, device: torch.device | None = None):
        self.device = device or torch.device("cpu")
        self.size = microbatch.token_count
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
        return sum(call.queries.numel() for call in self.within(None))

    def attend(
        self,
        _layer: int | None,
        query: Float[Tensor, "1 H T D"],
        key: Float[Tensor, "1 K T D"],
        value: Float[Tensor, "1 K T E"],
        scaling: float | None,
        window: int | None,
    ) -> Float[Tensor, "1 T H E"]:
        """Attention of the whole microbatch in one layer, in float32 whatever the inputs are.

        T may be larger than `size`: tokens behind the samples, whose output is 0.
        """
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _Attention.apply(query, key, value, self, scale, window)[None]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalSubscript]

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
            Tail(tail.start + done, min(QUERIES, tail.width - done), tail.context + done, tail.path)
            for tail in self._tails
            for done in range(0, tail.width, QUERIES)
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
        counts = {name: names.count(name) for name in dict.fromkeys(names)}
        order = sorted(range(len(group)), key=lambda i: (-counts[names[i]], names[i]))
        contexts = list(dict.fromkeys(names[i] for i in order))
        context_of = np.array([contexts.index(names[i]) for i in order])
        columns = np.array([(*group[i], *spans[i]) for i in order])[:, :, None]
        start, width, before, path, first, base, own = columns.transpose(1, 0, 2)

        place = np.arange(int(width.max()))[None]
        real = place < width
        queries = start + np.where(real, place, 0)
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
        if len(hidden) > 1 and (hidden == hidden[:1]).all():
            hidden = hidden[:1]
        sizes = np.bincount(context_of)
        return AttentionCall(
            self._tensor(queries),
            None if real.all() else self._tensor(~real),
            self._tensor(keys),
            self._tensor(held),
            context_groups(context_of, sizes, self.device) if back.size else (),
            self._tensor(hidden[:, None, :, None, :]),
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


def _rows(x: Float[Tensor, "1 H T D"]) -> Float[Tensor, "TH D"]:
    """Token by token, and inside a token head by head; in float32 at least."""
    x = x[0].transpose(0, 1).reshape(-1, x.shape[-1])
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _token_rows(tokens: Int[Tensor, "N Q"], kv_heads: int, share: int = 1) -> Int[Tensor, " r"]:
    """Rows of these tokens, by sequence, key head, token, and head that shares the key head."""
    head = torch.arange(kv_heads * share, device=tokens.device).view(kv_heads, 1, share)
    return (tokens[:, None, :, None] * (kv_heads * share) + head).flatten()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: SharedPromptAttention,
        scale: float,
        window: int | None,
    ) -> Float[Tensor, "T H E"]:
        heads, kv, total = query.shape[1], key.shape[1], query.shape[2]
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = _rows(query) * (scale * LOG2_E), _rows(key), _rows(value)
            out = v.new_zeros(total * heads, v.shape[-1])
            saved: list[Tensor] = []
            room = KEPT_BYTES if any(ctx.needs_input_grad) else 0
            for call in plan.within(window):
                inputs = _gathered(call, q, k, v, heads, kv)
                output, weights, sums = attend(*inputs, call.hidden)
                index = _token_rows(call.queries, kv, heads // kv)
                out.index_copy_(0, index, output.reshape(-1, v.shape[-1]))
                room -= weights.numel() * weights.itemsize
                saved += (weights, sums) if room >= 0 else (weights.new_empty(0), sums)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, *saved)
            ctx.plan, ctx.window, ctx.scale, ctx.dtype = plan, window, scale, query.dtype
            ctx.shapes = query.shape, key.shape, value.shape
        return out.view(total, heads, -1).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "T H E"]):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *saved = ctx.saved_tensors
        heads, kv = ctx.shapes[0][1], ctx.shapes[1][1]
        with torch.autocast(grad.device.type, enabled=False):
            upstream = grad.to(q.dtype).reshape(-1, grad.shape[-1])
            d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
            calls = ctx.plan.within(ctx.window)
            for call, weights, sums in zip(calls, saved[::2], saved[1::2], strict=True):
                inputs = _gathered(call, q, k, v, heads, kv)
                if weights.numel() == 0:
                    _, weights, _ = attend(*inputs, call.hidden)
                index = _token_rows(call.queries, kv, heads // kv)
                up = upstream.index_select(0, index).view(*inputs[0].shape[:3], -1)
                if call.padding is not None:
                    by_token = up.unflatten(2, (call.queries.shape[1], -1))
                    by_token.masked_fill_(call.padding[:, None, :, None, None], 0)
                grads = attend_backward(up, *inputs, weights, sums)
                d_q.index_add_(0, index, grads[0].reshape(-1, q.shape[-1]))
                own = _token_rows(call.keys, kv)
                d_k.index_add_(0, own, grads[1].reshape(-1, k.shape[-1]))
                d_v.index_add_(0, own, grads[2].reshape(-1, v.shape[-1]))
                if grads[3] is not None and grads[4] is not None:
                    shared = _token_rows(call.context, kv)
                    d_k.index_add_(0, shared, grads[3].reshape(-1, k.shape[-1]))
                    d_v.index_add_(0, shared, grads[4].reshape(-1, v.shape[-1]))
            d_q *= ctx.scale
            d_k /= LOG2_E
        gradients = (
            d.view(shape[2], shape[1], -1).transpose(0, 1)[None].to(ctx.dtype)
            for d, shape in zip((d_q, d_k, d_v), ctx.shapes, strict=True)
        )
        return *gradients, None, None, None


def _gathered(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, heads: int, kv: int
) -> tuple[Tensor, Tensor, Tensor, Context | None]:
    """Queries, keys and values of a call, of all of the microbatch's rows."""

    def of(rows: Tensor, tokens: Tensor, share: int = 1) -> Tensor:
        index = _token_rows(tokens, kv, share)
        return rows.index_select(0, index).view(len(tokens), kv, -1, rows.shape[-1])

    context = None
    if call.groups:
        context = Context(of(k, call.context), of(v, call.context), call.groups)
    return of(q, call.queries, heads // kv), of(k, call.keys), of(v, call.keys), context
