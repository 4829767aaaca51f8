"""Who sees whom in a microbatch whose samples may share prompts, and its attention on a CPU.

Each sample's tail (the tokens that no sample before it put into the microbatch) sees its context
(the shared tokens before it) and, causally, itself. The tokens stand depth first, so that a token
is seen by all that follows it up to the end of its subtree: `q` sees `k` where k <= q < until[k].

No T x T mask is made. Tails of like size with contexts of like size are attended in one call of
scaled_dot_product_attention, padded inside that call only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from gspo.data.packing import Microbatch

WASTE = 1.15
SLACK = 4
"""Padding adds at most 15 % to a block, or at most this many tokens."""
SHORT = 64
"""Contexts up to this length are padded to share a call; longer ones share it if equal."""


@dataclass
class Block:
    """Neighbouring tails of one tree that are attended together.

    Attributes:
        start: its first token in the microbatch.
        width: its tokens, one after the other.
        context: tokens before it that all of it sees.
        path: place in the microbatch's `index` at which the first tail's sample starts.
        tails: how many there are.
    """

    start: int
    width: int
    context: int
    path: int
    tails: int = 1


@dataclass(frozen=True)
class AttentionCall:
    """One call of scaled_dot_product_attention: B blocks of Q queries and K keys.

    Attributes:
        mask: True if a query sees a key; None: plainly causal, Q = K.
    """

    blocks: int
    queries: int
    keys: int
    mask: Bool[Tensor, "B 1 Q K"] | Bool[Tensor, "1 1 Q K"] | None


@dataclass(frozen=True)
class AttentionCalls:
    """How the layers with one attention window attend.

    Attributes:
        queries: [sum of B Q] token of each query, call after call.
        keys: [sum of B K] token of each key, call after call.
        calls: their sizes and masks.
        order: [T] place among `queries` of each token; the other places are padding.
    """

    queries: Int[Tensor, " q"]
    keys: Int[Tensor, " k"]
    calls: tuple[AttentionCall, ...]
    order: Int[Tensor, " T"]


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
        self._tails = np.stack(columns, axis=1)[np.argsort(starts)].tolist()
        self._by_window: dict[int | None, AttentionCalls] = {}

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

    def attend(
        self,
        _layer: int | None,
        query: Float[Tensor, "1 H T D"],
        key: Float[Tensor, "1 K T D"],
        value: Float[Tensor, "1 K T E"],
        scaling: float | None,
        window: int | None,
    ) -> Float[Tensor, "1 T H E"]:
        """Attention of the whole microbatch in one layer."""
        plan = self.within(window)
        # Whole tokens are gathered, and parts of one tensor: many small operations cost more.
        q = query.squeeze(0).transpose(0, 1).contiguous().index_select(0, plan.queries)
        kv = torch.cat([key, value], dim=-1).squeeze(0).transpose(0, 1).contiguous()
        k, v = kv.index_select(0, plan.keys).split([key.shape[-1], value.shape[-1]], dim=-1)
        query_counts = [call.blocks * call.queries for call in plan.calls]
        key_counts = [call.blocks * call.keys for call in plan.calls]
        inputs = zip(q.split(query_counts), k.split(key_counts), v.split(key_counts), strict=True)
        outputs = [
            functional.scaled_dot_product_attention(
                *(x.unflatten(0, (call.blocks, -1)).transpose(1, 2) for x in qkv),
                attn_mask=call.mask,
                is_causal=call.mask is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            .transpose(1, 2)
            .flatten(0, 1)
            for call, qkv in zip(plan.calls, inputs, strict=True)
        ]  # each [B Q, H, E]
        return torch.cat(outputs).index_select(0, plan.order)[None]

    def within(self, window: int | None) -> AttentionCalls:
        """Make the calls for layers whose tokens see the last `window` positions, with theirs."""
        if window is not None and window > int(self.positions.max()):
            window = None
        if window not in self._by_window:
            self._by_window[window] = self._calls(window)
        return self._by_window[window]

    def _blocks(self, window: int | None) -> list[Block]:
        """Put short neighbouring tails together, so that a long context is gathered once per block,
        and the keys that a block gathers stay below nine times its tokens."""
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

    def _groups(self, window: int | None) -> list[list[Block]]:
        """Blocks that are attended in one call, the widest of each group first."""

        def alike(block: Block) -> int:
            reach = _reach(block.context, window)
            return -(-reach // 8) if reach <= SHORT else reach

        groups: list[list[Block]] = []
        for block in sorted(self._blocks(window), key=lambda b: (alike(b), -b.width, b.start)):
            first = groups[-1][0] if groups else None
            room = max(WASTE * block.width, block.width + SLACK)
            if first and alike(first) == alike(block) and first.width <= room:
                groups[-1].append(block)
            else:
                groups.append([block])
        return groups

    def _calls(self, window: int | None) -> AttentionCalls:
        queries, keys, calls = [], [], []
        order = np.empty(self.size, dtype=np.int64)
        done = 0
        for group in self._groups(window):
            start = np.array([block.start for block in group])[:, None]
            width = np.array([block.width for block in group])[:, None]
            place = np.arange(group[0].width)[None]
            tokens = start + np.where(place < width, place, 0)  # padding repeats the first token
            order[tokens[place < width]] = done + np.flatnonzero(place < width)
            context, real = self._context(group, window)
            mask = self._mask(group, tokens, context, real, window)
            queries.append(tokens.ravel())
            keys.append(np.concatenate([context, tokens], axis=1).ravel())
            sizes = (len(group), tokens.shape[1], context.shape[1] + tokens.shape[1])
            calls.append(AttentionCall(*sizes, None if mask is None else self._tensor(mask)))
            done += tokens.size
        return AttentionCalls(
            self._tensor(np.concatenate(queries)),
            self._tensor(np.concatenate(keys)),
            tuple(calls),
            self._tensor(order),
        )

    def _context(self, group: list[Block], window: int | None) -> tuple[np.ndarray, np.ndarray]:
        """[B, C] the last C tokens before each block, and which of them are real: padding is on the
        left."""
        context = np.array([block.context for block in group])[:, None]
        reach = np.array([_reach(block.context, window) for block in group])[:, None]
        path = np.array([block.path for block in group])[:, None]
        back = np.arange(int(reach.max()), 0, -1)[None]
        real = back <= reach
        return self._index[path + np.where(real, context - back, 0)], real

    def _mask(
        self,
        group: list[Block],
        tokens: np.ndarray,
        context: np.ndarray,
        real: np.ndarray,
        window: int | None,
    ) -> np.ndarray | None:
        """[B or 1, 1, Q, K] True if a query sees a key; None: plainly causal."""
        width, before = tokens.shape[1], context.shape[1]
        inside = window is None or before + width <= window
        if before == 0 and inside:
            return None
        among = np.tri(width, dtype=bool)[None]
        if any(block.tails > 1 for block in group):
            # Tails of a block don't see one another, unless one continues the other.
            among = among & (tokens[:, :, None] < self.until[tokens][:, None, :])
        front = np.ones((1, 1, before), dtype=bool) if real.all() else real[:, None, :]
        count = max(len(among), len(front))
        shapes = ((count, width, before), (count, width, width))
        both = zip((front, among), shapes, strict=True)
        mask = np.concatenate([np.broadcast_to(half, shape) for half, shape in both], axis=2)
        if not inside:
            keys = self.positions[np.concatenate([context, tokens], axis=1)]
            distance = self.positions[tokens][:, :, None] - keys[:, None, :]
            mask = mask & (distance < window)
        if len(mask) > 1 and (mask == mask[:1]).all():
            mask = mask[:1]
        return mask[:, None]

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


def _reach(context: int, window: int | None) -> int:
    """Tokens of a context that anything after it can see."""
    return context if window is None else min(context, window - 1)
