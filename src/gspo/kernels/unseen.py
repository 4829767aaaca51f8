"""Which keys the completions of `prompt_cache` do not see."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gspo.kernels.tile_attention import TILE, whole_tiles

_LARGE = 2**21  # pairs of a query and a key
Span: TypeAlias = tuple[int, int, int]
"""The first position of the prompts that is seen, the first column of the slabs, and the last + 1.
"""


def unseen(
    query_positions: Int[np.ndarray, "N Q"],
    base: Int[np.ndarray, " N"],
    width: int,
    window: int | None,
) -> tuple[Span, Bool[np.ndarray, "N Q U"] | None]:
    """Mark what completions do not see: what lies behind a token, outside its window, or at the end
    of a prompt that is shorter than others. Tiles that nobody sees are left out.

    Args:
        query_positions: of each completion's queries.
        base: the first position of each completion's own slab.
        width: positions of the prompts.
        window: how many positions a query sees; None: all.

    Returns:
        What is left of prompts and slabs; and of the last U keys inside, which a query does not
        see. None: all are seen.
    """
    first = column = 0
    if window is not None:
        oldest = query_positions[:, 0] - window + 1
        first = min(max(0, int(oldest.min())) // TILE * TILE, width)
        column = max(0, int((oldest - base).min())) // TILE * TILE
    columns = whole_tiles(int((query_positions[:, -1] - base).max()) + 1)
    place = base[:, None] + np.arange(column, columns)
    if window is None and (base == width).all():
        place = place[:, (query_positions[:, 0] - base).min() :]  # the keys before are seen by all
    else:
        prompt = np.arange(first, width)[None]
        prompt = np.where(prompt < base[:, None], prompt, query_positions.max() + 1)
        place = np.concatenate([prompt, place], axis=1)
    place = place[:, None]
    hidden = place > query_positions[:, :, None]
    if window is not None:
        hidden |= place <= query_positions[:, :, None] - window
    return (first, column, columns), hidden if hidden.any() else None


def hiding(
    hidden: np.ndarray, device: torch.device
) -> Float[Tensor, "n 1 Q 1 U"] | Bool[Tensor, "n 1 Q 1 U"]:
    """[n, Q, S], True if a query does not see a key -> what is added to the scores; the mask itself
    if it is large: adding is faster, but takes four times the memory. Without the first keys, if
    all queries see them."""
    if len(hidden) > 1 and (hidden == hidden[:1]).all():
        hidden = hidden[:1]
    hidden = hidden[..., int(hidden.any((0, 1)).argmax()) :]  # the keys before are seen by all
    if hidden.size <= _LARGE:
        hidden = np.where(hidden, np.float32(-np.inf), np.float32(0))
    return torch.from_numpy(hidden[:, None, :, None]).to(device)
