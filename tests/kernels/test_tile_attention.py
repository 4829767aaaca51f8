"""Attention in tiles: one softmax over context and keys, with bits that nothing beside changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gspo.kernels.shared_contexts import Context, context_groups
from gspo.kernels.tile_attention import LOG2_E, PLAIN, TILE, Scoring, attend
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


class Case:
    """Sequences of random numbers that share contexts, and what their attention is, in float64.

    Args:
        sizes: sequences of each context.
        bent: a soft cap, and whether there are sinks.
        depth: E, the depth of the values; keys have 8.
        large: the mask is a boolean one.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        queries: int,
        bent: tuple[float | None, bool] = (None, False),
        depth: int = 5,
        large: bool = False,
    ):
        self.context_of = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
        n, share, width, length = sum(sizes), 2, 2 * TILE, TILE
        self.query = random(0, n, 2, queries * share, 8)
        self.own = (random(1, n, 2, length, 8), random(2, n, 2, length, depth))
        shared = random(3, len(sizes), 2, width, 8), random(4, len(sizes), 2, width, depth)
        unseen = random(5, n, queries, width + length) < -0.5
        unseen[..., -1] = False
        added = hiding(unseen.numpy(), CPU)
        self.hidden = added < 0 if large else added
        groups = context_groups(self.context_of.numpy(), np.array(sizes), CPU)
        self.context = Context(*shared, groups)
        softcap, with_sinks = bent
        self.scoring = Scoring(softcap, random(7, 2, share) + 3 if with_sinks else None)

        self.leaves = [x.double().requires_grad_() for x in (self.query, *self.own, *shared)]
        q, keys, values, *contexts = self.leaves
        every_key, every_value = (
            torch.cat([context[self.context_of], own], 2)
            for context, own in zip(contexts, (keys, values), strict=True)
        )
        self.sinks = None
        if self.scoring.sinks is not None:
            self.sinks = self.scoring.sinks.double().requires_grad_()
        self.expected = reference(q, every_key, every_value, added, softcap, self.sinks)


BENT = [(None, False), (0.7, False), (None, True), (0.7, True)]


@pytest.mark.parametrize("bent", BENT)
@pytest.mark.parametrize("queries", [1, 3, 9])
@pytest.mark.parametrize("sizes", [(3, 3), (1, 5, 2), (1,)])
def test_it_is_one_softmax_over_context_and_keys(sizes, queries: int, bent):
    case = Case(sizes, queries, bent)
    out, log_total = attend(case.query, *case.own, case.context, case.hidden, scoring=case.scoring)
    torch.testing.assert_close(out.double(), case.expected.detach(), atol=1e-5, rtol=1e-5)
    assert log_total.shape == (*out.shape[:3], 1)


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
