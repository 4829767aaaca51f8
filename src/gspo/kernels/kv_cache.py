"""The KV cache of a cascade: each prompt once, and a slab of columns that its rows write."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gspo.kernels.hf import Cache, CacheLayerMixin

Pair = tuple[Tensor, Tensor]


class CascadeLayer(CacheLayerMixin):
    """Keys and values of one layer: the prompts', and those that rows wrote since.

    Until `fan_out` it collects the prompts; from there on it appends a column at each pass.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.columns = 0
        self.prompt: Pair
        self.own: Pair | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the slabs are laid out by `fan_out`."""

    def update(
        self,
        key_states: Float[Tensor, "R K Q D"],
        value_states: Float[Tensor, "R K Q E"],
        *args: object,
        **kwargs: object,
    ) -> tuple[Float[Tensor, "R K C D"], Float[Tensor, "R K C E"]]:
        """The prompts' in the first pass; then a column more of the rows' own."""
        if self.own is None:
            self.prompt = (key_states, value_states)
            return self.prompt
        if self.columns == self.own[0].shape[2]:
            self.own = _grown(self.own, self.columns, 2 * self.columns)
        at, self.columns = self.columns, self.columns + 1
        keys, values = self.own
        keys[:, :, at] = key_states[:, :, 0]
        values[:, :, at] = value_states[:, :, 0]
        return keys[:, :, : self.columns], values[:, :, : self.columns]

    def fan_out(self, rows: int, capacity: int) -> None:
        """From here on these many rows write columns of their own."""
        keys, values = self.prompt
        self.own = (
            keys.new_empty(rows, keys.shape[1], capacity, keys.shape[3]),
            values.new_empty(rows, values.shape[1], capacity, values.shape[3]),
        )

    def keep(self, rows: Int[Tensor, " K"], first: int, prompts: Int[Tensor, " Q"] | None) -> None:
        """These rows from column `first` on, and these prompts."""
        assert self.own is not None
        written = slice(first, self.columns)
        self.own = (
            _rows_of(self.own[0], rows, written),
            _rows_of(self.own[1], rows, written),
        )
        self.columns -= first
        if prompts is not None:
            self.prompt = (self.prompt[0][prompts], self.prompt[1][prompts])

    def join(self, other: CascadeLayer, rows: int, width: int) -> None:
        """Append the other's prompts, all padded to `width`, and this many rows."""
        assert self.own is not None
        keys, values = self.prompt
        self.prompt = (
            torch.cat([_wide(keys, width), _wide(other.prompt[0], width)]),
            torch.cat([_wide(values, width), _wide(other.prompt[1], width)]),
        )
        self.own = (_taller(self.own[0], rows), _taller(self.own[1], rows))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(key length, offset), for the prompts' pass; `Cascade` masks the others itself."""
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns filled so far."""
        return self.columns

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """-1: no limit, under the name that earlier transformers use."""
        return -1


class CascadeCache(Cache):
    """One `CascadeLayer` per attention layer."""

    def __init__(self, layers: int):
        self.own = [CascadeLayer() for _ in range(layers)]
        super().__init__(layers=list(self.own))

    @property
    def columns(self) -> int:
        """Columns that the rows have written; inside a pass, the one being written included."""
        return self.own[0].columns

    def prompt(self, layer: int) -> tuple[Float[Tensor, "P K W D"], Float[Tensor, "P K W E"]]:
        """The prompts' keys and values."""
        return self.own[layer].prompt

    def fan_out(self, rows: int, capacity: int) -> None:
        """In every layer: from here on these many rows."""
        for layer in self.own:
            layer.fan_out(rows, capacity)

    def keep(self, rows: Tensor, first: int, prompts: Tensor | None) -> None:
        """In every layer: these rows, columns and prompts."""
        for layer in self.own:
            layer.keep(rows, first, prompts)

    def join(self, other: CascadeCache, rows: int, width: int) -> None:
        """In every layer: more prompts and rows."""
        for mine, theirs in zip(self.own, other.own, strict=True):
            mine.join(theirs, rows, width)


def _grown(pair: Pair, written: int, capacity: int) -> Pair:
    out = []
    for slab in pair:
        wider = slab.new_empty(*slab.shape[:2], capacity, slab.shape[3])
        wider[:, :, :written] = slab[:, :, :written]
        out.append(wider)
    return out[0], out[1]


def _rows_of(slab: Tensor, rows: Tensor, written: slice) -> Tensor:
    out = slab.new_empty(len(rows), *slab.shape[1:])
    out[:, :, : written.stop - written.start] = slab[:, :, written].index_select(0, rows)
    return out


def _wide(x: Tensor, width: int) -> Tensor:
    """Zeros in front of the positions, as prompts are padded."""
    return torch.nn.functional.pad(x, (0, 0, width - x.shape[2], 0))


def _taller(slab: Tensor, rows: int) -> Tensor:
    """More rows of zeros, not of whatever lay there: a NaN would pass through its weight of 0."""
    return torch.cat([slab, slab.new_zeros(rows, *slab.shape[1:])])
