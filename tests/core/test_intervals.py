"""Intervals of shares and of held-out rewards, by how often they hold the truth."""

from __future__ import annotations

import math
import random

import pytest
from intervals import MEANS, coverage

from gspo.core.intervals import Interval, reward_interval, share_interval
from gspo.lab.statistics import t_interval


def ends(interval: Interval) -> tuple[float, float]:
    assert interval.low is not None and interval.high is not None
    return interval.low, interval.high


@pytest.mark.parametrize(("count", "trials"), [(0, 5), (4, 5), (5, 5), (30, 100)])
def test_share_intervals_are_clopper_and_pearsons(count: int, trials: int):
    def at_least(least: int, p: float) -> float:
        terms = (math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(trials + 1))
        return math.fsum(list(terms)[least:])

    low, high = ends(share_interval(count, trials))
    # As many or more come of the lower end in 2.5 % of the cases, as few or fewer of the upper one.
    assert low == 0 if count == 0 else at_least(count, low) == pytest.approx(0.025)
    assert high == 1 if count == trials else 1 - at_least(count + 1, high) == pytest.approx(0.025)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("prompts", [4, 16, 64, 256])
def test_held_out_intervals_hold_the_mean(mean: float, prompts: int):
    for alike in (0.05, 0.5):
        share, width = coverage(mean, prompts, alike, times=60)
        # 95 %, less 3 standard errors of 60 draws. The percentile bootstrap of before: from 21 %.
        assert share > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 60)
        if (mean, prompts) == (0.3, 256):  # and not by being wide: 4 standard errors
            error = math.sqrt(0.3 * 0.7 / 256 * (alike + (1 - alike) / 4))
            assert 3.8 < width / error < 4.2


def test_rewards_without_variety_leave_room_on_their_other_side():
    assert ends(reward_interval([[0.0] * 4] * 64)) == pytest.approx((0, 1 - 0.025 ** (1 / 64)))
    assert ends(reward_interval([[1.0] * 4] * 64)) == pytest.approx((0.025 ** (1 / 64), 1))
    low, high = ends(reward_interval([[0.5] * 4] * 64))
    assert low < 0.4 and high > 0.6
    low, high = ends(reward_interval([[1.0, 0.0]]))  # one prompt says next to nothing
    assert low < 0.02 and high > 0.98


def test_rewards_outside_of_shares_get_students_interval():
    expected = t_interval([-1.0, 0.5, 2.0])
    assert ends(reward_interval([[-1.0], [0.5], [2.0]])) == pytest.approx(ends(expected))
    for alone in ([[-1.0] * 4] * 64, [[-1.0, 2.0]]):
        found = reward_interval(alone)
        assert (found.low, found.high, str(found)) == (None, None, f"{found.mean:.3f}")


def test_a_prompt_that_is_drawn_more_often_weighs_more_and_counts_once():
    rewards = [[0.0] * 4, [1.0] * 12, [1.0, 0.0] * 2]
    assert reward_interval(rewards).mean == pytest.approx(14 / 20)
    often = [of_prompt * 50 for of_prompt in rewards]
    # More rollouts of 3 prompts are no more prompts: at most the rollouts' own noise goes.
    assert ends(reward_interval(often)) == pytest.approx(ends(reward_interval(rewards)), abs=1e-9)


def test_narrow_rewards_have_a_narrow_interval():
    rng = random.Random(0)
    rewards = [[0.5 + 1e-5 * rng.random()] for _ in range(64)]
    expected = t_interval([reward for (reward,) in rewards])
    assert ends(reward_interval(rewards)) == pytest.approx(ends(expected), abs=1e-9)


def test_rewards_that_round_to_a_bound_have_an_interval():
    almost = reward_interval([[0.9999999999999998], *[[1.0]] * 7])
    exactly = reward_interval([[1.0]] * 8)
    assert (almost.low, almost.high) == pytest.approx((exactly.low, exactly.high))
    tiny = reward_interval([[5e-324], *[[0.0]] * 7])
    assert tiny.low == 0.0 and tiny.high is not None and tiny.high > 0.3
