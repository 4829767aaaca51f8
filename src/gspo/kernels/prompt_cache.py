"""Keys and values of completions whose prompts are held once: the layout "shared" of `kv_cache`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from gspo.kernels.hf import no_mask
from gspo.kernels.shared_contexts import Context, context_groups
from gspo.kernels.tile_attention import (
    LOG2_E,
    TILE,
    Scoring,
    attend,
    hiding,
    whole_tiles,
)

_SCORE_BYTES = 64 * 2**20
"""Memory for the scores of a pass over prompts, whose queries are attended piece by piece."""
_LARGEST_MASK = 2**24  # bytes
_Span: TypeAlias = tuple[int, int, int]
"""The first position of the prompts that is seen, the first column of the slabs, and the last + 1.
"""


class SharedPrompts:
    """N completions of P prompts, whose whole tiles are held once; see `tile_attention`.

    Position p of a completion is always key p of its sample, as in a microbatch. The positions
    below its `base`, whole tiles of its prompt, are in the prompt's keys; those from `base` on, the
    rest of the prompt and what was decoded, are in the completion's own slab, from column 0. So a
    completion is computed in the same way whatever runs beside it and whenever it joined.
    Which completion belongs to which prompt is known on the host, so that no pass waits for a
    device. No cache of transformers is used: attention hands over the keys and values.

    Args:
        backbone: the model below its output head.
        count: N; each of them is empty at first.
        capacity: columns of a slab that are laid out at first; they grow when they are full.
        device: of the model.
        multiple: the tokens of a pass are padded to a multiple of this (see `kernels.exact`).

    Attributes:
        fed: completions, and tokens of each, of the last pass.
    """

    def __init__(
        self,
        backbone: nn.Module,
        count: int,
        capacity: int,
        device: torch.device,
        multiple: int = 1,
    ):
        self.backbone, self.device, self._multiple = backbone, device, multiple
        self.capacity = whole_tiles(capacity)
        self._prompts: dict[int, list[Tensor]] = {}  # keys and values, by layer: [P, K, W, D]
        self._slabs: dict[int, list[Tensor]] = {}  # [N, K, columns, D]
        self.lengths = np.zeros(count, dtype=np.int64)  # tokens of each completion so far
        self.base = np.zeros(count, dtype=np.int64)
        self._prompt_of = np.zeros(count, dtype=np.int64)
        self._sizes = np.full(1, count)  # completions that each prompt had at first
        self.width = 0  # W
        self._scores: Tensor | None = None
        self.fed = (0, 0)
        self._tile = TILE if device.type == "cpu" else None
        self._group()

    def _group(self) -> None:
        self.groups = (
            context_groups(self._prompt_of, self._sizes, self.device) if self.width else []
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def advance(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """Feed one token to each completion; returns the last hidden states."""
        return self.feed(tokens[:, None])[:, 0]

    def feed(self, tokens: Int[Tensor, "N Q"]) -> Float[Tensor, "N Q D"]:
        """Feed Q tokens to each completion; returns the last hidden states."""
        count, queries = self.fed = tuple(tokens.shape)
        self._positions = self.lengths[:, None] + np.arange(queries)
        columns = int((self._positions[:, -1] - self.base).max()) + 1
        self.make_room(columns)
        self._columns = whole_tiles(columns)
        self._places: dict[int, Tensor] = {}  # of new keys in the slabs, by the number of heads
        self._masks: dict[tuple[int, int, int | None], tuple[_Span, Tensor | None]] = {}
        missing = -tokens.numel() % self._multiple
        given = torch.stack([tokens.flatten(), self._tensor(self._positions).flatten()])
        ids, positions = functional.pad(given, (0, missing))[:, None]
        hidden = self.backbone(
            input_ids=ids,
            attention_mask=no_mask(self.device),
            position_ids=positions,
            use_cache=False,
            gspo_plan=self,
        ).last_hidden_state[0, : tokens.numel()]
        self.lengths = self.lengths + queries
        return hidden.view(count, queries, -1)

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "1 H T D"],
        key: Float[Tensor, "1 K T D"],
        value: Float[Tensor, "1 K T E"],
        scaling: float | None,
        window: int | None,
        softcap: float | None = None,
        sinks: Float[Tensor, " H"] | None = None,
    ) -> Float[Tensor, "1 T H E"]:
        """Attention of one layer inside `feed`."""
        count, queries = self._positions.shape
        total, heads, kv_heads = query.shape[2], query.shape[1], key.shape[1]
        dtype = torch.float32 if self._tile else query.dtype
        scale = LOG2_E * (query.shape[-1] ** -0.5 if scaling is None else scaling)

        def by_token(x: Tensor) -> Tensor:  # [NQ, heads, D]
            return x[0].transpose(0, 1)[: count * queries].to(dtype)

        held = None if sinks is None else sinks.to(dtype).view(kv_heads, -1)
        scoring = Scoring(softcap, held)
        self._write(layer, by_token(key), by_token(value))
        with torch.autocast(query.device.type, enabled=False):
            q = (by_token(query) * scale).view(count, queries, kv_heads, heads // kv_heads, -1)
            q = q.transpose(1, 2)
            longest = self.width + self._columns
            piece = max(1, _SCORE_BYTES // (4 * count * heads * longest))
            outputs = [
                self._attend(layer, q[:, :, start : start + piece], start, window, scoring)
                for start in range(0, queries, piece)
            ]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        out = out.transpose(1, 2).reshape(count * queries, heads, -1)
        if total > len(out):
            out = functional.pad(out, (0, 0, 0, 0, 0, total - len(out)))
        return out[None].to(query.dtype)

    def _write(
        self, layer: int, key: Float[Tensor, "M K D"], value: Float[Tensor, "M K E"]
    ) -> None:
        """Put the new keys and values of a layer into the slabs; M = N x Q."""
        count, kv_heads = len(self._positions), key.shape[1]
        if layer not in self._slabs:
            self._slabs[layer] = [
                x.new_zeros(count, kv_heads, self.capacity, x.shape[-1]) for x in (key, value)
            ]
        if kv_heads not in self._places:  # among rows of D numbers
            first = np.arange(count * kv_heads).reshape(count, 1, kv_heads) * self.capacity
            written = (self._positions - self.base[:, None])[:, :, None]
            self._places[kv_heads] = self._tensor((first + written).ravel())
        for slab, x in zip(self._slabs[layer], (key, value), strict=True):
            rows = slab.view(-1, slab.shape[-1])
            rows.index_copy_(0, self._places[kv_heads], x.reshape(-1, slab.shape[-1]))

    def _attend(
        self,
        layer: int,
        query: Float[Tensor, "N K Q g D"],
        start: int,
        window: int | None,
        scoring: Scoring,
    ) -> Float[Tensor, "N K Q g E"]:
        """Attention of the queries from `start` on."""
        queries = slice(start, start + query.shape[2])
        (first, column, columns), hidden = self._not_visible(queries, window)
        keys, values = (x[:, :, column:columns] for x in self._slabs[layer])
        context = None
        if first < self.width:
            shared = [x[:, :, first:] for x in self._prompts[layer]]
            context = Context(shared[0], shared[1], self.groups)
        room = self._room if query.shape[2] == 1 else None
        rows = query.flatten(2, 3)
        out, *_ = attend(rows, keys, values, context, hidden, self._tile, room, scoring)
        return out.unflatten(2, query.shape[2:4])

    def _room(self, shape: tuple[int, ...]) -> Tensor:
        """Memory for the weights of a step, which all layers use: new memory takes time."""
        if self._scores is None or self._scores.shape != shape:
            self._scores = torch.zeros(shape, device=self.device)
        return self._scores

    def _not_visible(self, queries: slice, window: int | None) -> tuple[_Span, Tensor | None]:
        """Mark what completions do not see: what lies behind a token, outside its window, or at the
        end of a prompt that is shorter than others. Tiles that nobody sees are left out.

        Returns:
            What is left of prompts and slabs; and for the keys inside, what `tile_attention.hiding`
            makes.
        """
        key = (queries.start, queries.stop, window)
        if key not in self._masks:
            at = self._positions[:, queries]
            first = column = 0
            if window is not None:
                oldest = at[:, 0] - window + 1
                first = min(max(0, int(oldest.min())) // TILE * TILE, self.width)
                column = max(0, int((oldest - self.base).min())) // TILE * TILE
            columns = whole_tiles(int((at[:, -1] - self.base).max()) + 1)
            base = self.base[:, None]
            place = base + np.arange(column, columns)
            if window is None and (self.base == self.width).all():
                place = place[:, (at[:, 0] - self.base).min() :]  # the keys before are seen by all
            else:
                prompt = np.arange(first, self.width)[None]
                prompt = np.where(prompt < base, prompt, at.max() + 1)
                place = np.concatenate([prompt, place], axis=1)
            place = place[:, None]
            hidden = place > at[:, :, None]
            if window is not None:
                hidden |= place <= at[:, :, None] - window
            mask = hiding(hidden, self.device) if hidden.any() else None
            found = (first, column, columns), mask
            if hidden.size > _LARGEST_MASK:  # of a long prompt: made again for each layer
                return found
            self._masks[key] = found
        return self._masks[key]

    def fan_out(self, lengths: np.ndarray, prompt_of: np.ndarray, capacity: int) -> None:
        """Make completions of prompts that have been fed.

        Args:
            lengths: [P] tokens of each prompt; what was fed behind them is forgotten.
            prompt_of: [N] prompt of each completion.
            capacity: as of the class, for the completions.
        """
        base = lengths // TILE * TILE
        self.width = int(base.max())
        self.capacity = whole_tiles(TILE + capacity)
        rest = np.minimum(base[:, None] + np.arange(TILE), self._slab_columns() - 1)
        prompts, chosen = torch.arange(len(lengths))[:, None], self._tensor(prompt_of)
        for layer, pair in self._slabs.items():
            self._prompts[layer] = [x[:, :, : self.width].clone() for x in pair]
            begun = [x[prompts, :, self._tensor(rest)].transpose(1, 2)[chosen] for x in pair]
            more = self.capacity - TILE
            self._slabs[layer] = [functional.pad(x, (0, 0, 0, more)) for x in begun]
        self.lengths, self.base = lengths[prompt_of], base[prompt_of]
        self._prompt_of = prompt_of
        self._sizes = np.bincount(prompt_of, minlength=len(lengths))
        self._group()

    def layer(self, layer: int) -> tuple[list[Tensor] | None, list[Tensor]]:
        """Keys and values of a layer: those that completions share, if any, and the slabs."""
        return self._prompts[layer] if self.width else None, self._slabs[layer]

    def make_room(self, columns: int) -> None:
        """Let the slabs grow to so many columns at least."""
        if columns > self.capacity:
            more = whole_tiles(max(columns, 2 * self.capacity)) - self.capacity
            self.capacity += more
            self._change_slabs(lambda x: functional.pad(x, (0, 0, 0, more)))

    def _slab_columns(self) -> int:
        return next(iter(self._slabs.values()))[0].shape[2]

    def keep(self, completions: np.ndarray) -> None:
        """Keep only these completions; drop the prompts that none of them needs."""
        self.lengths, self.base = self.lengths[completions], self.base[completions]
        self._prompt_of = self._prompt_of[completions]
        chosen = self._tensor(completions)
        used = whole_tiles(int((self.lengths - self.base).max(initial=0)))

        def taken(slab: Tensor) -> Tensor:
            out = slab.new_empty(len(chosen), *slab.shape[1:])
            out[:, :, :used] = slab[:, :, :used].index_select(0, chosen)
            out[:, :, used:] = 0  # not whatever lies in the memory: NaN times a weight of 0 is NaN
            return out

        self._change_slabs(taken)
        alive = np.unique(self._prompt_of)
        if self.width and len(alive) <= len(self._sizes) // 2:
            left = self._tensor(alive)
            for layer, pair in self._prompts.items():
                self._prompts[layer] = [x[left] for x in pair]
            self._prompt_of = np.searchsorted(alive, self._prompt_of)
            self._sizes = self._sizes[alive]
        self._group()

    def join(self, other: SharedPrompts) -> None:
        """Let another's completions run beside these."""
        width, capacity = max(self.width, other.width), max(self.capacity, other.capacity)

        def joined(mine: Tensor, theirs: Tensor, length: int) -> Tensor:
            both = (mine, theirs)
            return torch.cat([functional.pad(x, (0, 0, 0, length - x.shape[2])) for x in both])

        for held, others, length in (
            (self._prompts, other._prompts, width),
            (self._slabs, other._slabs, capacity),
        ):
            for layer, pair in held.items():
                both = zip(pair, others[layer], strict=True)
                held[layer] = [joined(mine, theirs, length) for mine, theirs in both]
        self.width, self.capacity = width, capacity
        self._prompt_of = np.concatenate([self._prompt_of, other._prompt_of + len(self._sizes)])
        self._sizes = np.concatenate([self._sizes, other._sizes])
        self.lengths = np.concatenate([self.lengths, other.lengths])
        self.base = np.concatenate([self.base, other.base])
        self._group()

    def _change_slabs(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer, pair in self._slabs.items():
            self._slabs[layer] = [change(x) for x in pair]
