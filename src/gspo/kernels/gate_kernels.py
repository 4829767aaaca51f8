"""Triton kernels of silu(gate) * up: one forward, one backward, and no product that is kept."""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 2048


@triton.jit
@no_type_check  # compiled from its source
def _forward(gates, ups, out, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    gate = tl.load(gates + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(ups + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
@no_type_check
def _backward(grads, gates, ups, d_gates, d_ups, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    grad = tl.load(grads + place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gates + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(ups + place, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    d_gate = grad * up * share * (1.0 + gate * (1.0 - share))
    tl.store(d_gates + place, d_gate, mask=inside)
    tl.store(d_ups + place, grad * gate * share, mask=inside)


class SiluProduct(torch.autograd.Function):
    """silu(gate) * up, in float32 inside."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        grid = (triton.cdiv(gate.numel(), _BLOCK),)
        _forward[grid](gate, up, out, gate.numel(), BLOCK=_BLOCK)  # pyright: ignore[reportIndexIssue]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        grid = (triton.cdiv(gate.numel(), _BLOCK),)
        given = grad.contiguous(), gate, up, d_gate, d_up, gate.numel()
        _backward[grid](*given, BLOCK=_BLOCK)  # pyright: ignore[reportIndexIssue]
        return d_gate, d_up
