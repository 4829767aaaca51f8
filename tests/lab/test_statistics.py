"""Intervals over seeds, against scipy 1.17's numbers, and by how often they hold the truth."""

from __future__ import annotations

import math
import random
from statistics import fmean, stdev

import pytest
from intervals import LAWS, SIZES, false_alarms

from gspo.experiment.heldout import Interval
from gspo.lab.statistics import (
    NO_DIFFERENCE,
    NO_INTERVAL,
    holm,
    p_value,
    paired_difference,
    t_interval,
    verdict,
)


def test_t_interval_is_scipys():
    # scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    interval = t_interval([0.41, 0.52, 0.39, 0.61, 0.47])
    assert interval.mean == pytest.approx(0.48)
    assert interval.low == pytest.approx(0.3696384898298354)
    assert interval.high == pytest.approx(0.5903615101701644)


def test_paired_difference_of_few_is_scipys():
    # scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    a, b = [0.62, 0.55, 0.71, 0.60], [0.58, 0.57, 0.60, 0.51]
    difference = paired_difference(a, b)
    assert difference.mean == pytest.approx(0.055)
    assert difference.low == pytest.approx(-0.037327515449413554)
    assert difference.high == pytest.approx(0.14732751544941358)
    assert verdict(difference, "a", "b") == NO_DIFFERENCE


def test_pairing_shows_what_the_spread_of_seeds_would_hide():
    a = [0.3, 0.5, 0.7, 0.9]
    b = [value - 0.05 - 0.001 * i for i, value in enumerate(a)]
    assert verdict(paired_difference(a, b), "a", "b") == "a higher"
    assert verdict(paired_difference(b, a), "b", "a") == "a higher"
    apart = t_interval(a).high, t_interval(b).low
    assert apart[0] is not None and apart[1] is not None and apart[1] < apart[0]


def test_one_seed_has_no_interval():
    alone = paired_difference([0.5], [0.2])
    assert (alone.mean, alone.low, alone.high) == (0.3, None, None)
    assert verdict(alone, "a", "b") == NO_INTERVAL
    assert str(alone) == "0.300"


def test_equal_values_are_no_evidence_of_exactness():
    # Of 24 rollouts a reward is a multiple of 1/24, and two seeds may well differ alike.
    alike = paired_difference([0.3, 0.2], [0.2, 0.1])
    assert (alike.mean, alike.low, alike.high) == (0.1, None, None)
    same = paired_difference([1.0] * 12, [1.0] * 12)
    assert (same.mean, same.low, same.high) == (0.0, None, None)
    assert verdict(same, "a", "b") == NO_INTERVAL
    assert p_value([1.0] * 12, [1.0] * 12) is None
    assert t_interval([0.5] * 12) == Interval(0.5, None, None)


def test_a_few_seeds_off_the_floor_show_nothing():
    # The exact sign-flip test says 0.25.
    a, b = [0.0] * 7 + [0.4, 0.1, 0.1], [0.0] * 10
    assert verdict(paired_difference(a, b), "a", "b") == NO_DIFFERENCE
    assert p_value(a, b) == pytest.approx(0.17, abs=0.005)


def mean_over_error(values: list[float]) -> float:
    return fmean(values) / stdev(values) * math.sqrt(len(values))


def test_p_values_are_the_tails_of_t():
    a, b = [0.62, 0.55, 0.71, 0.60], [0.58, 0.57, 0.60, 0.51]
    x = mean_over_error([0.04, -0.02, 0.11, 0.09]) / math.sqrt(3)
    # Of 3 degrees of freedom, in closed form.
    assert p_value(a, b) == pytest.approx(1 - 2 / math.pi * (x / (1 + x * x) + math.atan(x)))
    # The interval leaves out 0 where the p-value is below 0.05.
    rng = random.Random(2)
    for _ in range(40):
        a, b = ([rng.gauss(mean, 1) for _ in range(5)] for mean in (1.5, 0.0))
        assert (verdict(paired_difference(a, b), "a", "b") != NO_DIFFERENCE) is (
            (p_value(a, b) or 1) < 0.05
        )


def test_holm_keeps_order_and_never_exceeds_one():
    assert holm([]) == []
    assert holm([0.04]) == [0.04]
    assert holm([0.5, 0.001, 0.9, 0.02]) == pytest.approx([1.0, 0.004, 1.0, 0.06])


@pytest.mark.parametrize("seeds", SIZES)
@pytest.mark.parametrize("law", LAWS)
def test_arms_of_one_law_are_called_different_in_one_of_twenty_at_most(law: str, seeds: int):
    times = 600
    # 5 %, and 3.5 standard errors of 600 draws. The bootstrap of before had 0.098 to 0.142.
    assert false_alarms(LAWS[law], seeds, times) < 0.05 + 3.5 * math.sqrt(0.05 * 0.95 / times)


def ends(interval: Interval) -> tuple[float, float]:
    assert interval.low is not None and interval.high is not None
    return interval.low, interval.high


@pytest.mark.parametrize("size", [2, 5])
def test_the_t_interval_holds_the_mean_as_often_as_it_says(size: int):
    rng = random.Random(size)
    held = 0
    for _ in range(2000):
        low, high = ends(t_interval([rng.gauss(0, 1) for _ in range(size)]))
        held += low <= 0 <= high
    assert abs(held / 2000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)
