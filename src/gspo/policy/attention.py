"""Attention over packed samples, without a mask over the whole row.

Registered with transformers' attention interface as `gspo_packed`, which is SDPA until a forward
pass hands it `gspo_buckets`. Then samples of like length are attended together, padded inside
attention alone, so that the cost is the sum of L^2 and not T^2. It stays on between passes: layers
that are recomputed in the backward pass must attend as they did in the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gspo.policy.cascade import Cascade, cascade_attention

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


def make_buckets(lengths: Sequence[int], device: torch.device, waste: float = 1.15) -> list[Bucket]:
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


def packed_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "R H Q D"],
    key: Float[Tensor, "R K L D"],
    value: Float[Tensor, "R K L E"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    gspo_buckets: Sequence[Bucket] | None = None,
    gspo_cascade: Cascade | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "R Q H E"], None]:
    """Causal attention inside each sample of the row; SDPA where no buckets are given.

    With buckets, or with the cascade of a decoding step, `attention_mask` is a placeholder that
    kept transformers from making a mask of its own.

    Raises:
        NotImplementedError: the architecture asks for something that this doesn't compute (soft
            caps, attention sinks, biases); the caller then packs by mask instead.
    """
    if gspo_buckets is None and gspo_cascade is None:
        kwargs |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    unknown = [k for k, v in kwargs.items() if v is not None and k not in _HARMLESS]
    if unknown or dropout:
        raise NotImplementedError(f"gspo_packed attention with {unknown or 'dropout'}")
    if not getattr(module, "is_causal", True):
        raise NotImplementedError("gspo_packed attention is causal")
    if gspo_cascade is not None:
        return cascade_attention(
            module, query, key, value, gspo_cascade, scaling, sliding_window
        ), None
    assert gspo_buckets is not None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[-1])
    for bucket in gspo_buckets:
        part = functional.scaled_dot_product_attention(
            *(x[bucket.index].transpose(1, 2) for x in (q, k, v)),
            attn_mask=(mask := _window(bucket, sliding_window)),
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        ).transpose(1, 2)  # [B, L, H, E]
        # Padding sits behind its sample, where a causal query never looks; its rows are left out.
        if bucket.full:
            out = out.index_copy(0, bucket.index.flatten(), part.flatten(0, 1))
        else:
            out = out.index_copy(0, bucket.index[bucket.real], part[bucket.real])
    return out[None], None


def _window(bucket: Bucket, sliding_window: int | None) -> Bool[Tensor, "L L"] | None:
    """A band where the window is shorter than the samples, else None: plainly causal."""
    width = bucket.index.shape[1]
    if sliding_window is None or width <= sliding_window:
        return None
    at = torch.arange(width, device=bucket.index.device)
    distance = at[:, None] - at[None, :]
    return (distance >= 0) & (distance < sliding_window)


def no_mask(device: torch.device) -> Bool[Tensor, "1 1 1 1"]:
    """A 4-d mask, which transformers takes as it is instead of making one."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
