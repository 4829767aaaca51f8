"""How the samples of a minibatch are split into microbatches."""

from __future__ import annotations

from collections.abc import Sequence

from gspo.data.packing import Microbatch, Unit, pack
from gspo.data.sample import Sample
from gspo.policy.load import Policy


def rows_of(
    policy: Policy,
    samples: Sequence[Sample],
    budget: int,
    unit: Unit = "trajectory",
    *,
    share: bool = False,
    replay: bool = False,
) -> list[Microbatch]:
    """`pack`, with about as many tokens for each of the policy's workers."""
    return pack(samples, budget, unit, share=share, replay=replay, workers=policy.workers.count)
