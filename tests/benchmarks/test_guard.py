"""A slowed ratio fails, noise passes."""

from __future__ import annotations

import random

import pytest
from guard import regressions, tolerance
from harness import Pairs, Result

from benchmarks.rows import row


def measured(ratio: float, noise: float, rng: random.Random, repeats: int = 5) -> Result:
    """A measurement of a true ratio, each time with log-normal noise."""
    ours = tuple(rng.lognormvariate(0, noise) for _ in range(repeats))
    other = tuple(ratio * rng.lognormvariate(0, noise) for _ in range(repeats))
    fields = Pairs(ours, other).fields()
    return row(**fields)


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05, 0.1])
def test_noise_passes(noise: float) -> None:
    rng = random.Random(0)
    trials = 300
    failed = sum(
        bool(regressions([measured(3.0, noise, rng)], [measured(3.0, noise, rng)]))
        for _ in range(trials)
    )
    assert failed <= 0.03 * trials


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
def test_half_the_ratio_fails(noise: float) -> None:
    rng = random.Random(1)
    for _ in range(100):
        lines = regressions([measured(3.0, noise, rng)], [measured(1.5, noise, rng)])
        assert len(lines) == 1
        assert lines[0].startswith("speed, a case: ratio 1.")


def test_seconds_do_not_matter() -> None:
    slower_machine = row(2.0, ours_s=50.0, other_s=100.0)
    assert regressions([row(2.0)], [slower_machine]) == []


def test_the_tolerance_is_between_its_bounds() -> None:
    assert tolerance(row(2.0, 0.0), row(2.0, 0.0)) == 0.10
    assert tolerance(row(2.0, 0.3), row(2.0, 0.4)) == pytest.approx(0.25)
    assert tolerance(row(2.0, 1.9), row(2.0, 1.9)) == 0.50
    # A single pair knows no spread: it counts as 10 % noise.
    assert tolerance(row(2.0, 0.0, repeats=1), row(2.0, 0.0)) == 0.10


def test_just_inside_and_just_outside() -> None:
    committed = row(2.0, 0.0)
    assert regressions([committed], [row(1.81, 0.0)]) == []
    line = regressions([committed], [row(1.79, 0.0)])[0]
    assert line == "speed, a case: ratio 1.79, committed 2.00: 10.5% lower, 10.0% allowed"


def test_memory_is_guarded_relative_to_the_other_side() -> None:
    committed = row(ours_mb=500.0, other_mb=600.0)
    assert regressions([committed], [row(ours_mb=1000.0, other_mb=1200.0)]) == []
    assert (
        "peak memory 1.00 of the other's, committed 0.83"
        in regressions([committed], [row(ours_mb=600.0, other_mb=600.0)])[0]
    )


def test_rows_on_one_side_only_are_not_compared() -> None:
    assert regressions([row(5.0, what="old")], [row(1.0, what="new")]) == []
