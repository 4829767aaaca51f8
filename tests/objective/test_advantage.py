"""Group advantages against a loop over Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from gspo.objective import group_advantages, turn_advantages

REWARDS = st.floats(-100, 100, allow_subnormal=False).map(lambda x: round(x, 3))
GROUPS = st.lists(st.tuples(REWARDS, st.integers(0, 4)), min_size=1, max_size=40)


def advantages(rewards: list[float], groups: list[int], scale: bool = True) -> list[float]:
    return group_advantages(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), scale=scale
    ).tolist()


def loop(rewards: list[float], groups: list[int], scale: bool) -> list[float]:
    out = []
    for reward, group in zip(rewards, groups, strict=True):
        own = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        mean = math.fsum(own) / len(own)
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in own) / len(own))
        if len(set(own)) == 1:
            out.append(0.0)
        else:
            out.append((reward - mean) / (std if scale else 1.0))
    return out


@given(pairs=GROUPS, scale=st.booleans())
def test_equal_to_the_loop(pairs: list[tuple[float, int]], scale: bool) -> None:
    rewards, groups = map(list, zip(*pairs, strict=True))
    expected = loop(rewards, groups, scale)
    assert advantages(rewards, groups, scale) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(pairs=GROUPS)
def test_group_numbers_are_labels_only(pairs: list[tuple[float, int]]) -> None:
    rewards, groups = map(list, zip(*pairs, strict=True))
    renamed = [[7, -3, 2**50, 0, 55][group] for group in groups]
    assert advantages(rewards, renamed) == pytest.approx(advantages(rewards, groups))


@given(pairs=GROUPS, factor=st.floats(0.01, 100), shift=st.floats(-1000, 1000))
def test_unchanged_by_positive_scale_and_shift(
    pairs: list[tuple[float, int]], factor: float, shift: float
) -> None:
    rewards, groups = map(list, zip(*pairs, strict=True))
    # Below this a shift of 1000 rounds the difference away.
    assume(all(a == b or abs(a - b) > 0.01 for a in rewards for b in rewards))
    moved = [factor * reward + shift for reward in rewards]
    assert advantages(moved, groups) == pytest.approx(
        advantages(rewards, groups), rel=1e-6, abs=1e-6
    )


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize(
    "rewards",
    [
        [0.0, 0.0],
        [1.0, 1.0, 1.0],
        [0.1 + 0.2, 0.3],
        [-0.3, -(0.1 + 0.2), -0.3],
        [1e9 / 3] * 7,
        [1e-12 / 3] * 7,
        [5.0],
    ],
)
def test_equal_rewards_give_exactly_zero(rewards: list[float], scale: bool) -> None:
    assert advantages(rewards, [3] * len(rewards), scale) == [0.0] * len(rewards)


def test_small_but_real_differences_are_a_signal() -> None:
    assert advantages([1.0, 1.0 + 1e-6], [0, 0]) == pytest.approx([-1.0, 1.0], abs=1e-6)
    assert advantages([0.0, 1e-12], [0, 0]) == pytest.approx([-1.0, 1.0])


def test_the_standard_deviation_is_the_populations() -> None:
    assert advantages([1.0, 0.0, 0.0, 0.0], [0] * 4) == pytest.approx(
        [math.sqrt(3), *[-1 / math.sqrt(3)] * 3]
    )


@pytest.mark.parametrize("size", [1e200, 1e-200, 1.7e308, 5e-324, -1e200])
def test_no_size_of_a_reward_overflows_or_vanishes(size: float) -> None:
    """Squares of these do. They are no equal rewards, and leave the other group as it is."""
    mixed = advantages([size, 0.0, 0.0, 0.0, 1.0, 3.0], [0, 0, 0, 0, 1, 1])
    sign = math.copysign(1, size)
    expected = [sign * math.sqrt(3), *[-sign / math.sqrt(3)] * 3]
    assert mixed == pytest.approx([*expected, -1.0, 1.0], rel=1e-12)


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_centred_rewards_keep_their_size(size: float) -> None:
    assert advantages([size, 0.0], [0, 0], scale=False) == [size / 2, -size / 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        advantages([0.0, bad, 1.0], [0, 1, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_the_dtype_and_takes_no_rewards(dtype: torch.dtype) -> None:
    none = torch.zeros(0, dtype=torch.long)
    result: Tensor = group_advantages(torch.zeros(0, dtype=dtype), none)
    assert result.shape == (0,)
    assert result.dtype == dtype
    some = group_advantages(torch.tensor([1.0, 0.0], dtype=dtype), torch.tensor([0, 0]))
    assert some.dtype == dtype


def test_turn_advantages_compare_turns_of_one_number_and_discount_later_rewards():
    """By hand: returns 1 + 0.5 * 2 = 2, 2 and 0; 4 alone in its place; groups apart."""
    groups, outcomes = torch.tensor([0, 0, 1]), torch.tensor([0.25, -0.25, 3.0])
    rewards = [[1.0, 2.0], [0.0], [4.0, 4.0]]
    found = turn_advantages("group_std", rewards, groups, outcomes, weight=2.0, discount=0.5)
    assert found == [[2.25, 0.25], [-2.25], [3.0, 3.0]]
    centred = turn_advantages("group_mean", rewards, groups, outcomes, weight=2.0, discount=0.5)
    assert centred == [[2.25, 0.25], [-2.25], [3.0, 3.0]]
    plain = turn_advantages("reward", rewards, groups, outcomes, weight=1.0, discount=0.5)
    assert plain == [[2.25, 2.25], [-0.25], [9.0, 7.0]]
    assert turn_advantages("group_std", [[], []], groups[:2], outcomes[:2], 1.0, 0.9) == [[], []]
