"""A softmax that arrives in blocks against the whole one in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from gspo.kernels.running_softmax import RunningSoftmax

LOGITS = st.lists(st.floats(-300, 300, width=32) | st.just(-math.inf), min_size=1, max_size=9)


@given(LOGITS, st.lists(st.integers(1, 8), max_size=3), st.floats(0.25, 4, width=32))
def test_blocks_equal_the_whole(values, cuts, temperature):
    values = [*values, 1.0]  # one entry at least is not banned
    edges = [0, *sorted({cut for cut in cuts if cut < len(values)}), len(values)]
    softmax = RunningSoftmax(torch.tensor([temperature]))
    powers = torch.zeros(1, 0)
    for start, stop in pairwise(edges):
        block = torch.tensor([values[start:stop]])
        power, top, decay = softmax.add(slice(0, 1), block, first=start == 0)
        assert (decay is None) == (start == 0)
        powers = torch.cat([powers if decay is None else powers * decay[:, None], power], dim=1)
        assert torch.equal(top, softmax.max)

    whole = torch.tensor(values, dtype=torch.float64) / temperature
    p = whole.softmax(-1)
    entropy = -torch.xlogy(p, p).sum()
    logprobs = torch.cat([softmax.logprobs(torch.tensor([value])) for value in values])
    torch.testing.assert_close(logprobs.double(), whole.log_softmax(-1), atol=1e-6, rtol=3e-7)
    torch.testing.assert_close(softmax.entropy()[0].double(), entropy, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close((powers / softmax.total)[0].double(), p, atol=1e-6, rtol=1e-6)
