"""The one door to transformers' internals, whose names change from release to release.

Nothing else in gspo imports a submodule of transformers or reads a name of it that begins with an
underscore (`tests/kernels/test_hf.py`), so that a new release is mended here. `X as X` passes a
name on.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface as AttentionInterface
from transformers import AttentionMaskInterface as AttentionMaskInterface
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.cache_utils import Cache as Cache
from transformers.convert_slow_tokenizer import bytes_to_unicode as bytes_to_unicode
from transformers.integrations.sdpa_attention import (
    sdpa_attention_forward as sdpa_attention_forward,
)
from transformers.masking_utils import create_causal_mask
from transformers.masking_utils import sdpa_mask as sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D as Conv1D
from transformers.utils import logging

from gspo.core.errors import ModelError

GATE = "_apply_gate"
"""The method of a module of experts that computes what is between their two products."""


def cache_argument(backbone: torch.nn.Module, kv_cache: Cache) -> dict[str, Any]:
    """Name the keyword argument that hands a cache to a forward pass.

    transformers 5.24 renamed `past_key_values` to `cache`; the old name goes with 5.40.
    """
    return {_cache_keyword(type(backbone).forward): kv_cache}


def no_mask(device: torch.device) -> torch.Tensor:
    """Return a 4-d mask, which transformers takes as it is instead of making one."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def causal_mask(config: Any, embeddings: torch.Tensor, allowed: Any) -> Any:
    """Make transformers' causal mask without a cache, of pairs of tokens that are `allowed`."""
    return create_causal_mask(
        config=config,
        inputs_embeds=embeddings,
        attention_mask=None,
        and_mask_function=allowed,
        **{_cache_keyword(create_causal_mask): None},  # pyright: ignore[reportArgumentType]
    )


@functools.cache
def _cache_keyword(function: Any) -> str:
    names = inspect.signature(function).parameters
    return "cache" if "cache" in names else "past_key_values"


def returned_cache(output: Any) -> Cache:
    """Find the cache that a model made for itself in a forward pass.

    Raises:
        TypeError: it returned none.
    """
    for value in output.values():
        if isinstance(value, Cache):
            return value
    raise TypeError("it returns no cache")


def select_completions(cache: Cache, chosen: torch.Tensor) -> None:
    """Keep these of a cache, in this order; an index that occurs twice gives two copies."""
    if type(cache).batch_select_indices is not Cache.batch_select_indices:
        cache.batch_select_indices(chosen)  # only here does MiniMax's cache heed its linear layers
    else:
        cache.reorder_cache(chosen)  # pyright: ignore[reportArgumentType]


def attention_implementation(lm: PreTrainedModel) -> str | None:
    """Name the model's attention as it is registered: "sdpa", "gspo_packed", ..."""
    return lm.config._attn_implementation


def find_routers(lm: torch.nn.Module) -> list[tuple[torch.nn.Module, int]]:
    """Find the router modules of a model, each with the place of its logits in its output.

    Adapters don't hide them: peft wraps modules, and what it wraps stays a submodule.
    """
    routers: dict[torch.nn.Module, int] = {}
    for model in lm.modules():
        named = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
        for spec in named if isinstance(named, list) else [named]:
            target = getattr(spec, "target_class", spec)
            if not isinstance(target, type):
                continue
            inside = getattr(spec, "layer_name", None)
            for name, module in model.named_modules():
                fits = inside is None or f".{inside.strip('.')}." in f".{name}."
                if isinstance(module, target) and fits:
                    routers.setdefault(module, getattr(spec, "index", 0))
    return list(routers.items())


def backbone(lm: PreTrainedModel) -> torch.nn.Module:
    """Find the model below the vocabulary projection.

    Raises:
        ModelError: there is none.
    """
    # Llama 4's class names the attribute of its multimodal sister.
    children = (child for child in lm.children() if isinstance(child, PreTrainedModel))
    below = getattr(lm, lm.base_model_prefix, None) or next(children, None)
    if below is None:
        raise ModelError(f"{type(lm).__name__} has no model below its output head")
    return below


def recompute_layers(lm: PreTrainedModel, context_fn: Callable[[], tuple[Any, Any]]) -> None:
    """Compute each layer again in the backward pass instead of keeping its activations.

    transformers does that in train mode only, which turns on whatever is random in a model: dropout
    under any name, noise of routers. Here the model stays in eval mode.

    Args:
        lm: the model.
        context_fn: `torch.utils.checkpoint`'s: contexts of the first and of the second pass.

    Raises:
        ModelError: transformers marks no layers of this model.
    """

    def forward(self: GradientCheckpointingLayer, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(type(self).forward, self)
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        return checkpoint(run, *args, use_reentrant=False, context_fn=context_fn, **kwargs)

    layers = [m for m in lm.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"activation_checkpointing: {type(lm).__name__} has no layers that transformers can "
            "recompute; leave the option out"
        )
    for layer in layers:
        # A bound method: a copy of the model then calls the copy's layer.
        layer.forward = MethodType(forward, layer)


def sharding(ranks: int, ep_size: int, *, half: bool) -> dict[str, Any]:
    """Name the argument of `from_pretrained` that divides the weights among the ranks (FSDP2), and
    whole experts among each `ep_size` of them.

    With `half`, the float32 weights of a layer are rounded to bfloat16 as they are gathered, and
    their gradients added up in float32.
    """
    # transformers 5.24 has it
    from transformers.distributed.configuration_utils import DistributedConfig

    config = DistributedConfig(fsdp_size=ranks, ep_size=ep_size, fsdp_mixed_precision=half)
    return {"distributed_config": config}


def stored_tensors(
    lm: PreTrainedModel, weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of a model as its folder holds them: tied ones once, experts one by one."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = lm._keys_to_ignore_on_save or ()
    kept = {name: weight for name, weight in weights.items() if name not in ignored}
    return revert_weight_conversion(lm, remove_tied_weights_from_state_dict(kept, lm))


def stays_float32(lm: PreTrainedModel, name: str) -> bool:
    """Whether the architecture keeps a parameter in float32 in a bfloat16 model, too."""
    kept = getattr(lm, "_keep_in_fp32_modules_strict", None) or ()
    return any(f".{part}." in f".{name}." for part in kept)


def keep_long_rope(lm: PreTrainedModel) -> None:
    """Give texts of every length the RoPE frequencies that longrope has for long ones."""
    for module in lm.modules():
        for name in [n for n in vars(module) if n.endswith("long_inv_freq")]:
            short = getattr(module, name.replace("long_inv_freq", "original_inv_freq"))
            short.copy_(getattr(module, name))


def decoder_kinds(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Name the steps by which a tokenizer makes text of tokens: "ByteLevel", "ByteFallback", ...

    Empty for a tokenizer that is not built on the `tokenizers` package.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return frozenset()
    # Its own state: to write down the whole tokenizer takes a quarter of a second.
    decoder = json.loads(backend.decoder.__getstate__())
    steps = decoder.get("decoders", [decoder])
    return frozenset(step["type"] for step in steps if "type" in step)


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], *, special: bool) -> str:
    """The text of token ids, not cleaned up; with `special`, special tokens too.

    As `tokenizer.decode`, which takes three times as long: it first looks for tensors in the list.
    """
    kind = type(tokenizer)
    if (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind._decode is PreTrainedTokenizerFast._decode
        and kind.decode is PreTrainedTokenizerBase.decode
    ):
        return tokenizer.backend_tokenizer.decode(token_ids, skip_special_tokens=not special)
    options = {"skip_special_tokens": not special, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(token_ids, **options))


@contextmanager
def quiet() -> Iterator[None]:
    """Show no progress bars inside the block: they would tear gspo's live display."""
    on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if on:
            logging.enable_progress_bar()


def usual_experts(experts: Any) -> bool:
    """Whether it is a module of gated experts without biases, computed by `grouped_mm`."""
    if not getattr(experts, "has_gate", False) or experts.has_bias or experts.is_transposed:
        return False
    if getattr(experts, "has_post_expert_norm", False):
        return False
    return experts.config._experts_implementation == "grouped_mm"
