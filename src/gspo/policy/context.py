"""Find the longest sample whose log-probs don't depend on the length of a call.

A log-prob must not depend on what else is computed in the same call. Some models break that: with
longrope (Phi-3, Phi-4-mini) the largest position of the call chooses one of two sets of RoPE
frequencies for all of its tokens. The model itself shows whether it does so: a few tokens are
computed beside others at a far position, which costs the same whatever the threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from gspo.core.errors import ModelError
from gspo.core.log import log
from gspo.kernels.hf import backbone, keep_long_rope

PROBE_WORK = 2e11
"""Parameters x tokens that a probe may compute: some seconds on two cores."""
PROBE_TOKENS = 2048
"""A probe is never longer than this: its attention and its logits are not chunked."""
FEWEST = 9
"""Tokens of a context that the checks at load, of a prompt and a few sampled tokens, fit into."""
_UNBOUNDED = 2**31
_FARTHEST = 2**17  # position to try if the model names no longest one
_SHORT = 8
_NOISE = 1e-3  # of the largest hidden state; other RoPE frequencies change far more


def settle_context(lm: PreTrainedModel, name: str, wanted: int | None) -> int:
    """Find the longest prompt + completion in tokens for which a call's length changes nothing.

    Below the model's RoPE threshold each call has the short frequencies. If more is wanted, each
    call gets the long ones, as in vLLM.

    Args:
        lm: the model; its long RoPE frequencies may be made the only ones.
        name: what the user calls the model.
        wanted: `max_context`, or None for as much as is exact.

    Raises:
        ModelError: more is wanted than the model has, or than it can compute in one way; or less
            than the checks at load need.
    """
    config = lm.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or _UNBOUNDED
    if wanted is not None and wanted > longest:
        raise ModelError(f"max_context = {wanted}, but {name!r} has a context of {longest}")
    if (wanted or longest) < FEWEST:
        raise ModelError(
            f"{name!r} with a context of {wanted or longest} tokens: give max_context={FEWEST} or "
            "more, which the checks at load take"
        )
    if not _far_tokens_change_near_ones(lm, wanted or longest):
        return wanted or longest
    threshold = min(_numbers(config, "original_max_position_embeddings"), default=longest)
    if wanted is None:
        log.info("%s: context limited to %d tokens, where its RoPE changes", name, threshold)
    else:
        keep_long_rope(lm)
    if _far_tokens_change_near_ones(lm, wanted or threshold):
        remedy = "not supported" if wanted is None else f"give max_context={threshold} or less"
        raise ModelError(
            f"{name!r} computes a short text differently when a long one is in the same call, so "
            f"its log-probs depend on the batch: {remedy}"
        )
    return wanted or threshold


def probe_length(lm: PreTrainedModel, context: int) -> int:
    """Count the tokens of a text that reaches past the model's sliding windows; 0 if it has none,
    or if so many tokens would take too long."""
    config = lm.config.get_text_config()
    windows = (*_numbers(config, "sliding_window"), *_numbers(config, "attention_window_size"))
    allowed = min(context, PROBE_TOKENS, int(PROBE_WORK / sum(p.numel() for p in lm.parameters())))
    # Four more: the last tokens no longer see the first ones.
    return max((window + 4 for window in windows if window + 4 <= allowed), default=0)


def chunk_in(lm: PreTrainedModel, context: int) -> int | None:
    """Count the tokens of the chunks that attention stays in, if a sample may have several."""
    sizes = _numbers(lm.config.get_text_config(), "attention_chunk_size")
    return min((size for size in sizes if size < context), default=None)


@torch.no_grad()
def _far_tokens_change_near_ones(lm: PreTrainedModel, limit: int) -> bool:
    """Whether a short text is computed differently beside one that ends at position `limit`."""
    start = min(limit, _FARTHEST) - _SHORT
    if start <= _SHORT:
        return False
    near = torch.arange(_SHORT, device=lm.device)[None]
    positions = torch.cat([near, near + start])
    run = backbone(lm).eval()
    try:
        single, beside = (
            run(input_ids=near.expand_as(ids), position_ids=ids, use_cache=False).last_hidden_state
            for ids in (near, positions)
        )
    except TypeError:  # a model without positions has no threshold among them
        return False
    return bool((single[0] - beside[0]).abs().max() > _NOISE * single.abs().max())


def _numbers(config: Any, name: str) -> Iterator[int]:
    """Yield the values of an entry of the config and of its tables, such as `rope_parameters`."""
    entries = config if isinstance(config, Mapping) else vars(config)
    for key, value in entries.items():
        if key == name and isinstance(value, int):
            yield value
        elif isinstance(value, Mapping):
            yield from _numbers(value, name)
