"""Which keys completions see, against who sees whom in a text."""

from __future__ import annotations

import numpy as np
import pytest

from gspo.kernels.tile_attention import TILE
from gspo.kernels.unseen import unseen


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("lengths", [(70, 33, 3), (64, 64), (96,)])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_query_sees_its_window_of_its_own_text(lengths, queries: int, window: int | None):
    lengths = np.array(lengths)
    base = lengths // TILE * TILE
    width = int(base.max())
    at = lengths[:, None] + 2 + np.arange(queries)
    (first, column, columns), hidden = unseen(at, base, width, window)
    assert first % TILE == column % TILE == columns % TILE == 0
    kept = width - first + columns - column
    mask = np.zeros((len(lengths), queries, kept), dtype=bool)
    if hidden is not None:
        mask[..., kept - hidden.shape[2] :] = hidden
    for i, begin in enumerate(base):
        prompt = [p if p < begin else None for p in range(first, width)]
        places = [*prompt, *range(begin + column, begin + columns)]
        for q, position in enumerate(at[i]):
            oldest = 0 if window is None else max(0, position - window + 1)
            seen = [p for p, away in zip(places, mask[i, q], strict=True) if not away]
            assert seen == list(range(oldest, position + 1))
