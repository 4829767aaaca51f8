"""Which token belongs to which sequence, and sums over sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Tokens `T` of a flat batch, sorted in any order, that belong to `count` sequences.

    Attributes:
        ids: sequence of each token, in 0..count-1. Padding may hold any id in that range.
        count: number of sequences, S.
        ratio_mask: tokens that were sampled. They give the length L_i and the log-ratio l_i.
        loss_mask: tokens that are trained on, a subset of `ratio_mask`.

    Three tokens, two sequences (of 2 and 1 tokens):

    >>> ids = torch.tensor([0, 0, 1])
    >>> every = torch.ones(3, dtype=torch.bool)
    >>> Segments(ids, 2, every, every).mean(torch.tensor([1.0, 3.0, 5.0])).tolist()
    [2.0, 5.0]
    """

    ids: Int[Tensor, " T"]
    count: int
    ratio_mask: Bool[Tensor, " T"]
    loss_mask: Bool[Tensor, " T"]

    @property
    def lengths(self) -> Float[Tensor, " S"]:
        """L_i: sampled tokens of each sequence."""
        return self.sum(self.ratio_mask.float())

    def sum(self, values: Float[Tensor, " T"]) -> Float[Tensor, " S"]:
        """Sum per sequence, accumulated in float64 where the device has it; float32 result."""
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        total = torch.zeros(self.count, dtype=wide, device=values.device)
        return total.index_add(0, self.ids, values.to(wide)).to(values.dtype)

    def mean(self, values: Float[Tensor, " T"]) -> Float[Tensor, " S"]:
        """Sum per sequence over L_i. A sequence without tokens gets 0."""
        return self.sum(values) / self.lengths.clamp(min=1.0).to(values.dtype)

    def spread(self, values: Shaped[Tensor, " S"]) -> Shaped[Tensor, " T"]:
        """The sequence's value at each of its tokens."""
        return values[self.ids]
