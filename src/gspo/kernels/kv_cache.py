"""How keys and values are held while decoding: what each completion has seen so far.

- `SharedPrompts` (layout "shared"): one copy of the whole tiles of each prompt for all of its
  completions; others may join at any token. It needs a model whose attention goes through gspo's
  (`attention.PACKED`).
- `ModelCache` (layout "model_cache"): the cache that the model makes for itself, with a copy of the
  prompt for each completion. It works with any attention of transformers, and holds whatever is in
  the cache: recurrent states of linear attention, convolutions.
- "equal_lengths" is the same for prompts of one length, if padding would reach a model's states.

`Reading` computes the prompts and makes one of the two; `advance` feeds a token to each completion;
`keep` drops those that have ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gspo.kernels.hf import Cache, cache_argument, returned_cache, select_completions
from gspo.kernels.prompt_cache import SharedPrompts
from gspo.kernels.step_graph import GraphedPrompts

FIRST_COLUMNS = 256

Layout = Literal["shared", "model_cache", "equal_lengths"]
LAYOUTS: tuple[Layout, ...] = ("shared", "model_cache", "equal_lengths")
"""Ways to decode, the fastest first."""


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


class Reading:
    """P prompts that are computed once each, piece by piece in the layout "shared".

    Args:
        backbone, device, multiple: as of `SharedPrompts`.
        prompts: token ids, at least one each.
        layout: how the completions' keys and values are held. Others than "shared" are read whole.

    Attributes:
        prompts: as given.
        done: tokens of each prompt that have been read, padding included.
        width: tokens of the longest.
    """

    def __init__(
        self,
        backbone: nn.Module,
        prompts: Sequence[Sequence[int]],
        *,
        layout: Layout,
        device: torch.device,
        multiple: int = 1,
    ):
        self.prompts, self._backbone, self._layout = prompts, backbone, layout
        self._device, self._multiple = device, multiple
        self._lengths = np.array([len(prompt) for prompt in prompts])
        self.width = int(self._lengths.max())
        self.again()

    def again(self) -> None:
        """Begin anew: the weights have changed."""
        self.done = 0
        self._hidden: Tensor | None = None
        if self._layout == "shared":
            kind = GraphedPrompts if self._device.type == "cuda" else SharedPrompts
            count, width = len(self.prompts), self.width
            self._cache: SharedPrompts | ModelCache = kind(
                self._backbone, count, width, self._device, self._multiple
            )

    def places(self, columns: int) -> list[slice]:
        """Where the next `columns` tokens of each prompt stand in `read`'s pass."""
        left = np.clip(self._lengths - self.done, 0, columns)
        starts = np.arange(len(left)) * columns
        if self._layout != "shared":  # padded on the left
            starts += columns - left
        return [slice(int(start), int(start + n)) for start, n in zip(starts, left, strict=True)]

    def read(self, columns: int) -> None:
        """Compute the next `columns` tokens of each prompt."""
        if self._layout != "shared":
            self._read_whole()
            return
        assert isinstance(self._cache, SharedPrompts)
        span = slice(self.done, self.done + columns)
        parts = [torch.tensor(prompt[span], dtype=torch.long) for prompt in self.prompts]
        tokens = nn.utils.rnn.pad_sequence(parts, True).to(self._device)
        hidden = self._cache.feed(tokens)
        if self._hidden is None:
            self._hidden = hidden.new_zeros(len(self.prompts), hidden.shape[2])
        ends = self._lengths - 1 - self.done
        here = np.flatnonzero((ends >= 0) & (ends < columns))
        rows, ends = (torch.from_numpy(x).to(self._device) for x in (here, ends[here]))
        self._hidden[rows] = hidden[rows, ends]
        self.done += tokens.shape[1]

    def _read_whole(self) -> None:
        rows = [torch.tensor(prompt) for prompt in self.prompts]
        real = [torch.ones_like(row, dtype=torch.bool) for row in rows]
        tokens, mask = (
            nn.utils.rnn.pad_sequence(x, True, padding_side="left").to(self._device)
            for x in (rows, real)
        )
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)
        held = None if (self._lengths == self.width).all() else mask
        output = self._backbone(
            use_cache=True, input_ids=tokens, attention_mask=held, position_ids=positions
        )
        self._cache = ModelCache(self._backbone, returned_cache(output), held, self.width)
        self._hidden, self.done = output.last_hidden_state[:, -1], self.width

    def opened(
        self, prompt_of: np.ndarray, longest: int
    ) -> tuple[SharedPrompts | ModelCache, Float[Tensor, "P D"]]:
        """Make completions of the prompts, all of which have been read.

        Args:
            prompt_of: [N] prompt of each completion.
            longest: tokens that a completion may have.

        Returns:
            The completions' keys and values, and the last hidden state of each prompt.
        """
        assert self._hidden is not None and self.done == self.width
        if isinstance(self._cache, SharedPrompts):
            self._cache.fan_out(self._lengths, prompt_of, min(longest, FIRST_COLUMNS))
        else:
            self._cache.keep(prompt_of)
        return self._cache, self._hidden


def head_shapes(config: Any) -> list[tuple[int, int, int]]:
    """Of each layer: its heads, its heads of keys, and their width; from a model's text config."""
    shapes, layers = [], getattr(config, "per_layer_config", None)  # Gemma 4's are not all alike
    for layer in layers or [config] * config.num_hidden_layers:
        heads = getattr(layer, "num_attention_heads", 1)
        width = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        shapes.append((heads, getattr(layer, "num_key_value_heads", None) or heads, width))
    return shapes


def kv_bytes(completions: int, positions: int, config: Any) -> int:
    """Bytes of float32 keys and values, from the model's text config."""
    each = sum(kv_heads * width for _, kv_heads, width in head_shapes(config))
    return completions * positions * each * 2 * torch.float32.itemsize
