"""Three ways to hold what running rows have seen, behind one small interface.

`SharedPrompts` keeps one copy of each prompt and lets rows join while others run; it needs a model
whose attention goes through gspo's (`Policy.packing` in `OWN`). `CopiedPrompts` gives every row
its prompt's keys and works with any attention of transformers, in slabs that don't move. With
`model_cache` it holds the cache that the model makes for itself, whatever is in it: recurrent
states of linear attention, convolutions. `equal_lengths` is the same without padding, for models
that padding would reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gspo.kernels.attention import no_mask
from gspo.kernels.decode_attention import Cascade, CascadeCache
from gspo.kernels.hf import Cache, cache_argument, returned_cache, select_rows
from gspo.kernels.slab_cache import SlabCache
from gspo.policy.load import Policy

FIRST_COLUMNS = 256

Layout = Literal["shared", "copied", "model_cache", "equal_lengths"]
LAYOUTS: tuple[Layout, ...] = ("shared", "copied", "model_cache", "equal_lengths")
"""Ways to decode, the fastest first."""


class KeyValues(Protocol):
    """Keys and values of R running rows."""

    def advance(self, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R D"]:
        """Feed one token to every row; last hidden states."""
        ...

    def keep(self, rows: np.ndarray) -> None:
        """Go on with these rows alone."""
        ...


class SharedPrompts:
    """One copy of each prompt; see `gspo.kernels.decode_attention`."""

    def __init__(self, policy: Policy, cascade: Cascade):
        self._policy, self._cascade = policy, cascade

    def advance(self, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R D"]:
        return self._policy.backbone(
            input_ids=tokens[:, None],
            attention_mask=no_mask(tokens.device),
            position_ids=self._cascade.positions()[:, None],
            use_cache=True,
            gspo_cascade=self._cascade,
            **cache_argument(self._policy.backbone, self._cascade.cache),
        ).last_hidden_state[:, -1]

    def keep(self, rows: np.ndarray) -> None:
        self._cascade.keep(rows)

    def join(self, other: SharedPrompts) -> None:
        """Let another's rows run with these."""
        self._cascade.join(other._cascade)


class CopiedPrompts:
    """Each row with its prompt, padded on the left, so that all write the same column."""

    def __init__(self, policy: Policy, cache: Cache, real: Bool[Tensor, "R W"] | None, length: int):
        self._policy, self._cache, self._real, self._length = policy, cache, real, length

    def advance(self, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R D"]:
        real = self._real
        if real is None:
            positions = torch.full_like(tokens, self._length)
            self._length += 1
        else:
            positions = real.sum(-1)
            self._real = real = torch.cat([real, real.new_ones(len(real), 1)], dim=1)
        return self._policy.backbone(
            input_ids=tokens[:, None],
            attention_mask=real,
            position_ids=positions[:, None],
            use_cache=True,
            **cache_argument(self._policy.backbone, self._cache),
        ).last_hidden_state[:, -1]

    def keep(self, rows: np.ndarray) -> None:
        kept = torch.from_numpy(rows).to(self._policy.device)
        select_rows(self._cache, kept)
        if self._real is not None:
            self._real = self._real[kept]


def padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "P W"], Bool[Tensor, "P W"]]:
    """Token ids padded on the left, and where they are real.

    >>> padded([[5, 6], [7]], torch.device("cpu"))[0].tolist()
    [[5, 6], [0, 7]]
    """
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    real = torch.zeros(len(prompts), width, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        tokens[i, width - len(prompt) :] = torch.tensor(prompt)
        real[i, width - len(prompt) :] = True
    return tokens.to(device), real.to(device)


def prefill(
    policy: Policy,
    tokens: Int[Tensor, "P W"],
    real: Bool[Tensor, "P W"],
    owner: np.ndarray,
    longest: int,
    *,
    layout: Layout,
) -> tuple[KeyValues, Float[Tensor, "P D"]]:
    """Compute each prompt once.

    Args:
        policy: the weights.
        tokens, real: the prompts, padded on the left.
        owner: [R] prompt of each row.
        longest: tokens that a row may write.
        layout: how the rows' keys and values are kept.

    Returns:
        The rows' keys and values, and the last hidden state of each prompt.
    """
    layers = policy.lm.config.get_text_config().num_hidden_layers
    capacity = min(longest, FIRST_COLUMNS)
    mask = None if bool(real.all()) else real
    slabs = _slabs(layout, layers, tokens.shape[1] + capacity)
    given = {} if slabs is None else cache_argument(policy.backbone, slabs)
    output = policy.backbone(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=(real.cumsum(-1) - 1).clamp_(min=0),
        use_cache=True,
        **given,
    )
    hidden = output.last_hidden_state[:, -1]
    if isinstance(slabs, CascadeCache):
        slabs.fan_out(len(owner), capacity)
        sizes = np.bincount(owner, minlength=len(tokens))
        return SharedPrompts(policy, Cascade(slabs, owner, sizes, real)), hidden
    cache = returned_cache(output) if slabs is None else slabs
    spread = torch.from_numpy(owner).to(policy.device)
    select_rows(cache, spread)
    mask = None if mask is None else mask[spread]
    return CopiedPrompts(policy, cache, mask, tokens.shape[1]), hidden


def _slabs(layout: Layout, layers: int, capacity: int) -> Any:
    """An empty cache of gspo's own, or None where the model makes one for itself."""
    if layout == "shared":
        return CascadeCache(layers)
    return SlabCache(layers, capacity) if layout == "copied" else None
