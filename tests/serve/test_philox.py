"""The streams of random numbers are numpy's, whatever else is drawn."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo.serve.philox import RandomStreams, philox

DEVICE = torch.device("cpu")
WORDS = st.integers(0, 2**64 - 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS, st.integers(0, 99)), max_size=9), st.integers(0, 70))
def test_the_numbers_are_numpys_to_the_bit(streams: list[tuple[int, int, int]], count: int):
    keys = np.array([key for *key, _ in streams], dtype=np.uint64).reshape(-1, 2)
    first = np.array([start for *_, start in streams], dtype=np.uint64)
    numbers = philox(keys.T, first, count)
    assert numbers.shape == (count, len(streams)) and numbers.dtype == np.uint64
    for key, start, column in zip(keys, first, numbers.T, strict=True):
        expected = np.random.Philox(key=key).random_raw(int(start) + count)[int(start) :]
        assert np.array_equal(column, expected)


def test_carries_between_the_halves_of_a_product():
    for word in (2**64 - 1, 2**63, 2**32 - 1, 2**32):
        keys = np.full((2, 1), word, dtype=np.uint64)
        expected = np.random.Philox(key=keys[:, 0]).random_raw(4000)
        assert np.array_equal(philox(keys, np.zeros(1, dtype=np.uint64), 4000)[:, 0], expected)


def streams_of(keys: list[tuple[int, int]]) -> RandomStreams:
    streams = RandomStreams(DEVICE)
    streams.add(keys)
    return streams


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 40), st.just("add"), st.just("keep")), max_size=12))
def test_a_stream_goes_on_whoever_comes_and_goes(events: list[int | str]):
    """Each draw is the next number of `Generator.random`, rounded to float32."""
    streams, keys, drawn = streams_of([(7, 3)]), [(7, 3)], [0]
    expected = {}
    for event in events:
        if event == "add":
            new = [(len(keys), -1), (2**70 + 5, len(keys))]
            streams.add(new)
            keys, drawn = keys + new, [*drawn, 0, 0]
        elif event == "keep":
            streams.keep(torch.arange(0, len(keys), 2))
            keys, drawn = keys[::2], drawn[::2]
        else:
            assert isinstance(event, int)
            for _ in range(event):
                got = streams.draw()
                for i, key in enumerate(keys):
                    if key not in expected:
                        words = np.array([word % 2**64 for word in key], dtype=np.uint64)
                        generator = np.random.Generator(np.random.Philox(key=words))
                        expected[key] = generator.random(500).astype(np.float32)
                    assert got[i].item() == expected[key][drawn[i]]
                    drawn[i] += 1


def test_negative_and_large_seeds_have_streams_of_their_own():
    numbers = streams_of([(0, 0), (-1, 0), (0, -1), (2**63, 0), (2**63 - 1, 5)]).draw()
    assert len(set(numbers.tolist())) == 5


def test_no_number_rounds_up_to_one():
    numbers = streams_of([(0, i) for i in range(64)])
    assert max(numbers.draw().max().item() for _ in range(64)) <= 1 - 2**-23
