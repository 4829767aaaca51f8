"""Microbatch -> TokenLogprobs: the trainer's forward pass."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.core.timing import timed
from gspo.data.packing import Microbatch
from gspo.kernels.attention import no_mask
from gspo.kernels.flex import FlexRow
from gspo.kernels.hf import causal_mask
from gspo.kernels.logprob import TokenLogprobs, token_logprobs
from gspo.kernels.shared_prompt_attention import RowAttention
from gspo.policy.load import OWN, SHARING, Policy, autocast


@timed("forward")
def forward(policy: Policy, microbatch: Microbatch, chunk: int | None = None) -> TokenLogprobs:
    """Float32 log-probs of the batch's sampled tokens, at the temperatures they were sampled with.

    Every sample sees only itself, whatever else is in the row.
    """
    device = policy.device
    hidden = _hidden_states(policy, microbatch)
    return token_logprobs(
        hidden.index_select(0, microbatch.sources.to(device)),
        policy.head,
        microbatch.tokens[0, microbatch.targets].to(device),
        microbatch.temperatures.to(device),
        chunk,
    )


def _hidden_states(policy: Policy, microbatch: Microbatch) -> Float[Tensor, "T D"]:
    device = policy.device
    tokens, positions = microbatch.tokens.to(device), microbatch.positions.to(device)
    if microbatch.token_count < microbatch.sample_tokens and policy.packing not in SHARING:
        raise ValueError(f"a row with shared prefixes, and a model packed by {policy.packing!r}")
    with autocast(policy):
        if policy.packing == "single":
            return torch.cat(
                [
                    policy.backbone(
                        input_ids=part, position_ids=at, use_cache=False
                    ).last_hidden_state[0]
                    for part, at in zip(
                        tokens.split(microbatch.lengths, dim=1),
                        positions.split(microbatch.lengths, dim=1),
                        strict=True,
                    )
                ]
            )
        extra: dict[str, Any] = {}
        if policy.packing in OWN:
            row = RowAttention(microbatch, device)
            extra["attention_mask"] = no_mask(device)
            extra["gspo_row"] = FlexRow(row) if policy.packing == "flex" else row
        elif policy.packing == "mask_by_type":
            extra["attention_mask"] = _masks_by_type(policy, microbatch)
        # With "mask", transformers reads the samples' borders from the restarting positions.
        return policy.backbone(
            input_ids=tokens, position_ids=positions, use_cache=False, **extra
        ).last_hidden_state[0]


def _masks_by_type(policy: Policy, microbatch: Microbatch) -> dict[str, Any]:
    """Masks of the whole row by layer type, for models that don't look at the positions."""
    config = policy.lm.config.get_text_config()
    device = policy.device
    until = torch.from_numpy(RowAttention(microbatch).until).to(device)
    positions = microbatch.positions[0].to(device)
    window: Any = getattr(config, "sliding_window", None)

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query < until[key]

    def near(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query < until[key]) & (positions[query] < positions[key] + window)

    embeddings = policy.lm.get_input_embeddings()(microbatch.tokens.to(device)).detach()
    masks = {"full_attention": causal_mask(config, embeddings, seen)}
    if window is not None:
        masks["sliding_attention"] = causal_mask(config, embeddings, near)
    return masks
