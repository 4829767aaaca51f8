"""Floating-point operations of a model's matrix products: what a step cannot do without.

A multiply-add counts as two. Only matrix products count, as in `torch.utils.flop_counter`:

- A weight of n numbers costs 2n a token in the forward pass; in the backward pass 2n for the
  gradient of its input, and 2n more for its own where it is trained. Of E experts, k are computed.
- Attention costs 2 H (D_qk + D_v) a layer for each pair of a query and a key that it may look at:
  p + 1 keys for a token at position p, at most the window. The backward pass costs twice that.
- The vocabulary projection costs 2 V D a row, and 2 V D in the backward pass for each of: the
  logits, which are projected again, the gradient of the hidden states, and of the weight.
- Activation checkpointing repeats the layers' forward pass.

Left out: embeddings, norms, activations, softmax, and with LoRA on stacked experts the product that
makes the adapted weights. Layers other than attention (state spaces, convolutions) count as their
weights alone.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from gspo.core.errors import ModelError
from gspo.kernels.logprob import Head
from gspo.policy.policy import Policy

_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_LISTED = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Flops:
    """Sizes of a policy from which operations are counted.

    Attributes:
        weights: numbers that one token is multiplied with below the vocabulary projection.
        trained: those of them that are trained.
        pair: operations of one query and one key in one layer.
        windows: number of attention layers by their window; None: no window.
        recomputes: layers are computed again in the backward pass.
    """

    weights: float
    trained: float
    pair: int
    windows: dict[int | None, int]
    recomputes: bool

    @classmethod
    def of(cls, policy: Policy) -> Flops:
        """The sizes of a policy.

        Raises:
            ModelError: experts, but no known name for how many of them compute a token.
        """
        config = policy.lm.config.get_text_config()
        found = active_weights(policy)
        return cls(
            weights=sum(found.values(), 0.0),
            trained=sum((n for p, n in found.items() if p.requires_grad), 0.0),
            pair=2 * config.num_attention_heads * sum(_head_widths(config)),
            windows=_windows(config),
            recomputes=policy.checkpointing,
        )

    def attention(self, positions: Int[Tensor, ...]) -> float:
        """Forward pass of all layers' attention, of tokens at these positions."""
        keys = positions.reshape(-1) + 1
        pairs = {w: int((keys if w is None else keys.clamp(max=w)).sum()) for w in self.windows}
        return float(sum(self.pair * n * pairs[w] for w, n in self.windows.items()))

    def forward(self, positions: Int[Tensor, ...]) -> float:
        """Forward pass below the vocabulary projection."""
        return 2 * self.weights * positions.numel() + self.attention(positions)

    def backward(self, positions: Int[Tensor, ...]) -> float:
        """Backward pass below the vocabulary projection."""
        products = 2 * (self.weights + self.trained) * positions.numel()
        again = self.forward(positions) if self.recomputes else 0.0
        return products + 2 * self.attention(positions) + again


def head_flops(head: Head, rows: int, *, grad: bool = True) -> tuple[float, float]:
    """Log-probs of this many tokens from their hidden states: forward and backward pass.

    A frozen head's input gradient is made in the forward pass; logits that are made again in the
    backward pass for want of memory don't count, since they need not be.
    """
    product = 2.0 * head.weight.numel() * rows
    if not grad:
        return product, 0.0
    return (product, 2 * product) if head.weight.requires_grad else (2 * product, 0.0)


def active_weights(policy: Policy) -> dict[torch.nn.Parameter, float]:
    """Of each weight matrix below the vocabulary projection, the numbers that one token meets."""
    config = policy.lm.config.get_text_config()
    out: dict[torch.nn.Parameter, float] = {}
    for path, module in policy.backbone.named_modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() not in (2, 3) or "bias" in name:
                continue
            share = 1.0
            if parameter.dim() == 3 and "experts" in path:
                share = _experts_per_token(config) / parameter.shape[0]
            elif _LISTED.search(f".{path}."):
                share = _experts_per_token(config) / policy.routing.experts
            out[parameter] = share * parameter.numel()
    return out


def _experts_per_token(config: Any) -> int:
    for name in _PER_TOKEN:
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise ModelError(
        f"{type(config).__name__} doesn't say how many experts compute a token (looked for "
        f"{', '.join(_PER_TOKEN)}): its operations cannot be counted: train without --profile"
    )


def _head_widths(config: Any) -> tuple[int, int]:
    """Width of a head's queries and keys, and of its values."""
    plain = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = getattr(config, "qk_head_dim", None)  # DeepSeek's latent attention
    return keys or plain, getattr(config, "v_head_dim", None) or plain


def _windows(config: Any) -> dict[int | None, int]:
    """Attention layers by their window."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return {window: config.num_hidden_layers}
    by_kind = {
        "full_attention": None,
        "sliding_attention": window,
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }
    return dict(Counter(by_kind[kind] for kind in kinds if kind in by_kind))
