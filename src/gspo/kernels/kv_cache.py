"""How keys and values are held while decoding: what each completion has seen so far.

- `SharedPrompts` (layout "shared"): one copy of the whole tiles of each prompt for all of its
  completions; others may join at any token. It needs a model whose attention goes through gspo's
  (`attention.PACKED`).
- `ModelCache` (layout "model_cache"): the cache that the model makes for itself, with a copy of the
  prompt for each completion. It works with any attention of transformers, and holds whatever is in
  the cache: recurrent states of linear attention, convolutions.
- "equal_lengths" is the same for prompts of one length, if padding would reach a model's states.

`prefill` computes the prompts and returns one of the two; `advance` feeds a token to each
completion; `keep` drops those that have ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

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


def places(prompts: Sequence[Sequence[int]], layout: Layout) -> list[slice]:
    """Where the tokens of each prompt stand in `prefill`'s pass.

    >>> places([[5, 6], [7]], "shared")
    [slice(0, 2, None), slice(2, 3, None)]
    """
    width = max(map(len, prompts))
    starts = [
        row * width + (0 if layout == "shared" else width - len(prompt))  # padded on the left
        for row, prompt in enumerate(prompts)
    ]
    pairs = zip(starts, prompts, strict=True)
    return [slice(start, start + len(prompt)) for start, prompt in pairs]


def prefill(
    backbone: nn.Module,
    prompts: Sequence[Sequence[int]],
    prompt_of: np.ndarray,
    longest: int,
    *,
    layout: Layout,
    device: torch.device,
    multiple: int = 1,
) -> tuple[SharedPrompts | ModelCache, Float[Tensor, "P D"]]:
    """Compute each of P prompts once.

    Args:
        backbone, device, multiple: as of `SharedPrompts`.
        prompts: token ids, at least one each.
        prompt_of: [N] prompt of each completion.
        longest: tokens that a completion may have.
        layout: how the completions' keys and values are held.

    Returns:
        The completions' keys and values, and the last hidden state of each prompt.
    """
    rows = [torch.tensor(prompt) for prompt in prompts]
    lengths = np.array([len(prompt) for prompt in prompts])
    side = "right" if layout == "shared" else "left"
    tokens = nn.utils.rnn.pad_sequence(rows, True, padding_side=side).to(device)
    if layout == "shared":
        width = tokens.shape[1]
        kind = GraphedPrompts if device.type == "cuda" else SharedPrompts
        shared = kind(backbone, len(prompts), width, device, multiple)
        hidden = shared.feed(tokens)
        shared.fan_out(lengths, prompt_of, min(longest, FIRST_COLUMNS))
        ends = torch.from_numpy(lengths - 1).to(device)
        return shared, hidden[torch.arange(len(prompts), device=device), ends]
    real = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    mask = nn.utils.rnn.pad_sequence(real, True, padding_side="left").to(device)
    positions = (mask.cumsum(-1) - 1).clamp_(min=0)
    held = None if (lengths == lengths[0]).all() else mask
    output = backbone(use_cache=True, input_ids=tokens, attention_mask=held, position_ids=positions)
    copied = ModelCache(backbone, returned_cache(output), held, tokens.shape[1])
    copied.keep(prompt_of)
    return copied, output.last_hidden_state[:, -1]


def kv_bytes(completions: int, positions: int, config: object) -> int:
    """Bytes of float32 keys and values, from the model's text config."""
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads  # type: ignore[attr-defined]
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    layers = config.num_hidden_layers  # type: ignore[attr-defined]
    return completions * positions * layers * kv_heads * width * 2 * torch.float32.itemsize
