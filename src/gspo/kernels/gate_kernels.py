"""Triton kernels of silu(gate) * up: one forward, one backward, and no product that is kept."""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 1024


@triton.jit
@no_type_check  # compiled from its source
def _forward(gates, ups, out, width, stride, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place, inside = row * stride + column, column < width
    gate = tl.load(gates + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(ups + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
@no_type_check
def _backward(grads, gates, ups, d_gates, d_ups, width, stride, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place, inside = row * stride + column, column < width
    grad = tl.load(grads + row * width + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gates + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(ups + place, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    d_gate = grad * up * share * (1.0 + gate * (1.0 - share))
    tl.store(d_gates + place, d_gate, mask=inside)
    tl.store(d_ups + place, grad * gate * share, mask=inside)


class SiluProduct(torch.autograd.Function):
    """silu(gate) * up, in float32 inside. Without `up`, each row of `gate` holds both."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None) -> Tensor:
        gate, up = gate.contiguous(), None if up is None else up.contiguous()
        ctx.save_for_backward(gate, up)
        gates, ups = _rows(gate, up)
        out = gates.new_empty(gates.shape)
        _forward[_grid(gates)](gates, ups, out, *_sizes(gates), BLOCK=_BLOCK)  # pyright: ignore[reportIndexIssue]
        return out.view(*gate.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), None if up is None else torch.empty_like(up)
        gates, ups = _rows(gate, up)
        given = grad.contiguous(), gates, ups, *_rows(d_gate, d_up), *_sizes(gates)
        _backward[_grid(gates)](*given, BLOCK=_BLOCK)  # pyright: ignore[reportIndexIssue]
        return d_gate, d_up


def _rows(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    gate = gate.view(-1, gate.shape[-1])
    if up is None:
        gate, up = gate.chunk(2, -1)
    return gate, up.view(gate.shape)


def _sizes(rows: Tensor) -> tuple[int, int]:
    return rows.shape[1], rows.stride(0)


def _grid(rows: Tensor) -> tuple[int, int]:
    return len(rows), triton.cdiv(rows.shape[1], _BLOCK)
