"""The gradient of `tile_attention`'s attention, for training.

Only forward passes are equal to the bit; the order of the gradient's sums is free. So it comes from
torch's fused kernel where that can: on a CPU, without a soft cap, if keys and values are equally
wide. It computes the weights again, block by block, from what the forward pass left: the output and
the logarithm of each query's total. Nothing as large as the scores is kept or written.

Shapes: as in `tile_attention`; S keys of a sequence, its context's first.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gspo.kernels.running_softmax import LN_2, exp2
from gspo.kernels.shared_contexts import Context
from gspo.kernels.tile_attention import Scoring

_JOINED_BYTES = 32 * 2**20
"""Memory for keys and values that are joined at a time; a context is copied to each sequence."""


def attend_backward(
    grad: Float[Tensor, "N K M E"],
    out: Float[Tensor, "N K M E"],
    log_total: Float[Tensor, "N K M 1"],
    query: Float[Tensor, "N K M D"],
    keys: Float[Tensor, "N K L D"],
    values: Float[Tensor, "N K L E"],
    context: Context | None,
    context_of: Int[Tensor, " N"],
    hidden: Float[Tensor, "n 1 Q 1 U"] | Bool[Tensor, "n 1 Q 1 U"] | None,
    scoring: Scoring,
) -> tuple[Float[Tensor, "N K M D"], list[Tensor], list[Tensor], Float[Tensor, "K g"] | None]:
    """The gradient of `attend`, whose arguments these are.

    Args:
        grad: of the output.
        out, log_total: what `attend` returned.
        context_of: the context of each sequence, if there are contexts.

    Returns:
        What belongs to the query; to keys and values; to the keys [P, K, W, D] and values
        [P, K, W, E] of the context, if there is one; and to the sinks.
    """
    width = 0 if context is None else context.keys.shape[2]
    shared = () if context is None else (context.keys, context.values)
    of_shared = [torch.zeros_like(x) for x in shared]
    of_query, of_own = torch.empty_like(query), [torch.empty_like(x) for x in (keys, values)]
    of_one = keys.shape[1] * (width + keys.shape[2]) * (keys.shape[3] + values.shape[3])
    count = max(1, _JOINED_BYTES // (of_one * keys.itemsize))
    for start in range(0, len(query), count):
        part = slice(start, start + count)
        every_key, every_value = keys[part], values[part]
        if context is not None:
            of = context_of[part]
            every_key = torch.cat([context.keys[of], every_key], 2)
            every_value = torch.cat([context.values[of], every_value], 2)
        mask = hidden if hidden is None or len(hidden) == 1 else hidden[part]
        added = _added(mask, query.shape[2], every_key.shape[2], query.dtype)
        given = grad[part], query[part], every_key, every_value, out[part]
        fused = grad.device.type == "cpu" and scoring.cap is None
        if fused and keys.shape[3] == values.shape[3]:
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            totals = log_total[part, ..., 0] * LN_2
            found = kernel(*given, totals, 0.0, False, attn_mask=added, scale=LN_2)
        else:
            found = _plain(*given, log_total[part], added, scoring.cap)
        of_query[part], *grads = found
        for whole, one in zip(of_shared, grads, strict=False):
            whole.index_add_(0, context_of[part], one[:, :, :width])
        for whole, one in zip(of_own, grads, strict=True):
            whole[part] = one[:, :, width:]
    of_sinks = None
    if (sinks := scoring.by_row(query.shape[2])) is not None:
        mean = (grad * out).sum(-1, keepdim=True)
        of_sinks = (exp2(sinks - log_total, None) * -mean).sum((0, 3))
        of_sinks = of_sinks.unflatten(1, (-1, scoring.share)).sum(1)
    return of_query, of_own, of_shared, of_sinks


def _added(
    hidden: Tensor | None, rows: int, keys: int, dtype: torch.dtype
) -> Float[Tensor, "n 1 M S"] | None:
    """What is added to the scores of all keys: -inf where a query doesn't see one, else 0."""
    if hidden is None:
        return None
    count, _, queries, _, last = hidden.shape
    added = torch.zeros(count, 1, queries, rows // queries, keys, dtype=dtype, device=hidden.device)
    of_last = added[..., keys - last :]
    large = hidden.dtype == torch.bool
    of_last.masked_fill_(hidden, -torch.inf) if large else of_last.copy_(hidden)
    return added.flatten(2, 3)


def _plain(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    log_total: Tensor,
    added: Tensor | None,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What torch's kernel gives, of query, keys and values, with all scores in memory."""
    scores = query @ keys.mT
    slope = None
    if cap is not None:
        bent = scores.div_(cap).tanh_()
        slope = 1 - bent * bent
        scores = bent.mul_(cap)
    if added is not None:
        scores += added
    weights = exp2(scores.sub_(log_total), scores)
    of_values = weights.mT @ grad
    mean = (grad * out).sum(-1, keepdim=True)
    of_scores = weights.mul_((grad @ values.mT).sub_(mean)).mul_(LN_2)
    if slope is not None:
        of_scores *= slope
    return of_scores @ keys, of_scores.mT @ query, of_values
