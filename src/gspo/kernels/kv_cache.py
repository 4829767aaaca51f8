"""How keys and values are held while decoding: what each completion has seen so far.

- `SharedPrompts` (layout "shared"): one copy of each prompt's keys and values for all of its
  completions; others may join while some run. It needs a model whose attention goes through gspo's
  (`attention.PACKED`).
- `ModelCache` (layout "model_cache"): the cache that the model makes for itself, with a copy of the
  prompt for each completion. It works with any attention of transformers, and holds whatever is in
  the cache: recurrent states of linear attention, convolutions.
- "equal_lengths" is the same for prompts of one length, where padding would reach a model's states.

`prefill` computes the prompts and returns one of the two; `advance` feeds a token to each
completion; `keep` drops those that have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gspo.kernels.decode_attention import decode_attention, prompt_groups
from gspo.kernels.hf import (
    Cache,
    CacheLayerMixin,
    cache_argument,
    no_mask,
    returned_cache,
    select_rows,
)

FIRST_COLUMNS = 256

Layout = Literal["shared", "model_cache", "equal_lengths"]
LAYOUTS: tuple[Layout, ...] = ("shared", "model_cache", "equal_lengths")
"""Ways to decode, the fastest first."""

Pair = tuple[Tensor, Tensor]
"""Keys and values."""


class SharedPromptLayer(CacheLayerMixin):
    """Keys and values of one layer: those of the prompts, and a slab that the completions write.

    The prompts come in the first pass. After `fan_out` each pass appends one column to the slab; a
    completion that joins later starts at a later column.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.columns = 0
        self.prompts: Pair
        self.slabs: Pair | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: `fan_out` lays out the slabs."""

    def update(
        self,
        key_states: Float[Tensor, "N K Q D"],
        value_states: Float[Tensor, "N K Q E"],
        *args: object,
        **kwargs: object,
    ) -> tuple[Float[Tensor, "N K C D"], Float[Tensor, "N K C E"]]:
        """Take the prompts' keys and values in the first pass, then one column in each pass."""
        if self.slabs is None:
            self.prompts = (key_states, value_states)
            return self.prompts
        if self.columns == self.slabs[0].shape[2]:
            self.slabs = _both(lambda x: torch.cat([x, torch.empty_like(x)], dim=2), self.slabs)
        keys, values = self.slabs
        keys[:, :, self.columns] = key_states[:, :, 0]
        values[:, :, self.columns] = value_states[:, :, 0]
        self.columns += 1
        return keys[:, :, : self.columns], values[:, :, : self.columns]

    def fan_out(self, completions: int, capacity: int) -> None:
        """From now on so many completions write columns."""
        self.slabs = _both(
            lambda x: x.new_empty(completions, x.shape[1], capacity, x.shape[3]), self.prompts
        )

    def keep(
        self, completions: Int[Tensor, " n"], first: int, prompts: Int[Tensor, " p"] | None
    ) -> None:
        """Keep these completions from column `first` on, and these prompts."""
        assert self.slabs is not None
        written, self.columns = slice(first, self.columns), self.columns - first

        def taken(slab: Tensor) -> Tensor:
            out = slab.new_empty(len(completions), *slab.shape[1:])
            out[:, :, : self.columns] = slab[:, :, written].index_select(0, completions)
            return out

        self.slabs = _both(taken, self.slabs)
        if prompts is not None:
            self.prompts = _both(lambda x: x[prompts], self.prompts)

    def join(self, other: SharedPromptLayer, completions: int, width: int) -> None:
        """Append the other's prompts, all padded to `width`, and so many completions."""
        assert self.slabs is not None

        def widened(x: Tensor) -> Tensor:
            return nn.functional.pad(x, (0, 0, width - x.shape[2], 0))

        self.prompts = _both(
            lambda mine, theirs: torch.cat([widened(mine), widened(theirs)]),
            self.prompts,
            other.prompts,
        )
        # Zeros, and not whatever lies in the memory: a NaN would pass through its weight of 0.
        self.slabs = _both(
            lambda x: torch.cat([x, x.new_zeros(completions, *x.shape[1:])]), self.slabs
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(key length, offset) for the pass of the prompts; later passes use no mask."""
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns written so far."""
        return self.columns

    def get_max_cache_shape(self) -> int:
        """-1: there is no limit."""
        return -1

    get_max_length = get_max_cache_shape  # the name in transformers from 5.24 on


class SharedPrompts:
    """N completions of P prompts, whose keys and values are held once; see `decode_attention`.

    What says which completion belongs where stays on the host, so that no pass waits for a device.

    Args:
        backbone: the model below its output head.
        layers: how many attention layers it has.
        lengths: [P] tokens of each prompt.
        prompt_of: [N] prompt of each completion.
        device: of the model.
    """

    def __init__(
        self,
        backbone: nn.Module,
        layers: int,
        lengths: np.ndarray,
        prompt_of: np.ndarray,
        device: torch.device,
    ):
        self._backbone, self._device = backbone, device
        self.layers = [SharedPromptLayer() for _ in range(layers)]
        self.cache = Cache(layers=list(self.layers))
        self._lengths, self._prompt_of = lengths, prompt_of
        self._width = int(lengths.max())
        self._sizes = np.bincount(prompt_of, minlength=len(lengths))
        self._start = np.zeros(len(prompt_of), dtype=np.int64)  # first column of each completion
        self._rearrange()

    def _rearrange(self) -> None:
        """Make what the passes need of the completions that are there now."""
        self._groups = prompt_groups(self._prompt_of, self._sizes, self._device)
        lengths = self._lengths[self._prompt_of]
        self._all_visible = not (self._start.any() or (self._lengths < self._width).any())
        self._edges = self._tensor(np.stack([-lengths, self._start]))
        self._first_position = self._tensor(lengths - self._start)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)

    @property
    def columns(self) -> int:
        """Columns written; inside a pass, the one that is being written included."""
        return self.layers[0].columns

    def advance(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """Feed one token to each completion; returns the last hidden states."""
        self._hidden: dict[int | None, Tensor | None] = {}
        return self._backbone(
            input_ids=tokens[:, None],
            attention_mask=no_mask(self._device),
            position_ids=(self._first_position + self.columns)[:, None],
            use_cache=True,
            gspo_plan=self,
            **cache_argument(self._backbone, self.cache),
        ).last_hidden_state[:, -1]

    def attend(
        self,
        module: nn.Module,
        query: Float[Tensor, "N H 1 D"],
        key: Float[Tensor, "N K C D"],
        value: Float[Tensor, "N K C E"],
        scaling: float | None,
        window: int | None,
    ) -> Float[Tensor, "N 1 H E"]:
        """Attention of one layer inside `advance`."""
        prompts = self.layers[module.layer_idx].prompts  # pyright: ignore[reportArgumentType, reportCallIssue]
        if window is not None and self._width + self.columns <= window:
            window = None
        if window not in self._hidden:
            self._hidden[window] = self._not_visible(window)
        hidden = self._hidden[window]
        return decode_attention(query, key, value, *prompts, self._groups, hidden, scaling)

    def _not_visible(self, window: int | None) -> Bool[Tensor, "N 1 1 L"] | None:
        """True at positions that a completion does not see: padding of its prompt, columns before
        it joined, and what lies outside the window. None: it sees everything."""
        if self._all_visible and window is None:
            return None
        place = torch.arange(-self._width, self.columns, device=self._device)
        first_of_prompt, first_column = self._edges[..., None].unbind()
        out = place < torch.where(place < 0, first_of_prompt, first_column)
        if window is not None:
            distance = self.columns - 1 - place - torch.where(place < 0, first_column, 0)
            out |= distance >= window
        return out[:, None, None]

    def keep(self, completions: np.ndarray) -> None:
        """Keep these completions only; drop prompts and columns that none of them needs."""
        self._prompt_of, self._start = self._prompt_of[completions], self._start[completions]
        first = int(self._start.min(initial=self.columns))
        self._start = self._start - first
        used, prompts = np.unique(self._prompt_of), None
        if len(used) <= len(self._sizes) // 2:
            prompts = self._tensor(used)
            self._prompt_of = np.searchsorted(used, self._prompt_of)
            self._sizes, self._lengths = self._sizes[used], self._lengths[used]
        chosen = self._tensor(completions)
        for layer in self.layers:
            layer.keep(chosen, first, prompts)
        self._rearrange()

    def join(self, other: SharedPrompts) -> None:
        """Let another's completions run beside these; they start at the next column."""
        added = len(other._prompt_of)
        self._width = max(self._width, other._width)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.join(theirs, added, self._width)
        self._prompt_of = np.concatenate([self._prompt_of, other._prompt_of + len(self._sizes)])
        self._start = np.concatenate([self._start, np.full(added, self.columns, dtype=np.int64)])
        self._sizes = np.concatenate([self._sizes, other._sizes])
        self._lengths = np.concatenate([self._lengths, other._lengths])
        self._rearrange()


class ModelCache:
    """N completions in the cache that the model made, each with a copy of its prompt.

    Args:
        backbone: the model below its output head.
        cache: the model's cache after its pass over the prompts.
        real: [P, W] False where a prompt is padded, on the left; None: none is.
        length: W.
        device: of the model.
    """

    def __init__(
        self,
        backbone: nn.Module,
        cache: Cache,
        real: Bool[Tensor, "P W"] | None,
        length: int,
        device: torch.device,
    ):
        self._backbone, self._cache, self._device = backbone, cache, device
        self._real, self._length = real, length

    def advance(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """Feed one token to each completion; returns the last hidden states."""
        real = self._real
        if real is None:
            positions = torch.full_like(tokens, self._length)
            self._length += 1
        else:
            positions = real.sum(-1)
            self._real = real = torch.cat([real, real.new_ones(len(real), 1)], dim=1)
        return self._backbone(
            input_ids=tokens[:, None],
            attention_mask=real,
            position_ids=positions[:, None],
            use_cache=True,
            **cache_argument(self._backbone, self._cache),
        ).last_hidden_state[:, -1]

    def keep(self, completions: np.ndarray) -> None:
        """Keep these only, in this order, repeated where an index repeats."""
        chosen = torch.from_numpy(completions).to(self._device)
        select_rows(self._cache, chosen)
        if self._real is not None:
            self._real = self._real[chosen]


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "P W"], Bool[Tensor, "P W"]]:
    """Token ids padded on the left, and where they are real; both on the host.

    >>> padded([[5, 6], [7]])[0].tolist()
    [[5, 6], [0, 7]]
    """
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    real = torch.zeros(len(prompts), width, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        tokens[i, width - len(prompt) :] = torch.tensor(prompt)
        real[i, width - len(prompt) :] = True
    return tokens, real


def prefill(
    backbone: nn.Module,
    tokens: Int[Tensor, "P W"],
    real: Bool[Tensor, "P W"],
    prompt_of: np.ndarray,
    longest: int,
    *,
    layout: Layout,
    device: torch.device,
) -> tuple[SharedPrompts | ModelCache, Float[Tensor, "P D"]]:
    """Compute each prompt once.

    Args:
        backbone: the model below its output head.
        tokens, real: the prompts, as `padded` gives them.
        prompt_of: [N] prompt of each completion.
        longest: tokens that a completion may have.
        layout: how the completions' keys and values are held.
        device: of the model.

    Returns:
        The completions' keys and values, and the last hidden state of each prompt.
    """
    positions = (real.cumsum(-1) - 1).clamp_(min=0).to(device)
    mask = None if bool(real.all()) else real.to(device)
    shared = None
    if layout == "shared":
        layers = backbone.config.get_text_config().num_hidden_layers  # pyright: ignore
        shared = SharedPrompts(backbone, layers, real.sum(-1).numpy(), prompt_of, device)
    output = backbone(
        input_ids=tokens.to(device),
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        **({} if shared is None else cache_argument(backbone, shared.cache)),
    )
    hidden = output.last_hidden_state[:, -1]
    if shared is not None:
        for layer in shared.layers:
            layer.fan_out(len(prompt_of), min(longest, FIRST_COLUMNS))
        return shared, hidden
    copied = ModelCache(backbone, returned_cache(output), mask, tokens.shape[1], device)
    copied.keep(prompt_of)
    return copied, hidden


def kv_bytes(completions: int, positions: int, config: object) -> int:
    """Memory of float32 keys and values, from the model's text config."""
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads  # type: ignore[attr-defined]
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    layers = config.num_hidden_layers  # type: ignore[attr-defined]
    return completions * positions * layers * kv_heads * width * 2 * torch.float32.itemsize


def _both(change: Callable[..., Tensor], *pairs: Pair) -> Pair:
    """A change of keys, and the same change of values."""
    keys, values = (change(*tensors) for tensors in zip(*pairs, strict=True))
    return keys, values
