"""The experts of a MoE layer in fewer operations than transformers' own `grouped_mm`.

That is of usual experts: gated, without biases. The pairs of a token and one of its experts are
sorted by expert, so that each expert's tokens lie side by side; products of all experts are one
call.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from gspo.kernels.hf import GATE, usual_experts


def sorted_experts(
    self: Any,
    hidden: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Compute experts on a GPU: the host never waits, and sums have an order that never changes.

    transformers' gradients of tokens are added up by whichever thread comes first, and 5.17 zeroes
    six times a layer what no expert computed, which is nothing here.

    Args:
        self: a module of `usual_experts`.
        hidden: [T, D] of T tokens.
        chosen, weights: [T, K] the experts of each token, and what their outputs are multiplied by.
        gate: what is between the two products; None: the module's own.

    Returns:
        [T, D], of the type of `hidden`.
    """
    each, experts, between = chosen.shape[1], self.num_experts, gate or getattr(self, GATE)
    order = chosen.flatten().to(torch.int16).argsort(stable=True)  # of 16 bits a GPU sorts fast
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    kind = torch.int32 if order.is_cuda else torch.float32  # what histc takes there
    counts = torch.histc(chosen.to(kind), bins=experts, min=0, max=experts - 1)
    offsets = counts.cumsum(0, dtype=torch.int32)
    x = _Rows.apply(hidden.to(self.gate_up_proj.dtype), order // each, back)
    x = grouped_mm(x, self.gate_up_proj.mT, offs=offsets)
    x = grouped_mm(between(x), self.down_proj.mT, offs=offsets)
    x = _Rows.apply(x, back, order).unflatten(0, (-1, each)) * weights[..., None]
    return x.sum(1).to(hidden.dtype)


class _Rows(torch.autograd.Function):
    """Rows of a matrix, each as often as any other; `back` says where in the result each is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, back: Tensor) -> Tensor:
        ctx.back, ctx.rows = back, len(x)
        return x.index_select(0, source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.index_select(0, ctx.back)
        return (
            grad if len(grad) == ctx.rows else grad.unflatten(0, (ctx.rows, -1)).sum(1),
            None,
            None,
        )


def pad_experts(experts: Any, rows: int) -> None:
    """Let each expert of a module compute at least so many tokens, if it computes any.

    The results of the tokens that are added are dropped. Any implementation of the experts may
    compute them; transformers' `grouped_mm` is replaced by one of fewer operations, the same bits.
    """
    plain = usual_experts(experts)

    def forward(self: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        if plain and not torch.is_grad_enabled():
            return _grouped_experts(self, hidden, chosen, weights, self.gspo_rows)
        run = _grouped_experts if plain else type(self).forward
        counts = np.bincount(chosen.numpy(force=True).ravel(), minlength=self.num_experts)
        missing = np.where(counts > 0, self.gspo_rows - counts, 0).clip(min=0)
        if not missing.any():
            return run(self, hidden, chosen, weights)
        extra = torch.from_numpy(np.arange(len(missing)).repeat(missing)).to(chosen.device)
        tokens = -(-len(extra) // chosen.shape[1])
        # Places of the last token that are left over go to an expert that has enough.
        filler = extra.new_full((tokens * chosen.shape[1] - len(extra),), int(counts.argmax()))
        more = torch.cat([extra, filler]).view(tokens, -1).to(chosen.dtype)
        chosen = torch.cat([chosen, more])
        hidden_more = hidden.new_zeros(tokens, hidden.shape[1])
        weights = torch.cat([weights, weights.new_zeros(tokens, weights.shape[1])])
        return run(self, torch.cat([hidden, hidden_more]), chosen, weights)[: len(hidden)]

    experts.gspo_rows = rows
    experts.forward = MethodType(forward, experts)


def _grouped_experts(
    self: Any, hidden: Tensor, chosen: Tensor, weights: Tensor, rows: int = 1
) -> Tensor:
    """Compute experts; one with fewer tokens than `rows`, but any, computes token 0 besides."""
    each, ids = chosen.shape[1], chosen.numpy(force=True).ravel()
    counts = np.bincount(ids, minlength=self.num_experts)
    room = np.where(counts, counts.clip(rows), 0)
    ends = room.cumsum()
    if torch.is_grad_enabled():  # transformers' order, in which gradients of weights are added up
        order = torch.sort(chosen.flatten())[1].numpy()
    else:
        order = ids.astype(np.int16).argsort(kind="stable")  # of 16 bits numpy sorts fast
    places, tokens = np.empty_like(order), np.zeros(ends[-1], dtype=np.int64)
    shift = (ends - room) - (counts.cumsum() - counts)
    places[order] = np.arange(len(order)) + shift.repeat(counts)
    tokens[places] = np.arange(len(order)) // each
    source, back, offsets = (torch.from_numpy(x) for x in (tokens, places, ends.astype(np.int32)))
    x = hidden.index_select(0, source).to(self.gate_up_proj.dtype)
    x = grouped_mm(x, self.gate_up_proj.mT, offs=offsets)
    x = grouped_mm(getattr(self, GATE)(x), self.down_proj.mT, offs=offsets)
    x = x.index_select(0, back) * weights.reshape(-1, 1)
    return x.view(len(hidden), each, -1).sum(1).to(hidden.dtype)
