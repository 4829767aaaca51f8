"""Which items share a microbatch: as few microbatches as best-fit makes, and as even."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence


def plan_microbatches(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Which items share a microbatch of at most `budget` tokens. A larger item gets one to itself.

    Best-fit (largest first, each into the fullest microbatch that still has room) says how many
    there are; if the items also fit into that many when spread evenly, they are. Indices inside a
    microbatch ascend.

    >>> plan_microbatches([6, 3, 5, 2], budget=8)
    [[0, 3], [1, 2]]
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    fitted = _best_fit(sizes, order, budget)
    even = _spread_evenly(sizes, order, budget, len(fitted))
    return sorted(sorted(items) for items in even or fitted)


def _best_fit(sizes: Sequence[int], order: Sequence[int], budget: int) -> list[list[int]]:
    microbatches: list[list[int]] = []
    # Microbatches that have room, the fullest first: their free tokens, when they last changed (of
    # equally full ones the latest is taken), and their number.
    rooms: list[tuple[int, int, int]] = []
    for turn, item in enumerate(order):
        size = sizes[item]
        place = bisect.bisect_left(rooms, (size,))
        if place < len(rooms):
            room, _, number = rooms.pop(place)
        else:
            room, number = max(budget, size), len(microbatches)
            microbatches.append([])
        microbatches[number].append(item)
        if room - size >= sizes[order[-1]]:  # else not even the smallest item fits
            bisect.insort(rooms, (room - size, -turn, number))
    return microbatches


def _spread_evenly(
    sizes: Sequence[int], order: Sequence[int], budget: int, count: int
) -> list[list[int]] | None:
    """Largest first, each item into the emptiest of `count` microbatches; None if one overflows."""
    microbatches: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for item in order:
        load, number = loads[0]
        if load and load + sizes[item] > budget:
            return None
        microbatches[number].append(item)
        heapq.heapreplace(loads, (load + sizes[item], number))
    return microbatches
