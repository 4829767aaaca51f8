"""How the samples of a minibatch are split into rows: by memory, and evenly among the workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from gspo.batch.pack import PackedBatch, Packer
from gspo.batch.sample import Sample
from gspo.policy.load import Policy
from gspo.timing import timed

LEAST = 768
"""Tokens below which a row is not split for a second worker: threads that each call many small
operations wait for one another (measured: two rows of 518 tokens take 1.2 x one of 1,036, two of
996 take 0.64 x one of 1,992)."""


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
    workers = policy.workers.count
    turns = math.ceil(len(plan) / workers)
    tokens = sum(size for _, size in plan)
    if len(plan) < turns * workers and tokens >= LEAST * workers:
        even = math.ceil(1.05 * tokens / (turns * workers))
        plan = packer.plan(min(even, budget))
    return [packer.row(members, unit) for members, _ in plan]
