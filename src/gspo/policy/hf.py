"""The one door to transformers' internals: what changes name from release to release.

Nothing else in gspo imports a submodule of transformers or reads a name of it that begins with an
underscore (`tests/policy/test_hf.py`), so that a new release is mended here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, sdpa_mask
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

__all__ = [
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CacheLayerMixin",
    "Conv1D",
    "attention_implementation",
    "cache_argument",
    "causal_mask",
    "enable_checkpointing",
    "quiet",
    "router_classes",
    "sdpa_attention_forward",
    "sdpa_mask",
]


def cache_argument(backbone: torch.nn.Module, kv_cache: Cache) -> dict[str, Any]:
    """The keyword argument that hands a cache to a forward pass.

    transformers 5.24 renamed `past_key_values` to `cache`; the old name goes with 5.40.
    """
    return {_cache_keyword(type(backbone).forward): kv_cache}


def causal_mask(config: Any, embeddings: torch.Tensor, seen: Any) -> Any:
    """transformers' causal mask, without a cache, with `seen` as a further condition."""
    no_cache: dict[str, Any] = {_cache_keyword(create_causal_mask): None}
    return create_causal_mask(
        config=config,
        inputs_embeds=embeddings,
        attention_mask=None,
        and_mask_function=seen,
        **no_cache,
    )


@cache
def _cache_keyword(function: Any) -> str:
    names = inspect.signature(function).parameters
    return "cache" if "cache" in names else "past_key_values"


def attention_implementation(lm: PreTrainedModel) -> str | None:
    """The name under which the model's attention is registered: "sdpa", "gspo_packed", ..."""
    return lm.config._attn_implementation


def router_classes(model: torch.nn.Module) -> Any:
    """What transformers records as the model's router logits, or None."""
    named: Mapping[str, Any] = getattr(model, "_can_record_outputs", None) or {}
    return named.get("router_logits")


def enable_checkpointing(lm: PreTrainedModel, **options: Any) -> None:
    """Recompute layers in the backward pass. transformers 5.2x calls it activation checkpointing,
    earlier ones gradient checkpointing."""
    enable = getattr(lm, "activation_checkpointing_enable", None)
    (enable or lm.gradient_checkpointing_enable)(options)


@contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars, which would tear gspo's live display."""
    on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if on:
            logging.enable_progress_bar()
