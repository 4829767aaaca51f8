"""The tokens of a microbatch divided among processes: each computes a part of its length.

A layer needs the other parts in its attention alone, whose keys and values come together there.
Each process has the whole loss in the end; so gradients add up over the processes wherever values
met, and the loss is divided by their number before its backward pass (`train.mesh.Mesh`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, no_type_check

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional

# Torch 2.13 has new names for them, and warns of the former ones.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_sum: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class TokenParts:
    """This process's part among `size` of equal lengths, the last ones padded.

    Attributes:
        rank, size: this part, of how many.
        group: the processes that have the others; None: there are none.

    >>> TokenParts(rank=1, size=2).span(5), TokenParts(rank=1, size=2).take(torch.arange(5))
    ((3, 6), tensor([3, 4, 0]))
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def span(self, tokens: int) -> tuple[int, int]:
        """The first and the end of this part's tokens; the end may lie behind the last one."""
        width = -(-tokens // self.size)
        return self.rank * width, (self.rank + 1) * width

    def real(self, tokens: int) -> tuple[int, int]:
        """The first of this part's tokens, at most `tokens`, and how much padding it ends with."""
        first, end = self.span(tokens)
        return min(first, tokens), end - max(first, min(end, tokens))

    def take(self, values: Shaped[Tensor, "... T"]) -> Shaped[Tensor, "... t"]:
        """This part of values along the last dimension, padded with 0."""
        if self.size == 1:
            return values
        first, end = self.span(values.shape[-1])
        part = values[..., first:end]
        return functional.pad(part, (0, end - first - part.shape[-1]))

    def holds(self, places: Int[Tensor, " M"], tokens: int) -> Bool[Tensor, " M"] | None:
        """Which places among so many tokens are in this part; None: all."""
        first, end = self.span(tokens)
        return None if self.size == 1 else (places >= first) & (places < end)

    def sum(self, values: Tensor) -> Tensor:
        """Add values of the same shape up over all parts, in forward and in backward pass."""
        return values if self.size == 1 else _Sum.apply(values, self.group)  # pyright: ignore

    def join(self, values: Shaped[Tensor, "t ..."]) -> Shaped[Tensor, "T ..."]:
        """Put the values of all parts one after another; gradients go back to each part's owner."""
        return values if self.size == 1 else _Join.apply(values, self)  # pyright: ignore


@no_type_check
class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values, group):
        ctx.group = group
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Sum.apply(grad, ctx.group), None


@no_type_check
class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values, parts):
        ctx.parts = parts
        whole = values.new_empty(len(values) * parts.size, *values.shape[1:])
        _gather(whole, values.contiguous(), group=parts.group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        part = grad.new_empty(len(grad) // ctx.parts.size, *grad.shape[1:])
        _scatter_sum(part, grad.contiguous(), group=ctx.parts.group)
        return part, None
