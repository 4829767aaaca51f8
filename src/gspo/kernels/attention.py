"""gspo's own attention, registered with transformers under the name `gspo_packed`.

It is SDPA unless a forward pass hands it a plan (`gspo_plan`), which says who sees whom:

- a microbatch on a CPU: `shared_prompt_attention`, samples of about the same length together;
- a microbatch on a GPU: `flex`, one call of flex_attention;
- a decoding step: `prompt_cache.SharedPrompts`, a prompt's keys once for all of its completions.

No mask over the whole microbatch is made: the cost is the sum of L^2 and not T^2. The name stays
registered between passes: layers that are computed again in the backward pass must attend as they
did in the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.kernels.flex import FlexAttention
from gspo.kernels.hf import (
    AttentionInterface,
    AttentionMaskInterface,
    sdpa_attention_forward,
    sdpa_mask,
)
from gspo.kernels.prompt_cache import SharedPrompts
from gspo.kernels.shared_prompt_attention import SharedPromptAttention

PACKED = "gspo_packed"
_HARMLESS = frozenset({"is_causal", "position_ids", "use_cache", "cache_position"})


def packed_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "N H Q D"],
    key: Float[Tensor, "N K L D"],
    value: Float[Tensor, "N K L E"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    gspo_plan: SharedPromptAttention | FlexAttention | SharedPrompts | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "N Q H E"], None]:
    """Causal attention by the plan of the forward pass; SDPA if there is none.

    With a plan, `attention_mask` is a placeholder that kept transformers from making a mask.

    Raises:
        NotImplementedError: the architecture asks for something that this doesn't compute (soft
            caps, attention sinks, biases); the caller then packs by mask instead.
    """
    layer: Any = getattr(module, "layer_idx", None)
    if gspo_plan is None:
        kwargs |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    unknown = [k for k, v in kwargs.items() if v is not None and k not in _HARMLESS]
    if unknown or dropout:
        raise NotImplementedError(f"gspo_packed attention with {unknown or 'dropout'}")
    if not getattr(module, "is_causal", True):
        raise NotImplementedError("gspo_packed attention is causal")
    return gspo_plan.attend(layer, query, key, value, scaling, sliding_window), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
