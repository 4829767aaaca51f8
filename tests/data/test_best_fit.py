"""Items are dealt to as few and as even microbatches as best-fit makes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gspo.data.best_fit import plan_microbatches

SIZES = st.lists(st.integers(1, 40), max_size=40)
BUDGETS = st.integers(1, 60)


@given(sizes=SIZES, budget=BUDGETS)
def test_every_item_is_in_one_microbatch_within_the_budget(sizes: list[int], budget: int) -> None:
    microbatches = plan_microbatches(sizes, budget)
    assert sorted(itertools.chain(*microbatches)) == list(range(len(sizes)))
    for items in microbatches:
        assert items == sorted(items)
        assert len(items) == 1 or sum(sizes[item] for item in items) <= budget
    assert microbatches == plan_microbatches(sizes, budget)


def best_fit(sizes: list[int], budget: int) -> list[int]:
    """Loads of the microbatches, the slow way."""
    loads: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, load in enumerate(loads) if load + size <= budget]
        if fitting:
            loads[max(fitting, key=loads.__getitem__)] += size
        else:
            loads.append(size)
    return loads


@given(sizes=SIZES, budget=BUDGETS)
def test_they_are_as_few_as_best_fit_makes_and_never_fuller(sizes: list[int], budget: int) -> None:
    loads = [sum(sizes[item] for item in items) for items in plan_microbatches(sizes, budget)]
    expected = best_fit(sizes, budget)
    assert len(loads) == len(expected)
    assert max(loads, default=0) <= max(expected, default=0)
    assert 2 * sum(loads) > (len(loads) - 1) * budget or len(loads) < 2


@given(sizes=SIZES)
def test_they_are_even_if_there_is_room(sizes: list[int]) -> None:
    budget = 4 * max(sizes, default=1)
    loads = [sum(sizes[item] for item in items) for items in plan_microbatches(sizes, budget)]
    if sum(sizes) < (len(loads) - 0.5) * budget * 3 / 4:
        assert max(loads, default=0) - min(loads, default=0) <= max(sizes, default=0)


@pytest.mark.parametrize(
    ("sizes", "budget", "microbatches"),
    [
        ([], 8, []),
        ([6, 3, 5, 2], 8, [[0, 3], [1, 2]]),
        ([2, 5, 6, 3], 8, [[0, 2], [1, 3]]),  # largest first
        ([9, 1, 1], 8, [[0], [1, 2]]),
        ([4, 4, 4], 8, [[0, 2], [1]]),
        ([8, 8], 8, [[0], [1]]),
        ([5, 6, 2], 8, [[0, 2], [1]]),  # evenly
        ([3, 3, 2, 2, 2], 6, [[0, 1], [2, 3, 4]]),  # evenly, the last wouldn't fit: best-fit
        ([5, 6, 2, 3], 9, [[0, 3], [1, 2]]),
    ],
)
def test_plans_by_hand(sizes: list[int], budget: int, microbatches: list[list[int]]) -> None:
    assert plan_microbatches(sizes, budget) == microbatches
