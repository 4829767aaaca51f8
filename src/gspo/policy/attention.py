"""Attention over packed samples, without a mask over the whole row.

Registered with transformers' attention interface as `gspo_packed`, which is SDPA until a forward
pass hands it `gspo_row`. Then samples of like length are attended together, padded inside
attention alone, so that the cost is the sum of L^2 and not T^2. It stays on between passes: layers
that are recomputed in the backward pass must attend as they did in the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gspo.policy.cascade import Cascade, cascade_attention
from gspo.policy.prefix import RowAttention

PACKED = "gspo_packed"
_HARMLESS = frozenset({"is_causal", "position_ids", "use_cache", "cache_position"})


def packed_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "R H Q D"],
    key: Float[Tensor, "R K L D"],
    value: Float[Tensor, "R K L E"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    gspo_row: RowAttention | None = None,
    gspo_cascade: Cascade | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "R Q H E"], None]:
    """Causal attention along each sample of the row; SDPA where no row is given.

    With a row, or with the cascade of a decoding step, `attention_mask` is a placeholder that kept
    transformers from making a mask of its own.

    Raises:
        NotImplementedError: the architecture asks for something that this doesn't compute (soft
            caps, attention sinks, biases); the caller then packs by mask instead.
    """
    if gspo_row is None and gspo_cascade is None:
        kwargs |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    unknown = [k for k, v in kwargs.items() if v is not None and k not in _HARMLESS]
    if unknown or dropout:
        raise NotImplementedError(f"gspo_packed attention with {unknown or 'dropout'}")
    if not getattr(module, "is_causal", True):
        raise NotImplementedError("gspo_packed attention is causal")
    if gspo_cascade is not None:
        return cascade_attention(
            module, query, key, value, gspo_cascade, scaling, sliding_window
        ), None
    assert gspo_row is not None
    plan = gspo_row.within(sliding_window)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    q, k, v = (
        x.index_select(0, at) for x, at in ((q, plan.queries), (k, plan.keys), (v, plan.keys))
    )
    outputs, q_at, k_at = [], 0, 0
    for piece in plan.pieces:
        q_end = q_at + piece.blocks * piece.queries
        k_end = k_at + piece.blocks * piece.keys
        part = functional.scaled_dot_product_attention(
            q[q_at:q_end].unflatten(0, (piece.blocks, -1)).transpose(1, 2),
            k[k_at:k_end].unflatten(0, (piece.blocks, -1)).transpose(1, 2),
            v[k_at:k_end].unflatten(0, (piece.blocks, -1)).transpose(1, 2),
            attn_mask=piece.mask,
            is_causal=piece.mask is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(part.transpose(1, 2).flatten(0, 1))  # [B Q, H, E]
        q_at, k_at = q_end, k_end
    return torch.cat(outputs).index_select(0, plan.order)[None], None


def no_mask(device: torch.device) -> Bool[Tensor, "1 1 1 1"]:
    """A 4-d mask, which transformers takes as it is instead of making one."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
