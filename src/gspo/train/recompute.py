"""pi_old of the trainer: log-probs at the start of the batch, before any update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from gspo.data.packing import PackedBatch
from gspo.data.sample import Sample
from gspo.policy.policy import Policy
from gspo.train.rows import rows_of


def with_trainer_logprobs(
    policy: Policy,
    trajectories: Sequence[Sequence[Sample]],
    budget: int,
    chunk: int | None,
    *,
    replay: bool = False,
    share: bool = False,
) -> list[tuple[Sample, ...]]:
    """The same samples with `old_logprobs` under the policy as it is now, over the routes that
    will be replayed in training where `replay` is set.

    Called once a rollout batch: computed from the weights under update, every ratio would be 1
    and the clip would never act.
    """
    by_id = {samples[0].trajectory_id: samples for samples in trajectories}
    found: dict[int, tuple[Sample, ...]] = {}
    flat = [s for own in trajectories for s in own]
    rows = rows_of(policy, flat, budget, share=share, routed=replay)

    def score(row: PackedBatch) -> np.ndarray:
        routes = row.row_routes() if replay else None
        with torch.no_grad(), policy.routing.observe(routes):
            return policy.logprobs(row, chunk).logprobs.cpu().numpy()

    for row, logprobs in zip(rows, policy.workers.map(score, rows), strict=True):
        at = 0
        for trajectory_id in row.trajectory_ids:
            samples = []
            for sample in by_id[trajectory_id]:
                old = np.zeros(len(sample), dtype=np.float32)
                old[sample.ratio_mask] = logprobs[at : at + sample.sampled]
                at += sample.sampled
                samples.append(replace(sample, old_logprobs=old))
            found[trajectory_id] = tuple(samples)
    return [found[samples[0].trajectory_id] for samples in trajectories]
