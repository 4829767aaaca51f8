"""Attention of one new token per completion, against the whole softmax of each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gspo.kernels.decode_attention import decode_attention, prompt_groups

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_each_completion_is_in_one_group_under_its_prompt(sizes: list[int], data):
    """Some have ended; padding at most doubles what the prompts had at first."""
    whole = np.repeat(np.arange(len(sizes)), sizes)
    left = data.draw(st.lists(st.booleans(), min_size=len(whole), max_size=len(whole)))
    prompt_of = whole[np.array(left)]
    groups = prompt_groups(prompt_of, np.array(sizes), CPU)
    found = []
    for group in groups:
        prompts = torch.arange(len(sizes))[group.prompts]
        assert max(sizes[p] for p in prompts) <= 2 * min(sizes[p] for p in prompts)
        completions = group.completions.flatten()
        places = torch.arange(len(completions)) if group.places is None else group.places
        if group.listed is not None:
            assert torch.equal(completions[places], group.listed)
        owner = prompts.repeat_interleave(group.completions.shape[1])[places]
        assert prompt_of[completions[places].numpy()].tolist() == owner.tolist()
        found += completions[places].tolist()
    assert sorted(found) == list(range(len(prompt_of)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [(3, 3), (1, 5, 2), (1,)])
def test_it_is_one_softmax_over_prompt_and_completion(sizes: tuple[int, ...], masked: bool):
    generator = torch.Generator().manual_seed(0)
    prompt_of = np.repeat(np.arange(len(sizes)), sizes)
    count, width, columns = len(prompt_of), 6, 4

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    query = random(count, 4, 1, 8)
    key, value = random(count, 2, columns, 8), random(count, 2, columns, 5)
    prompt_key, prompt_value = random(len(sizes), 2, width, 8), random(len(sizes), 2, width, 5)
    hidden = torch.rand(count, 1, 1, width + columns, generator=generator) < 0.4 if masked else None
    if hidden is not None:
        hidden[..., -1] = False
    groups = prompt_groups(prompt_of, np.array(sizes), CPU)
    out = decode_attention(query, key, value, prompt_key, prompt_value, groups, hidden, None)

    keys = torch.cat([prompt_key[prompt_of], key], dim=2).repeat_interleave(2, dim=1)
    values = torch.cat([prompt_value[prompt_of], value], dim=2).repeat_interleave(2, dim=1)
    scores = query @ keys.mT / 8**0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    torch.testing.assert_close(out, expected)
