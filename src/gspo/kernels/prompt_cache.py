"""Keys and values of completions whose prompts are held once: the layout "shared" of `kv_cache`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from gspo.kernels.hf import no_mask
from gspo.kernels.layer_input import LayerInput
from gspo.kernels.shared_contexts import Context, context_groups
from gspo.kernels.tile_attention import LOG2_E, ROWS, TILE, attend, whole_tiles
from gspo.kernels.token_attention import TokenAttention, by_head, new_slabs
from gspo.kernels.unseen import Span, hiding, unseen

_SCORE_BYTES = 64 * 2**20
"""Memory for the scores of a pass over prompts, whose queries are attended piece by piece."""
_LARGEST_MASK = 2**24  # bytes


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
        packs: small key heads may stand side by side in the slabs; see `token_attention`.
    """

    packs = True

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
        self._prompts: dict[int, list[Tensor]] = {}  # keys and values, by layer: [P, k, W, d]
        self._slabs: dict[int, list[Tensor]] = {}  # [N, k, columns, d]
        self.lengths = np.zeros(count, dtype=np.int64)  # tokens of each completion so far
        self.base = np.zeros(count, dtype=np.int64)
        self._prompt_of = np.zeros(count, dtype=np.int64)
        self._sizes = np.full(1, count)  # completions that each prompt had at first
        self.width = 0  # W

        self._on_cpu = device.type == "cpu"
        self._tile = TILE if self._on_cpu and multiple > 1 else None  # else any order of sums does
        self._group()

    def _group(self) -> None:
        self._by_shape: dict[tuple[int, ...], TokenAttention] = {}  # of the layers' heads
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
        count, queries = tokens.shape
        self._positions = self.lengths[:, None] + np.arange(queries)
        columns = int((self._positions[:, -1] - self.base).max()) + 1
        self.make_room(columns)
        self._columns = whole_tiles(columns)
        self._places: dict[int, Tensor] = {}  # of new keys in the slabs, by the number of heads
        self._masks: dict[tuple[int, int, int | None], tuple[Span, Tensor | None]] = {}
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

    def attend(self, given: LayerInput) -> Float[Tensor, "1 T H E"]:
        """Attention of one layer inside `feed`."""
        count, queries = self._positions.shape
        query, key = given.query, given.key
        total, heads, kv_heads = query.shape[2], query.shape[1], key.shape[1]
        dtype = torch.float32 if self._on_cpu else query.dtype

        def by_token(x: Tensor) -> Tensor:  # [NQ, heads, D]
            x = x[0].transpose(0, 1)
            return (x if total == count * queries else x[: count * queries]).to(dtype)

        q = by_token(query).view(count, queries, kv_heads, heads // kv_heads, -1)
        self._write(given.layer, by_token(key), by_token(given.value), q.shape[3])
        if queries == 1:
            out = self._attend_token(given, q[:, 0])
        else:
            out = self._attend_all(given, q.transpose(1, 2))
        out = out.reshape(count * queries, heads, -1)
        if total > len(out):
            out = functional.pad(out, (0, 0, 0, 0, 0, total - len(out)))
        return out[None].to(query.dtype)

    def _write(
        self, layer: int, key: Float[Tensor, "M K D"], value: Float[Tensor, "M K E"], share: int
    ) -> None:
        """Put the new keys and values of a layer into the slabs; M = N x Q."""
        count = len(self._positions)
        if layer not in self._slabs:
            self._slabs[layer] = new_slabs(
                key, value, count, self.capacity, share if self.packs else ROWS
            )
        slabs = self._slabs[layer]
        rows = slabs[0].shape[1]
        if rows not in self._places:
            first = np.arange(count * rows).reshape(count, 1, rows) * self.capacity
            written = (self._positions - self.base[:, None])[:, :, None]
            self._places[rows] = self._tensor((first + written).ravel())
        for slab, x in zip(slabs, (key, value), strict=True):
            all_rows = slab.view(-1, slab.shape[-1])
            all_rows.index_copy_(0, self._places[rows], x.reshape(-1, slab.shape[-1]))

    def _attend_token(
        self, given: LayerInput, query: Float[Tensor, "N K g D"]
    ) -> Float[Tensor, "N K g E"]:
        """Attention of one query of each completion."""
        keys, values, context, hidden = self._seen(given, slice(0, 1))
        count, kv_heads, share, depth = query.shape
        together = kv_heads // keys.shape[1]
        shape = count, kv_heads, share, depth, values.shape[3] // together
        if shape not in self._by_shape:
            self._by_shape[shape] = TokenAttention(shape, together, query)
        seen, scoring = (keys, values, context, hidden), given.scoring(query.dtype)
        scale = LOG2_E * given.scale
        return self._by_shape[shape].attend(query, scale, *seen, self._tile, scoring)

    def _attend_all(
        self, given: LayerInput, query: Float[Tensor, "N K Q g D"]
    ) -> Float[Tensor, "N Q K g E"]:
        """Attention of several queries of each completion, as many at a time as memory allows."""
        query, scoring = query * (LOG2_E * given.scale), given.scoring(query.dtype)
        count, kv_heads, queries, share, _ = query.shape
        longest = self.width + self._columns
        piece = max(1, _SCORE_BYTES // (4 * count * kv_heads * share * longest))
        outputs = []
        for start in range(0, queries, piece):
            part = query[:, :, start : start + piece]
            span = slice(start, start + part.shape[2])
            keys, values, context, hidden = self._seen(given, span)
            keys, values = (by_head(x, kv_heads) for x in (keys, values))
            if context is not None:
                shared = [by_head(x, kv_heads) for x in (context.keys, context.values)]
                context = Context(shared[0], shared[1], context.groups)
            rows = part.flatten(2, 3)
            out, _ = attend(rows, keys, values, context, hidden, self._tile, scoring)
            outputs.append(out.unflatten(2, part.shape[2:4]))
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return out.transpose(1, 2)

    def _seen(
        self, given: LayerInput, queries: slice
    ) -> tuple[Tensor, Tensor, Context | None, Tensor | None]:
        """The slabs' keys and values, the prompts', and which of them these queries don't see."""
        key = (queries.start, queries.stop, given.window)
        found = self._masks.get(key)
        if found is None:
            at = self._positions[:, queries]
            span, hidden = unseen(at, self.base, self.width, given.window)
            found = span, None if hidden is None else hiding(hidden, self.device)
            if hidden is None or hidden.size <= _LARGEST_MASK:
                self._masks[key] = found  # that of a long prompt is made again for each layer
        (first, column, columns), mask = found
        keys, values = (x[:, :, column:columns] for x in self._slabs[given.layer])
        context = None
        if first < self.width:
            shared = [x[:, :, first:] for x in self._prompts[given.layer]]
            context = Context(shared[0], shared[1], self.groups)
        return keys, values, context, mask

    def fan_out(self, lengths: np.ndarray, prompt_of: np.ndarray, capacity: int) -> None:
        """Make completions of prompts that have been fed.

        Args:
            lengths: [P] tokens of each prompt; what was fed behind them is forgotten.
            prompt_of: [N] prompt of each completion.
            capacity: as of the class, for the completions.
        """
        base = lengths // TILE * TILE
        self.width = int(base.max())
        rest = np.minimum(base[:, None] + np.arange(TILE), self.capacity - 1)
        self.capacity = whole_tiles(TILE + capacity)
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
