"""The floating-point operations that a step of a model needs.

Counted are those of its matrix products, by torch's FlopCounterMode: a multiply-add is two.
The counter looks at two tiny samples when a model is loaded, and not at the steps, which it would
slow down; from there on the positions of the tokens say how much is computed.

Left out are embeddings, norms, activations and softmax, which have no matrix product.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gspo.kernels.logprob import Head
from gspo.policy.load import Policy


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a model's layers, below the vocabulary projection.

    Attributes:
        token: of forward and backward pass, per token, attention left out.
        pair: of both, per pair of a query and a key that it may look at, over all layers.
        windows: share of the attention layers by their window; None: no window.

    The backward pass counts what it needs: without the gradients of frozen weights, and with the
    layers that activation checkpointing computes again.
    """

    token: tuple[float, ...]
    pair: tuple[float, ...]
    windows: dict[int | None, float]

    @classmethod
    def of(cls, policy: Policy) -> Flops:
        """Count in samples of L = 1, 2 and 3 tokens: constant + token L + pair L^2.

        torch counts attention as L^2 pairs. The constant is left out: it is what makes the adapted
        weights where LoRA is on stacked experts.
        """
        one, two, three = (_counted(policy, length) for length in (1, 2, 3))
        pair = tuple((c - 2 * b + a) / 2 for a, b, c in zip(one, two, three, strict=True))
        token = tuple(b - a - 3 * p for a, b, p in zip(one, two, pair, strict=True))
        return cls(token, pair, _windows(policy.lm.config.get_text_config()))

    def forward(self, positions: Int[Tensor, ...]) -> float:
        """Operations of the forward pass of tokens at these positions in their samples."""
        return self.token[0] * positions.numel() + self.pair[0] * self.pairs(positions)

    def backward(self, positions: Int[Tensor, ...]) -> float:
        """Operations of the backward pass."""
        return self.token[1] * positions.numel() + self.pair[1] * self.pairs(positions)

    def pairs(self, positions: Int[Tensor, ...]) -> float:
        """Pairs of a query and a key: p + 1 keys at position p, at most the layer's window.

        It is a mean over the attention layers, whose windows may differ.
        """
        keys = positions.reshape(-1) + 1
        return sum(
            share * int((keys if window is None else keys.clamp(max=window)).sum())
            for window, share in self.windows.items()
        )


def head_flops(head: Head, tokens: int, *, grad: bool = True) -> tuple[float, float]:
    """Operations of the vocabulary projection of this many tokens: forward and backward pass.

    The input gradient of a frozen head is made in the forward pass. Logits that are made again in
    the backward pass to save memory don't count, since the method doesn't need that.
    """
    product = 2.0 * head.weight.numel() * tokens
    if not grad:
        return product, 0.0
    return (product, 2 * product) if head.weight.requires_grad else (2 * product, 0.0)


def _grouped_mm(left: list[int], right: list[int], *_: Any, **__: Any) -> int:
    """Operations of the experts' products, which torch's table lacks; the arguments are shapes."""
    return 2 * left[0] * left[1] * right[-1]


def _counted(policy: Policy, length: int) -> tuple[int, int]:
    """Operations of the forward and of the backward pass over one sample, as torch counts them."""
    tokens = torch.arange(length, device=policy.device)[None]
    passes = []
    # Tokens that `hf.pad_experts` adds are not needed.
    padded: list[Any] = [m for m in policy.lm.modules() if hasattr(m, "gspo_rows")]
    rows = [module.gspo_rows for module in padded]
    for module in padded:
        module.gspo_rows = 0
    hidden = torch.empty(0)
    experts = {torch.ops.aten._grouped_mm: _grouped_mm}
    for is_forward in (True, False):
        counter = FlopCounterMode(display=False, custom_mapping=experts)
        # Only this implementation of attention is made of products that torch counts on the CPU.
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), counter:
            if is_forward:
                out = policy.backbone(input_ids=tokens, position_ids=tokens, use_cache=False)
                hidden = out.last_hidden_state
            elif hidden.requires_grad:
                trained = list(policy.trainable.values())
                torch.autograd.grad(hidden.sum(), trained, allow_unused=True)
        # Without the angles of rotary embeddings, an outer product of positions and frequencies.
        counts = counter.get_flop_counts().items()
        angles = sum(sum(ops.values()) for name, ops in counts if name.endswith("rotary_emb"))
        passes.append(counter.get_total_flops() - angles)
    for module, count in zip(padded, rows, strict=True):
        module.gspo_rows = count
    return passes[0], passes[1]


def _windows(config: Any) -> dict[int | None, float]:
    """Share of the attention layers by their window."""
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    by_kind = {"full_attention": None, "sliding_attention": window, "chunked_attention": chunk}
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return {window: 1.0}
    layers = Counter(by_kind[kind] for kind in kinds if kind in by_kind)
    return {window: count / layers.total() for window, count in layers.items()}
