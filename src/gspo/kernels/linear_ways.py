"""Other ways to compute a linear layer, for those whose usual products differ with the rows beside.

In float32 oneDNN's, which were the same from 2 rows on for every shape and number of threads that
was tried; in bfloat16 (oneDNN's on AMX are not) blocks of always the same number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

BLOCK = 64  # rows


def other_way(dtype: torch.dtype) -> tuple[Callable[..., Tensor], str]:
    """How linear layers are computed that differ with the rows, and its name."""
    half = dtype != torch.float32
    return (_by_blocks, f"blocks of {BLOCK} rows") if half else (_by_one_dnn, "oneDNN")


def _by_blocks(self: nn.Linear, x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B N"]:
    """A linear layer whose products all have the same number of rows."""
    rows = x.reshape(-1, x.shape[-1])
    blocks = functional.pad(rows, (0, 0, 0, -len(rows) % BLOCK)).split(BLOCK)
    out = torch.cat([functional.linear(block, self.weight, self.bias) for block in blocks])
    return out[: len(rows)].view(*x.shape[:-1], -1)


def _by_one_dnn(self: nn.Linear, x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B N"]:
    """A linear layer that is computed by oneDNN instead of MKL."""
    return _OneDnnLinear.apply(x, self.weight, self.bias)  # pyright: ignore[reportReturnType]


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        needed = ctx.needs_input_grad
        return (
            grad @ weight if needed[0] else None,
            rows.mT @ x.reshape(-1, x.shape[-1]) if needed[1] else None,
            rows.sum(0) if ctx.biased and needed[2] else None,
        )
