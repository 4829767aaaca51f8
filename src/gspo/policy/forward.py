"""PackedBatch -> TokenLogprobs: the trainer's forward pass."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from gspo.batch.pack import PackedBatch
from gspo.policy.attention import make_buckets, no_mask
from gspo.policy.load import Policy, autocast
from gspo.policy.logprob import TokenLogprobs, token_logprobs
from gspo.timing import timed


@timed("forward")
def forward(policy: Policy, batch: PackedBatch, chunk: int | None = None) -> TokenLogprobs:
    """Float32 log-probs of the batch's sampled tokens, at the temperatures they were sampled with.

    Every row's samples see only themselves, whatever else shares the row.
    """
    device = policy.device
    hidden = _hidden_states(policy, batch)
    targets = batch.targets.to(device)
    tokens = batch.tokens[0].to(device)
    return token_logprobs(
        hidden[targets - 1],  # a token is predicted from the position before it
        policy.head,
        tokens[targets],
        batch.temperatures.to(device),
        chunk,
    )


def _hidden_states(policy: Policy, batch: PackedBatch) -> Float[Tensor, "T D"]:
    device = policy.device
    tokens, positions = batch.tokens.to(device), batch.positions.to(device)
    with autocast(policy):
        if policy.packing == "single":
            return torch.cat(
                [
                    policy.backbone(
                        input_ids=part, position_ids=at, use_cache=False
                    ).last_hidden_state[0]
                    for part, at in zip(
                        tokens.split(batch.lengths, dim=1),
                        positions.split(batch.lengths, dim=1),
                        strict=True,
                    )
                ]
            )
        extra: dict[str, Any] = {}
        if policy.packing == "buckets":
            extra["attention_mask"] = no_mask(device)
            extra["gspo_buckets"] = make_buckets(batch.lengths, device)
        elif policy.packing == "mask_by_type":
            extra["attention_mask"] = _masks_by_type(policy, tokens, positions)
        # With "mask", transformers reads the samples' borders from the restarting positions.
        return policy.backbone(
            input_ids=tokens, position_ids=positions, use_cache=False, **extra
        ).last_hidden_state[0]


def _masks_by_type(policy: Policy, tokens: Tensor, positions: Tensor) -> dict[str, Any]:
    """Block-diagonal masks by layer type, for models that don't look at the positions."""
    config = policy.lm.config.get_text_config()
    arguments: dict[str, Any] = {
        "config": config,
        "inputs_embeds": policy.lm.get_input_embeddings()(tokens).detach(),
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": positions,
    }
    masks = {"full_attention": create_causal_mask(**arguments)}
    if getattr(config, "sliding_window", None) is not None:
        masks["sliding_attention"] = create_sliding_window_causal_mask(**arguments)
    return masks
