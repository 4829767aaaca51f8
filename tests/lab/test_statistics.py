"""Intervals over seeds, against scipy 1.17's numbers, and by how often they hold the truth."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from gspo.lab.experiment import bootstrap
from gspo.lab.statistics import (
    FEW,
    NO_DIFFERENCE,
    NO_INTERVAL,
    Interval,
    bootstrap_t_interval,
    paired_difference,
    t_interval,
    t_quantile,
    verdict,
)


@pytest.mark.parametrize(
    ("share", "freedom", "expected"),  # scipy.stats.t.ppf
    [
        (0.975, 1, 12.706204736174694),
        (0.975, 2, 4.302652729749462),
        (0.975, 4, 2.7764451051977934),
        (0.975, 9, 2.262157162798205),
        (0.995, 30, 2.7499956535672254),
        (0.025, 7, -2.3646242515927844),
        (0.9, 200, 1.2857987939948012),
    ],
)
def test_t_quantiles_are_scipys(share: float, freedom: int, expected: float):
    assert t_quantile(share, freedom) == pytest.approx(expected, rel=1e-9)


def test_quantiles_of_nothing_are_refused():
    for share, freedom in ((0.0, 3), (1.0, 3), (0.5, 0)):
        with pytest.raises(ValueError, match="must be in"):
            t_quantile(share, freedom)


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


def test_equal_differences_are_no_evidence_of_exactness():
    # Of 24 rollouts a reward is a multiple of 1/24, and two seeds may well differ alike.
    alike = paired_difference([0.3, 0.2], [0.2, 0.1])
    assert (alike.mean, alike.low, alike.high) == (0.1, None, None)
    same = paired_difference([0.3, 0.2], [0.3, 0.2])
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)
    assert verdict(same, "a", "b") == NO_DIFFERENCE


def test_many_seeds_are_bootstrapped():
    rng = random.Random(3)
    values = [round(rng.lognormvariate(0, 1), 3) for _ in range(FEW)]
    zeros = [0.0] * FEW
    assert paired_difference(values, zeros) == bootstrap_t_interval(values)
    assert paired_difference(values[1:], zeros[1:]) == t_interval(values[1:])


def test_equal_values_have_an_interval_of_no_width():
    assert bootstrap_t_interval([0.5] * 12) == Interval(0.5, 0.5, 0.5)
    assert verdict(Interval(0.0, 0.0, 0.0), "a", "b") == NO_DIFFERENCE


def test_the_studentized_bootstrap_leans_to_the_long_tail():
    skewed = [0.01, 0.02, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.12, 0.30, 0.02, 0.9]
    interval = bootstrap_t_interval(skewed)
    assert interval.low is not None and interval.high is not None
    assert interval.high - interval.mean > 2 * (interval.mean - interval.low)


def covered(make: Callable[[list[float]], tuple[float, float]], size: int, times: int) -> float:
    """How often the interval of `size` normal values holds their mean, 0."""
    rng = random.Random(size)
    held = 0
    for _ in range(times):
        low, high = make([rng.gauss(0, 1) for _ in range(size)])
        held += low <= 0 <= high
    return held / times


def ends(interval: Interval) -> tuple[float, float]:
    assert interval.low is not None and interval.high is not None
    return interval.low, interval.high


@pytest.mark.parametrize("size", [2, 5])
def test_the_t_interval_holds_the_mean_as_often_as_it_says(size: int):
    share = covered(lambda values: ends(t_interval(values)), size, 2000)
    assert abs(share - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_the_studentized_bootstrap_does_so_from_ten_on():
    share = covered(lambda values: ends(bootstrap_t_interval(values, draws=400)), FEW, 400)
    assert 0.91 < share < 0.99


def test_a_percentile_bootstrap_of_five_would_not():
    def percentile(values: list[float]) -> tuple[float, float]:
        estimate = bootstrap(values, 300)
        return estimate.low, estimate.high

    assert covered(percentile, 5, 500) < 0.90
