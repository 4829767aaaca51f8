"""Attention in tiles: one softmax over context and keys, with bits that nothing beside changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gspo.kernels.shared_contexts import Context, context_groups
from gspo.kernels.tile_attention import LOG2_E, PLAIN, TILE, Scoring, attend, attend_backward
from gspo.kernels.unseen import hiding

CPU = torch.device("cpu")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    hidden: Tensor | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[N, K, M, E] in float64, from whole keys."""
    scores = q.double() @ keys.double().mT / LOG2_E
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if hidden is not None:
        shape = (*scores.shape[:2], hidden.shape[2], -1, scores.shape[-1])
        before = scores.shape[-1] - hidden.shape[-1]  # keys that all see
        added = torch.nn.functional.pad(hidden, (before, 0))
        scores = (scores.view(shape) + added).view(scores.shape)
    if sinks is not None:
        column = sinks.repeat(1, scores.shape[2] // sinks.shape[1])[None, :, :, None]
        scores = torch.cat([scores, column.expand(len(scores), -1, -1, -1)], -1)
    return scores.softmax(-1)[..., : keys.shape[2]] @ values.double()


@pytest.mark.parametrize("bent", [(None, False), (0.7, False), (None, True), (0.7, True)])
@pytest.mark.parametrize("queries", [1, 3, 9])
@pytest.mark.parametrize("sizes", [(3, 3), (1, 5, 2), (1,)])
def test_it_is_one_softmax_over_context_and_keys_with_its_gradient(sizes, queries: int, bent):
    context_of = np.repeat(np.arange(len(sizes)), sizes)
    n, share, width, length = len(context_of), 2, 2 * TILE, TILE
    q = random(0, n, 2, queries * share, 8)
    keys, values = random(1, n, 2, length, 8), random(2, n, 2, length, 5)
    shared = random(3, len(sizes), 2, width, 8), random(4, len(sizes), 2, width, 5)
    unseen = random(5, n, queries, width + length) < -0.5
    unseen[..., -1] = False
    hidden = hiding(unseen.numpy(), CPU)
    context = Context(*shared, context_groups(context_of, np.array(sizes), CPU))
    softcap, with_sinks = bent
    scoring = Scoring(softcap, random(7, 2, share) + 3 if with_sinks else None)
    out, *kept = attend(q, keys, values, context, hidden, scoring=scoring)

    leaves = [x.double().requires_grad_() for x in (q, keys, values, *shared)]
    chosen = torch.from_numpy(context_of)
    all_keys = torch.cat([leaves[3][chosen], leaves[1]], 2)
    all_values = torch.cat([leaves[4][chosen], leaves[2]], 2)
    sinks = None if scoring.sinks is None else scoring.sinks.double().requires_grad_()
    expected = reference(leaves[0], all_keys, all_values, hidden, softcap, sinks)
    torch.testing.assert_close(out.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    up = random(6, *out.shape)
    expected.backward(up.double())
    weights, total, largest = kept
    gradients = attend_backward(up, q, keys, values, context, weights, total, largest, scoring)
    *grads, of_sinks = gradients
    if sinks is not None:
        assert of_sinks is not None and sinks.grad is not None
        torch.testing.assert_close(of_sinks.double(), sinks.grad, atol=2e-5, rtol=1e-4)
    for found, leaf, power in zip(grads, leaves, (LOG2_E, LOG2_E, 1, LOG2_E, 1), strict=True):
        assert found is not None and leaf.grad is not None
        torch.testing.assert_close(found.double() / power, leaf.grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("scoring", [PLAIN, Scoring(0.7, torch.tensor([[0.5], [4.0]]))])
def test_no_bit_depends_on_sharing_width_padding_or_neighbours(scoring: Scoring):
    """Five sequences of one context: with the context's tiles shared or as keys of themselves, with
    tiles behind them that nobody sees, all together or one by one."""
    n, width, length, share = 5, 3 * TILE, TILE, 1
    q = random(0, n, 2, 7 * share, 16)
    keys, values = random(1, n, 2, length, 16), random(2, n, 2, length, 16)
    shared = random(3, 1, 2, width, 16), random(4, 1, 2, width, 16)
    causal = torch.arange(length)[None] > torch.arange(length - 7, length)[:, None]
    unseen = torch.cat([torch.zeros(7, width, dtype=torch.bool), causal], 1)[None]
    hidden = hiding(unseen.numpy(), CPU)

    def context(count: int) -> Context:
        owner = np.zeros(count, dtype=np.int64)
        return Context(*shared, context_groups(owner, np.array([count]), CPU))

    together, *_ = attend(q, keys, values, context(n), hidden, scoring=scoring)
    whole_keys = torch.cat([shared[0].expand(n, -1, -1, -1), keys], 2)
    whole_values = torch.cat([shared[1].expand(n, -1, -1, -1), values], 2)
    apart, *_ = attend(q, whole_keys, whole_values, None, hidden, scoring=scoring)
    assert torch.equal(together, apart)
    for i in range(n):
        one, *_ = attend(
            q[i : i + 1], keys[i : i + 1], values[i : i + 1], context(1), hidden, scoring=scoring
        )
        assert torch.equal(one[0], together[i])
    last, *_ = attend(
        q[:, :, -1:], whole_keys, whole_values, None, hidden[:, :, -1:], scoring=scoring
    )
    assert torch.equal(last[:, :, 0], together[:, :, -1])  # one query, as in decoding
    behind = hiding(np.ones((1, 7, 2 * TILE), dtype=bool), CPU)
    longer, *_ = attend(
        q,
        torch.cat([whole_keys, random(7, n, 2, 2 * TILE, 16)], 2),
        torch.cat([whole_values, random(8, n, 2, 2 * TILE, 16)], 2),
        None,
        torch.cat([hidden, behind], -1),
        scoring=scoring,
    )
    assert torch.equal(longer, apart)


def test_without_tiles_it_is_the_same_up_to_rounding():
    q, keys, values = random(0, 3, 2, 4, 8), random(1, 3, 2, 2 * TILE, 8), random(2, 3, 2, 64, 8)
    tiled, whole = (attend(q, keys, values, None, None, tile)[0] for tile in (TILE, None))
    torch.testing.assert_close(tiled, whole)
