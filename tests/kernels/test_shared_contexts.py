"""Contexts that several sequences share."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from gspo.kernels.shared_contexts import context_groups

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_each_sequence_is_in_one_group_under_its_context(sizes: list[int], data):
    """Some have ended; padding at most doubles what the contexts had at first."""
    whole = np.repeat(np.arange(len(sizes)), sizes)
    left = data.draw(st.lists(st.booleans(), min_size=len(whole), max_size=len(whole)))
    context_of = whole[np.array(left)]
    groups = context_groups(context_of, np.array(sizes), CPU)
    found = []
    for group in groups:
        contexts = torch.arange(len(sizes))[group.contexts]
        assert max(sizes[c] for c in contexts) <= 2 * min(sizes[c] for c in contexts)
        members = group.members.flatten()
        places = torch.arange(len(members)) if group.places is None else group.places
        if group.listed is not None:
            assert torch.equal(members[places], group.listed)
        owner = contexts.repeat_interleave(group.members.shape[1])[places]
        assert context_of[members[places].numpy()].tolist() == owner.tolist()
        found += members[places].tolist()
    assert sorted(found) == list(range(len(context_of)))
