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

from gspo.kernels import hf
from gspo.kernels.flex import FlexAttention
from gspo.kernels.layer_input import LayerInput
from gspo.kernels.prompt_cache import SharedPrompts
from gspo.kernels.shared_prompt_attention import SharedPromptAttention
from gspo.kernels.step_graph import Step
from gspo.kernels.tile_attention import widened

PACKED = "gspo_packed"
_HARMLESS = {"is_causal", "position_ids", "use_cache", "cache_position", "output_attentions"}


def packed_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "N H Q D"],
    key: Float[Tensor, "N K L D"],
    value: Float[Tensor, "N K L E"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " H"] | None = None,
    gspo_plan: SharedPromptAttention | FlexAttention | SharedPrompts | Step | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "N Q H E"], None]:
    """Causal attention by the plan of the forward pass; without one it is SDPA, or, with soft caps
    and sinks, which SDPA doesn't know, `_with_whole_scores`.

    With a plan, `attention_mask` is a placeholder that kept transformers from making a mask.

    Args:
        softcap, s_aux: soft cap and sinks of `tile_attention.Scoring`, by transformers' names.

    Raises:
        NotImplementedError: the architecture asks for something that this doesn't compute (biases;
            on a GPU soft caps and sinks too); the caller then packs by mask instead.
    """
    bent = softcap is not None or s_aux is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if gspo_plan is None and bent:
        scored = query, key, value, attention_mask, scale, softcap, s_aux
        return _with_whole_scores(*scored), None
    if gspo_plan is None:
        kwargs |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        return hf.sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    unknown = [k for k, v in kwargs.items() if v is not None and k not in _HARMLESS]
    if unknown or dropout:
        raise NotImplementedError(f"gspo_packed attention with {unknown or 'dropout'}")
    if not getattr(module, "is_causal", True):
        raise NotImplementedError("gspo_packed attention is causal")
    if isinstance(gspo_plan, FlexAttention) and bent:
        raise NotImplementedError("gspo_packed attention on a GPU with softcap or s_aux")
    wide = value.shape[-1]
    if query.device.type == "cpu":
        query, key, value = map(widened, (query, key, value))
    heads, layer = (query, key, value), getattr(module, "layer_idx", None)
    out = gspo_plan.attend(LayerInput(layer, *heads, scale, sliding_window, softcap, s_aux))
    return out[..., :wide].contiguous(), None  # as transformers' own: JetMoe takes a view of it


def _with_whole_scores(
    query: Float[Tensor, "N H Q D"],
    key: Float[Tensor, "N K L D"],
    value: Float[Tensor, "N K L E"],
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Float[Tensor, " H"] | None,
) -> Float[Tensor, "N Q H E"]:
    """Attention with soft cap and sinks, from all scores at once.

    Args:
        mask: True at the pairs that are seen, or numbers that are added. None: causal.
    """
    share = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(share, 1) for x in (key, value))
    scores = query @ key.mT * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask is None:
        seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device)
        mask = seen.tril(scores.shape[3] - scores.shape[2])
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., : key.shape[2]]
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous()


hf.AttentionInterface.register(PACKED, packed_attention)
hf.AttentionMaskInterface.register(PACKED, hf.sdpa_mask)
