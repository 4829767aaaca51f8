"""A KV cache with its memory laid out once: no concatenation at each decoded token."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gspo.kernels.hf import Cache, CacheLayerMixin


class SlabLayer(CacheLayerMixin):
    """Keys and values of one layer in a slab that starts with `capacity` positions.

    It doubles when it is full, so that a large max_tokens costs nothing until it is used.
    Sliding-window layers keep all positions too; their mask does the sliding.
    """

    is_sliding = False

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor
        self._values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Lay out the slab once the shapes are known."""
        rows, heads, _, _ = key_states.shape
        self._keys = key_states.new_empty(rows, heads, self.capacity, key_states.shape[-1])
        self._values = value_states.new_empty(rows, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self,
        key_states: Float[Tensor, "R K Q D"],
        value_states: Float[Tensor, "R K Q E"],
        *args: object,
        **kwargs: object,
    ) -> tuple[Float[Tensor, "R K L D"], Float[Tensor, "R K L E"]]:
        """Append positions; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.capacity:
            self._grow(max(end, 2 * self.capacity))
        self._keys[:, :, self.length : end] = key_states
        self._values[:, :, self.length : end] = value_states
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def reorder_cache(self, beam_idx: Int[Tensor, " K"]) -> None:
        """Keep these rows, in this order, repeated where an index repeats."""

        def taken(slab: Tensor) -> Tensor:
            out = slab.new_empty(len(beam_idx), *slab.shape[1:])
            out[:, :, : self.length] = slab[:, :, : self.length].index_select(0, beam_idx)
            return out

        self._keys, self._values = taken(self._keys), taken(self._values)

    def _grow(self, capacity: int) -> None:
        def grown(slab: Tensor) -> Tensor:
            rows, heads, _, width = slab.shape
            out = slab.new_empty(rows, heads, capacity, width)
            out[:, :, : self.length] = slab[:, :, : self.length]
            return out

        self._keys, self._values = grown(self._keys), grown(self._values)
        self.capacity = capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(key length, offset) for a query of this length."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Positions filled so far."""
        return self.length

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """-1: no limit, under the name that earlier transformers use."""
        return -1


class SlabCache(Cache):
    """One `SlabLayer` per attention layer."""

    def __init__(self, layers: int, capacity: int):
        super().__init__(layers=[SlabLayer(capacity) for _ in range(layers)])


def slab_bytes(rows: int, capacity: int, config: object) -> int:
    """Memory of a float32 cache, from the model's text config."""
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads  # type: ignore[attr-defined]
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    layers = config.num_hidden_layers  # type: ignore[attr-defined]
    return rows * capacity * layers * kv_heads * width * 2 * torch.float32.itemsize
