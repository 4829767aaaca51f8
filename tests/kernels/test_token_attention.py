"""One token of each completion: the bits of `tile_attention`, however heads stand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gspo.kernels.shared_contexts import Context, context_groups
from gspo.kernels.tile_attention import LOG2_E, PLAIN, TILE, Scoring, attend
from gspo.kernels.token_attention import TokenAttention, beside
from gspo.kernels.unseen import hiding

CPU = torch.device("cpu")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scoring", [PLAIN, Scoring(0.7, torch.ones(4, 1))])
@pytest.mark.parametrize("sizes", [(), (3, 2)])
@pytest.mark.parametrize(
    "heads", [(2, 2, 16), (4, 1, 16), (3, 3, 64), (1, 2, 8), (2, 2, 8), (8, 1, 8), (3, 2, 2)]
)
def test_every_bit_is_that_of_tile_attention(heads, sizes, scoring: Scoring):
    kv_heads, share, depth = heads
    if scoring is not PLAIN:
        scoring = Scoring(0.7, random(9, kv_heads, share))
    count, length, scale = 5, 3 * TILE, 0.3 * LOG2_E
    query = random(0, count, kv_heads, share, depth)
    keys, values = (random(i, count, kv_heads, length, depth) for i in (1, 2))
    context = None
    if sizes:
        owner = np.repeat(np.arange(len(sizes)), sizes)
        shared = [random(i, len(sizes), kv_heads, 2 * TILE, depth) for i in (3, 4)]
        groups = context_groups(owner, np.array(sizes), CPU)
        context = Context(shared[0], shared[1], groups)
    unseen = np.arange(length)[None, None] > np.arange(60, 60 + count)[:, None, None]
    hidden = hiding(unseen, CPU)
    together = kv_heads if beside(*heads, depth, torch.float32) else 1
    if depth >= 16 or kv_heads == 1:  # narrower heads: only if the library's bits allow it
        assert (together > 1) == (heads in ((2, 2, 16), (4, 1, 16)))

    def slab(x: Tensor) -> Tensor:
        return x if together == 1 else x.transpose(1, 2).flatten(2)[:, None].contiguous()

    one = TokenAttention((count, *heads, depth), together, query)
    rest = hidden, TILE, scoring
    expected, *_ = attend(query * scale, keys, values, context, *rest)
    if context is not None:
        context = Context(slab(context.keys), slab(context.values), context.groups)
    for _ in range(2):  # in the memory of the last step
        found = one.attend(query, scale, slab(keys), slab(values), context, *rest)
        assert torch.equal(found, expected)
