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
    smallest = sizes[order[-1]] if order else 0
    # Microbatches by their free tokens, the last one that changed first. A list of all of them,
    # sorted, is slower: it is as long as there are microbatches, and this one as the budget.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys, ascending
    for item in order:
        size = sizes[item]
        tightest = bisect.bisect_left(rooms, size)
        if tightest < len(rooms):
            room = rooms[tightest]
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[tightest]
        else:
            room, number = max(budget, size), len(microbatches)
            microbatches.append([])
        microbatches[number].append(item)
        room -= size
        if room < smallest:  # nothing fits any more
            continue
        if room not in by_room:
            bisect.insort(rooms, room)
            by_room[room] = []
        by_room[room].append(number)
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
