"""Attention over packed samples, without a mask over the whole row.

Registered with transformers' attention interface as `gspo_packed`. Samples of like length are
attended together, padded inside attention alone, so that the cost is the sum of L^2 and not T^2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

PACKED = "gspo_packed"
_HARMLESS = frozenset({"is_causal", "position_ids", "use_cache", "cache_position"})


@dataclass(frozen=True)
class Bucket:
    """Samples of like length.

    Attributes:
        index: [B, L] index in the row of each token; padding repeats the sample's first token.
        real: [B, L] False at padding.
        full: no padding at all.
    """

    index: Int[Tensor, "B L"]
    real: Bool[Tensor, "B L"]
    full: bool


def make_buckets(
    lengths: Sequence[int], device: torch.device, waste: float = 1.15
) -> list[Bucket]:
    """Group samples so that padding adds at most `waste` - 1 to any of them.

    >>> [b.index.shape for b in make_buckets([3, 10, 3], torch.device("cpu"))]
    [torch.Size([1, 10]), torch.Size([2, 3])]
    """
    starts, total = [], 0
    for length in lengths:
        starts.append(total)
        total += length
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    for i in order:
        if groups and lengths[groups[-1][0]] <= waste * lengths[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    buckets = []
    for group in groups:
        width = lengths[group[0]]
        at = torch.arange(width)[None]
        own = torch.tensor([lengths[i] for i in group])[:, None]
        start = torch.tensor([starts[i] for i in group])[:, None]
        real = at < own
        index = torch.where(real, start + at, start)
        buckets.append(Bucket(index.to(device), real.to(device), bool(real.all())))
    return buckets


def padded_share(lengths: Sequence[int]) -> tuple[int, int]:
    """(real tokens, positions computed) of attention over these samples.

    >>> padded_share([10, 9, 3])
    (22, 23)
    """
    buckets = make_buckets(lengths, torch.device("cpu"))
    return sum(lengths), sum(bucket.index.numel() for bucket in buckets)


@contextmanager
def packed(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Compute `model` with this attention implementation inside the block."""
    config = model.config
    before = config._attn_implementation
    if before == implementation:
        yield
        return
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def packed_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 H T D"],
    key: Float[Tensor, "1 K T D"],
    value: Float[Tensor, "1 K T E"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    gspo_buckets: Sequence[Bucket] | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 T H E"], None]:
    """Causal attention inside each sample of the row.

    Raises:
        NotImplementedError: the architecture asks for something that this doesn't compute (soft
            caps, attention sinks, biases); the caller then packs by mask instead.
    """
    unknown = [k for k, v in kwargs.items() if v is not None and k not in _HARMLESS]
    if unknown or attention_mask is not None or gspo_buckets is None or query.shape[0] != 1:
        raise NotImplementedError(f"gspo_packed attention with {unknown or 'a mask'}")
    if not getattr(module, "is_causal", True):
        raise NotImplementedError("gspo_packed attention is causal")
    grouped = query.shape[1] != key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[-1])
    for bucket in gspo_buckets:
        width = bucket.index.shape[1]
        mask = None
        if sliding_window is not None and width > sliding_window:
            at = torch.arange(width, device=q.device)
            distance = at[:, None] - at[None, :]
            mask = (distance >= 0) & (distance < sliding_window)
        part = functional.scaled_dot_product_attention(
            *(x[bucket.index].transpose(1, 2) for x in (q, k, v)),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=grouped,
        ).transpose(1, 2)  # [B, L, H, E]
        # Padding sits behind its sample, where a causal query never looks; its rows are left out.
        if bucket.full:
            out = out.index_copy(0, bucket.index.flatten(), part.flatten(0, 1))
        else:
            out = out.index_copy(0, bucket.index[bucket.real], part[bucket.real])
    return out[None], None


AttentionInterface.register(PACKED, packed_attention)
