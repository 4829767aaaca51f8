"""How the samples of a minibatch are split into rows: by memory, and evenly among the workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from gspo.batch.pack import PackedBatch, pack
from gspo.batch.sample import Sample
from gspo.policy.load import Policy

LEAST = 256
"""Tokens below which a row is not split for a second worker."""


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
    rows = pack(samples, budget, unit, share=share, routed=routed)
    workers = policy.workers.count
    turns = math.ceil(len(rows) / workers)
    tokens = sum(row.token_count for row in rows)
    if len(rows) == turns * workers or tokens < LEAST * workers:
        return rows
    even = math.ceil(1.05 * tokens / (turns * workers))
    return pack(samples, min(even, budget), unit, share=share, routed=routed)
