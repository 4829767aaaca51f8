"""The attention of a microbatch as calls of `tile_attention`, with its gradient.

Queries, keys and values are gathered from the microbatch's tokens call by call, and the outputs
written back; so no tensor has the shape of all calls together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gspo.kernels.attention_gradient import attend_backward
from gspo.kernels.shared_contexts import Context, ContextGroup
from gspo.kernels.tile_attention import LOG2_E, Scoring, attend, in_float32


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of `tile_attention`: N tails of Q queries and L keys, P contexts of W keys.

    Attributes:
        queries: the token of each query; padding repeats a tail's first token.
        padding: True at the padding; None: there is none.
        keys: the token of each key; padding is token 0.
        context: the token of each key of the contexts. W may be 0.
        context_of: the context of each tail.
        groups: which tails belong to which contexts.
        hidden: which keys a query does not see, the context's first; see `tile_attention.attend`.
    """

    queries: Int[Tensor, "N Q"]
    padding: Bool[Tensor, "N Q"] | None
    keys: Int[Tensor, "N L"]
    context: Int[Tensor, "P W"]
    context_of: Int[Tensor, " N"]
    groups: Sequence[ContextGroup]
    hidden: Float[Tensor, "n 1 Q 1 S"] | Bool[Tensor, "n 1 Q 1 S"]
    _rows: dict[tuple[int, int], Any] = field(default_factory=dict, repr=False)

    def rows(self, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Places of queries, keys and context among rows that are token by token and head by head;
        ordered by tail, key head, token, and head that shares the key head."""

        def places(tokens: Tensor, share: int) -> Tensor:
            head = torch.arange(kv_heads * share, device=tokens.device).view(kv_heads, 1, share)
            return (tokens[:, None, :, None] * (kv_heads * share) + head).flatten()

        if (heads, kv_heads) not in self._rows:
            shares = (heads // kv_heads, 1, 1)
            places_of = map(places, (self.queries, self.keys, self.context), shares)
            self._rows[heads, kv_heads] = tuple(places_of)
        return self._rows[heads, kv_heads]


def _rows(x: Float[Tensor, "1 H T D"]) -> Float[Tensor, "TH D"]:
    """Token by token, and inside a token head by head; in float32 at least."""
    x = x[0].transpose(0, 1).reshape(-1, x.shape[-1])
    return in_float32(x)


class CalledAttention(torch.autograd.Function):
    """[T, H, E] of queries [1, H, T, D] and keys and values [1, K, U, D|E] by calls, in float32
    whatever the inputs are.

    Soft cap and sinks are those of `tile_attention.Scoring`. Each token is a query of at most one
    call; the output of the others is 0. The keys may be of more tokens than the queries.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        calls: Sequence[AttentionCall],
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Float[Tensor, "T H E"]:
        heads, kv, total = query.shape[1], key.shape[1], query.shape[2]
        q, k, v = _rows(query) * (scale * LOG2_E), _rows(key), _rows(value)
        out = v.new_zeros(total * heads, v.shape[-1])
        log_totals: list[Tensor] = []
        held = None if sinks is None else sinks.detach().to(q.dtype).view(kv, -1)
        ctx.scoring = Scoring(softcap, held)
        for call in calls:
            inputs = _gathered(call, q, k, v, heads, kv)
            output, log_total = attend(*inputs, call.hidden, scoring=ctx.scoring)
            out.index_copy_(0, call.rows(heads, kv)[0], output.reshape(-1, v.shape[-1]))
            log_totals.append(log_total)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, out, *log_totals)
            ctx.calls, ctx.scale, ctx.dtype = calls, scale, query.dtype
            ctx.sinks_dtype = None if sinks is None else sinks.dtype
            ctx.shapes = query.shape, key.shape, value.shape
        return out.view(total, heads, -1).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "T H E"]):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, *log_totals = ctx.saved_tensors
        heads, kv = ctx.shapes[0][1], ctx.shapes[1][1]
        upstream = grad.to(q.dtype).reshape(-1, grad.shape[-1])
        d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_sinks = None
        for call, log_total in zip(ctx.calls, log_totals, strict=True):
            index, own, shared = call.rows(heads, kv)
            inputs = _gathered(call, q, k, v, heads, kv)
            rows = inputs[0].shape[:3]
            up, output = (x.index_select(0, index).view(*rows, -1) for x in (upstream, out))
            if call.padding is not None:
                by_token = up.unflatten(2, (call.queries.shape[1], -1))
                by_token.masked_fill_(call.padding[:, None, :, None, None], 0)
            of_query, of_own, of_shared, of_sinks = attend_backward(
                up, output, log_total, *inputs, call.context_of, call.hidden, ctx.scoring
            )
            d_q.index_add_(0, index, of_query.reshape(-1, q.shape[-1]))
            for places, gradients in ((own, of_own), (shared, of_shared)):
                for total, gradient in zip((d_k, d_v), gradients, strict=False):
                    total.index_add_(0, places, gradient.reshape(-1, total.shape[-1]))
            if of_sinks is not None:
                d_sinks = of_sinks if d_sinks is None else d_sinks + of_sinks
        d_q *= ctx.scale * LOG2_E
        gradients = (
            d.view(shape[2], shape[1], -1).transpose(0, 1)[None].to(ctx.dtype)
            for d, shape in zip((d_q, d_k, d_v), ctx.shapes, strict=True)
        )
        if d_sinks is not None:
            d_sinks = d_sinks.flatten().to(ctx.sinks_dtype)
        return *gradients, None, None, None, d_sinks


def _gathered(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, heads: int, kv: int
) -> tuple[Tensor, Tensor, Tensor, Context | None]:
    """Queries, keys and values of a call, of all of the microbatch's rows."""

    queries, keys, shared = call.rows(heads, kv)
    tails = len(call.queries), kv, -1

    def of(rows: Tensor, index: Tensor, shape: tuple[int, int, int] = tails) -> Tensor:
        return rows.index_select(0, index).view(*shape, rows.shape[-1])

    context = None
    if call.groups:
        contexts = len(call.context), kv, -1
        context = Context(of(k, shared, contexts), of(v, shared, contexts), call.groups)
    return of(q, queries), of(k, keys), of(v, keys), context
