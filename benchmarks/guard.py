"""The regression guard: measured ratios against the committed ones.

Ratios and not seconds, because both sides ran on the same machine at the same time. A row may be
below the committed ratio by its tolerance: the noise of both measurements, each taken as half of
its relative spread and added in squares; at least 10 %, and at most 50 %. A row of a single pair
has no spread of its own and counts as 10 % noise. Peak memory, where it was measured, may grow by
10 % relative to the other side's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness import Result

LEAST, MOST, SINGLE, MEMORY = 0.10, 0.50, 0.10, 0.10


def noise(row: Result) -> float:
    """Half of the spread, relative to the ratio."""
    if row.repeats < 2:
        return SINGLE
    low, high = row.spread
    return (high - low) / 2 / row.ratio


def tolerance(committed: Result, measured: Result) -> float:
    """By which share of the committed ratio the measured one may be lower."""
    return min(MOST, max(LEAST, math.hypot(noise(committed), noise(measured))))


def regressions(committed: Sequence[Result], measured: Sequence[Result]) -> list[str]:
    """One line for each row that got worse. Rows that are on one side only are not compared."""
    known = {row.key: row for row in committed}
    return [line for row in measured if row.key in known for line in _compare(known[row.key], row)]


def _compare(committed: Result, measured: Result) -> list[str]:
    lines = []
    allowed = tolerance(committed, measured)
    if measured.ratio < committed.ratio * (1 - allowed):
        lines.append(
            f"{measured.name}, {measured.what}: ratio {measured.ratio:.2f}, committed "
            f"{committed.ratio:.2f}: {1 - measured.ratio / committed.ratio:.1%} lower, "
            f"{allowed:.1%} allowed"
        )
    before, now = committed.memory_share, measured.memory_share
    if before is not None and now is not None and now > before * (1 + MEMORY):
        lines.append(
            f"{measured.name}, {measured.what}: peak memory {now:.2f} of the other's, committed "
            f"{before:.2f}: {now / before - 1:.0%} higher, {MEMORY:.0%} allowed"
        )
    return lines
