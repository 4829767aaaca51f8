"""Attention over packed samples, without a mask over the whole row.

Registered with transformers' attention interface as `gspo_packed`, which is SDPA until a forward
pass hands it `gspo_row`. Then samples of like length are attended together, padded inside
attention alone, so that the cost is the sum of L^2 and not T^2; on a GPU, where flex_attention
skips what isn't seen, in one call (`policy/flex.py`). It stays on between passes: layers that are
recomputed in the backward pass must attend as they did in the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from gspo.kernels.decode_attention import Cascade, cascade_attention
from gspo.kernels.flex import FlexRow
from gspo.kernels.hf import (
    AttentionInterface,
    AttentionMaskInterface,
    sdpa_attention_forward,
    sdpa_mask,
)
from gspo.kernels.shared_prompt_attention import Attention, RowAttention

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
    gspo_row: RowAttention | FlexRow | None = None,
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
    if isinstance(gspo_row, FlexRow):
        return gspo_row.attend(query, key, value, scaling, sliding_window), None
    return _by_pieces(query, key, value, gspo_row.within(sliding_window), scaling), None


def _by_pieces(
    query: Float[Tensor, "1 H T D"],
    key: Float[Tensor, "1 K T D"],
    value: Float[Tensor, "1 K T E"],
    plan: Attention,
    scaling: float | None,
) -> Float[Tensor, "1 T H E"]:
    """One call of SDPA for each piece of the plan."""
    # Rows of memory are gathered, and halves of one tensor: many small ops cost more.
    q = query.squeeze(0).transpose(0, 1).contiguous().index_select(0, plan.queries)
    kv = torch.cat([key, value], dim=-1).squeeze(0).transpose(0, 1).contiguous()
    k, v = kv.index_select(0, plan.keys).split([key.shape[-1], value.shape[-1]], dim=-1)
    parts = zip(
        plan.pieces,
        q.split([piece.blocks * piece.queries for piece in plan.pieces]),
        k.split([piece.blocks * piece.keys for piece in plan.pieces]),
        v.split([piece.blocks * piece.keys for piece in plan.pieces]),
        strict=True,
    )
    outputs = [
        functional.scaled_dot_product_attention(
            *(x.unflatten(0, (piece.blocks, -1)).transpose(1, 2) for x in own),
            attn_mask=piece.mask,
            is_causal=piece.mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        ).transpose(1, 2)
        for piece, *own in parts
    ]  # each [B, Q, H, E]
    out = torch.cat([part.flatten(0, 1) for part in outputs])
    return out.index_select(0, plan.order)[None]


def no_mask(device: torch.device) -> Bool[Tensor, "1 1 1 1"]:
    """A 4-d mask, which transformers takes as it is instead of making one."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
