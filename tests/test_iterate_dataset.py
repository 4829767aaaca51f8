"""`gspo.utils.iterate_dataset`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gspo.core.errors import ConfigError, DataError
from gspo.utils import iterate_dataset


@given(size=st.integers(1, 20), per=st.integers(1, 8), epochs=st.integers(0, 3))
def test_each_epoch_has_each_item_once_and_steps_count_on(size: int, per: int, epochs: int):
    data = list(range(size))
    batches = list(iterate_dataset(data, groups_per_step=per, num_epochs=epochs))
    steps = -(-size // per)
    assert [b.step for b in batches] == list(range(steps * epochs))
    assert [(b.epoch, b.epoch_step) for b in batches] == [divmod(b.step, steps) for b in batches]
    for epoch in range(epochs):
        items = [item for b in batches if b.epoch == epoch for item in b.items]
        assert sorted(items) == data
    for first in range(len(batches) + 1):  # a resumed loop goes on with the same batches
        rest = iterate_dataset(data, per, epochs, initial_step=first)
        assert list(rest) == batches[first:]


def test_what_means_nothing_is_refused_at_once():
    with pytest.raises(DataError, match="empty dataset"):
        iterate_dataset([])
    with pytest.raises(ConfigError, match="groups_per_step = 0"):
        iterate_dataset([1], groups_per_step=0)
    with pytest.raises(ConfigError, match="'use_tqdm' is not supported"):
        iterate_dataset([1], use_tqdm=True)  # pyright: ignore[reportCallIssue]
