"""What one layer asks of its attention: the same for the passes of training and of decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.kernels.tile_attention import Scoring


@dataclass(frozen=True)
class LayerInput:
    """Queries, keys and values of the T tokens of a forward pass.

    Attributes:
        layer: its number; None: the model's attention has none.
        query, key, value: of H query heads, and of K heads that they share.
        scale: of the scores.
        window: how many tokens a query sees, its own included; None: all before it.
        softcap, sinks: of `tile_attention.Scoring`; a sink for each query head.
    """

    layer: Any
    query: Float[Tensor, "1 H T D"]
    key: Float[Tensor, "1 K T D"]
    value: Float[Tensor, "1 K T E"]
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " H"] | None = None

    def scoring(self, dtype: torch.dtype) -> Scoring:
        """Soft cap and sinks of scores in `dtype`."""
        sinks = self.sinks
        held = None if sinks is None else sinks.to(dtype).view(self.key.shape[1], -1)
        return Scoring(self.softcap, held)
