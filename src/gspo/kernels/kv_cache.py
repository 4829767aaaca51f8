"""How keys and values are held while decoding: what each completion has seen so far.

- `SharedPrompts` (layout "shared"): one copy of each prompt's keys and values for all of its
  completions; others may join while some run. It needs a model whose attention goes through gspo's
  (`attention.PACKED`).
- `ModelCache` (layout "model_cache"): the cache that the model makes for itself, with a copy of the
  prompt for each completion. It works with any attention of transformers, and holds whatever is in
  the cache: recurrent states of linear attention, convolutions.
- "equal_lengths" is the same for prompts of one length, if padding would reach a model's states.

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
from gspo.kernels.hf import Cache, cache_argument, no_mask, returned_cache, select_completions

FIRST_COLUMNS = 256

Layout = Literal["shared", "model_cache", "equal_lengths"]
LAYOUTS: tuple[Layout, ...] = ("shared", "model_cache", "equal_lengths")
"""Ways to decode, the fastest first."""


class SharedPrompts:
    """N completions of P prompts, whose keys and values are held once; see `decode_attention`.

    The keys and values of decoded tokens are in slabs, two tensors per layer. Each pass appends
    one column to them; a completion that joins later starts at a later column. Which completion
    belongs to which prompt is known on the host, so that no pass waits for a device. No cache of
    transformers is used: attention hands over the keys and values.

    Args:
        backbone: the model below its output head.
        lengths: [P] tokens of each prompt.
        prompt_of: [N] prompt of each completion.
        capacity: columns that are laid out at first; they double when they are full.
        device: of the model.
    """

    def __init__(
        self,
        backbone: nn.Module,
        lengths: np.ndarray,
        prompt_of: np.ndarray,
        capacity: int,
        device: torch.device,
    ):
        self._backbone, self._device, self._capacity = backbone, device, capacity
        self._prompts: dict[int, list[Tensor]] = {}  # keys and values, by layer
        self._slabs: dict[int, list[Tensor]] = {}
        self._columns = 0
        self._width = int(lengths.max())
        self._lengths, self._prompt_of = lengths, prompt_of
        self._sizes = np.bincount(prompt_of, minlength=len(lengths))
        self._start = np.zeros(len(prompt_of), dtype=np.int64)  # first column of each completion
        self._rearrange()

    def _rearrange(self) -> None:
        """Prepare what the passes need to know about the completions that are there now."""
        self._groups = prompt_groups(self._prompt_of, self._sizes, self._device)
        lengths = self._lengths[self._prompt_of]
        self._all_visible = not (self._start.any() or (self._lengths < self._width).any())
        self._edges = self._tensor(np.stack([-lengths, self._start]))
        self._first_position = self._tensor(lengths - self._start)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)

    def take(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Hold a layer's keys and values of the prompts: [P, K, W, D] and [P, K, W, E]."""
        self._prompts[layer] = [key, value]

    def advance(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """Feed one token to each completion; returns the last hidden states."""
        if self._columns == self._capacity:
            self._capacity *= 2
            self._change_slabs(lambda x: torch.cat([x, torch.empty_like(x)], dim=2))
        positions = self._first_position + self._columns
        self._columns += 1
        self._hidden: dict[int | None, Tensor | None] = {}
        return self._backbone(
            input_ids=tokens[:, None],
            attention_mask=no_mask(self._device),
            position_ids=positions[:, None],
            use_cache=False,
            gspo_plan=self,
        ).last_hidden_state[:, -1]

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "N H 1 D"],
        key: Float[Tensor, "N K 1 D"],
        value: Float[Tensor, "N K 1 E"],
        scaling: float | None,
        window: int | None,
    ) -> Float[Tensor, "N 1 H E"]:
        """Attention of one layer inside `advance`."""
        if layer not in self._slabs:
            self._slabs[layer] = [
                new.new_empty(*new.shape[:2], self._capacity, new.shape[3]) for new in (key, value)
            ]
        for slab, new in zip(self._slabs[layer], (key, value), strict=True):
            slab[:, :, self._columns - 1] = new[:, :, 0]
        if window is not None and self._width + self._columns <= window:
            window = None
        if window not in self._hidden:
            self._hidden[window] = self._not_visible(window)
        keys, values = (slab[:, :, : self._columns] for slab in self._slabs[layer])
        prompt_keys, prompt_values = self._prompts[layer]
        groups, hidden = self._groups, self._hidden[window]
        return decode_attention(
            query, keys, values, prompt_keys, prompt_values, groups, hidden, scaling
        )

    def _not_visible(self, window: int | None) -> Bool[Tensor, "N 1 1 L"] | None:
        """Mark what a completion does not see: padding of its prompt, columns before it joined,
        and what lies outside the window. None: it sees everything."""
        if self._all_visible and window is None:
            return None
        place = torch.arange(-self._width, self._columns, device=self._device)
        first_of_prompt, first_column = self._edges[..., None].unbind()
        out = place < torch.where(place < 0, first_of_prompt, first_column)
        if window is not None:
            distance = self._columns - 1 - place - torch.where(place < 0, first_column, 0)
            out |= distance >= window
        return out[:, None, None]

    def keep(self, completions: np.ndarray) -> None:
        """Keep only these completions; drop the prompts and columns that none of them needs."""
        self._prompt_of, self._start = self._prompt_of[completions], self._start[completions]
        first = int(self._start.min(initial=self._columns))
        written, self._columns = slice(first, self._columns), self._columns - first
        self._start = self._start - first
        chosen = self._tensor(completions)

        def taken(slab: Tensor) -> Tensor:
            out = slab.new_empty(len(chosen), *slab.shape[1:])
            out[:, :, : self._columns] = slab[:, :, written].index_select(0, chosen)
            return out

        self._change_slabs(taken)
        used = np.unique(self._prompt_of)
        if len(used) <= len(self._sizes) // 2:
            left = self._tensor(used)
            for layer, pair in self._prompts.items():
                self._prompts[layer] = [x[left] for x in pair]
            self._prompt_of = np.searchsorted(used, self._prompt_of)
            self._sizes, self._lengths = self._sizes[used], self._lengths[used]
        self._rearrange()

    def join(self, other: SharedPrompts) -> None:
        """Let another's completions run beside these; they start at the next column."""
        added = len(other._prompt_of)
        width = self._width = max(self._width, other._width)

        def joined(mine: Tensor, theirs: Tensor) -> Tensor:
            both = (mine, theirs)
            return torch.cat([nn.functional.pad(x, (0, 0, width - x.shape[2], 0)) for x in both])

        for layer, pair in self._prompts.items():
            both = zip(pair, other._prompts[layer], strict=True)
            self._prompts[layer] = [joined(mine, theirs) for mine, theirs in both]
        # Zeros, and not whatever lies in the memory: a NaN would pass through its weight of 0.
        self._change_slabs(lambda x: torch.cat([x, x.new_zeros(added, *x.shape[1:])]))
        self._prompt_of = np.concatenate([self._prompt_of, other._prompt_of + len(self._sizes)])
        self._start = np.concatenate([self._start, np.full(added, self._columns, dtype=np.int64)])
        self._sizes = np.concatenate([self._sizes, other._sizes])
        self._lengths = np.concatenate([self._lengths, other._lengths])
        self._rearrange()

    def _change_slabs(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer, pair in self._slabs.items():
            self._slabs[layer] = [change(x) for x in pair]


class ModelCache:
    """N completions in the cache that the model made, each with a copy of its prompt.

    Args:
        backbone: the model below its output head.
        cache: the model's cache after its pass over the prompts.
        real: [P, W] False at the padding, which is on the left; None: there is none.
        length: W.
    """

    def __init__(
        self, backbone: nn.Module, cache: Cache, real: Bool[Tensor, "P W"] | None, length: int
    ):
        self._backbone, self._cache, self._real, self._length = backbone, cache, real, length

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
        """Keep these only, in this order; an index that occurs twice gives two copies."""
        chosen = torch.from_numpy(completions).to(next(self._backbone.parameters()).device)
        select_completions(self._cache, chosen)
        if self._real is not None:
            self._real = self._real[chosen]


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "P W"], Bool[Tensor, "P W"]]:
    """Pad token ids on the left, and say which are real; both on the host.

    >>> padded([[5, 6], [7]])[0].tolist()
    [[5, 6], [0, 7]]
    """
    tokens = [torch.tensor(prompt) for prompt in prompts]
    real = [torch.ones_like(prompt, dtype=torch.bool) for prompt in tokens]
    pad = nn.utils.rnn.pad_sequence
    return pad(tokens, True, padding_side="left"), pad(real, True, padding_side="left")


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
        backbone, prompt_of, device: as of `SharedPrompts`.
        tokens, real: the prompts, as `padded` gives them.
        longest: tokens that a completion may have.
        layout: how the completions' keys and values are held.

    Returns:
        The completions' keys and values, and the last hidden state of each prompt.
    """
    mask = None if bool(real.all()) else real.to(device)
    positions = (real.cumsum(-1) - 1).clamp_(min=0).to(device)
    given = {"input_ids": tokens.to(device), "attention_mask": mask, "position_ids": positions}
    if layout == "shared":
        capacity = min(longest, FIRST_COLUMNS)
        shared = SharedPrompts(backbone, real.sum(-1).numpy(), prompt_of, capacity, device)
        output = backbone(use_cache=False, gspo_prompts=shared, **given)
        return shared, output.last_hidden_state[:, -1]
    output = backbone(use_cache=True, **given)
    copied = ModelCache(backbone, returned_cache(output), mask, tokens.shape[1])
    copied.keep(prompt_of)
    return copied, output.last_hidden_state[:, -1]


def kv_bytes(completions: int, positions: int, config: object) -> int:
    """Bytes of float32 keys and values, from the model's text config."""
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads  # type: ignore[attr-defined]
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    layers = config.num_hidden_layers  # type: ignore[attr-defined]
    return completions * positions * layers * kv_heads * width * 2 * torch.float32.itemsize
