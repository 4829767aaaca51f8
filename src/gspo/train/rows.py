"""How the samples of a minibatch are split into rows: by memory, and evenly among the workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from gspo.core.timing import timed
from gspo.data.packing import PackedBatch, Packer
from gspo.data.sample import Sample
from gspo.policy.policy import Policy

LEAST = 768
"""Tokens below which a row is not split for a second worker: threads that each call many small
operations wait for one another (measured: two rows of 518 tokens take 1.2 x one of 1,036, two of
996 take 0.64 x one of 1,992)."""
_GROWTH = 1.2  # from one size of rows that is tried to the next

Plan = list[tuple[list[int], int]]
"""As `Packer.plan` gives it: of each row its trajectories and its tokens."""


@timed("packing")
def rows_of(
    policy: Policy,
    samples: Sequence[Sample],
    budget: int,
    unit: Literal["trajectory", "turn"] = "trajectory",
    *,
    share: bool = False,
    routed: bool = False,
) -> list[PackedBatch]:
    """`pack`, with about as many tokens for each of the policy's workers."""
    packer = Packer(samples, share=share, routed=routed)
    plan = packer.plan(budget)
    if policy.workers.count > 1:
        plan = _evened(packer, plan, budget, policy.workers.count)
    return [packer.row(members, unit) for members, _ in plan]


def _evened(packer: Packer, plan: Plan, budget: int, workers: int) -> Plan:
    """The plan, or one of smaller rows by which the workers end sooner.

    Where prefixes are shared, rows that are cut in two both hold what they have in common: a group
    of 16 x 64 tokens behind 1,024 makes a row of 2,048, or two of 1,536, or sixteen of 1,088.
    """
    tokens = sum(size for _, size in plan)
    turns = math.ceil(len(plan) / workers)
    if len(plan) == turns * workers or tokens < LEAST * workers:
        return plan
    best, largest = plan, max(size for _, size in plan)
    limit = 1.05 * tokens / (turns * workers)
    while limit < min(budget, largest):
        best = min(best, packer.plan(math.ceil(limit)), key=lambda own: _span(own, workers))
        if _span(best, workers) * workers <= 1.05 * tokens:
            break  # nothing is computed twice, and nobody waits
        limit *= _GROWTH
    return sorted(best, key=lambda row: -row[1])


def _span(plan: Plan, workers: int) -> int:
    """Tokens one after the other, where each turn of the workers lasts as long as its largest row.

    >>> _span([([0], 5), ([1], 2), ([2], 4)], workers=2)
    7
    """
    return sum(sorted((size for _, size in plan), reverse=True)[::workers])
