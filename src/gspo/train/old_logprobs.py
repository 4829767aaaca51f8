"""Old log-probs of the trainer: log pi_old at the start of a rollout batch, before any update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from gspo.data.packing import Microbatch, pack
from gspo.data.sample import TrajectorySamples
from gspo.policy.load import Policy


def with_trainer_logprobs(
    policy: Policy,
    trajectories: Sequence[TrajectorySamples],
    budget: int,
    chunk: int | None,
    *,
    replay: bool = False,
    share: bool = False,
) -> list[TrajectorySamples]:
    """The same samples with `old_logprobs` under the policy as it is now.

    Called once per rollout batch: computed from the weights under update, every ratio would be 1
    and the clip would never act.

    Args:
        policy: the trainer's, before the first update.
        trajectories: in any order, which is kept.
        budget: tokens of a microbatch.
        chunk: tokens whose logits exist at once.
        replay: go through the samples' own expert choices, as training will.
        share: compute prompts that samples share once.
    """
    flat = [sample for samples in trajectories for sample in samples]
    workers = policy.workers.count
    microbatches = pack(flat, budget, share=share, replay=replay, workers=workers)

    def score(microbatch: Microbatch) -> np.ndarray:
        replayed = microbatch.replayed_choices() if replay else None
        with torch.no_grad(), policy.routers.watch(replayed):
            return policy.logprobs(microbatch, chunk).logprobs.cpu().numpy()

    by_id = {samples[0].trajectory_id: samples for samples in trajectories}
    scored = policy.workers.map(score, microbatches)
    for microbatch, logprobs in zip(microbatches, scored, strict=True):
        for trajectory_id in microbatch.trajectory_ids:  # whole, its samples in their order
            samples = by_id[trajectory_id]
            size = sum(sample.sampled for sample in samples)
            by_id[trajectory_id] = _with_old(samples, logprobs[:size])
            logprobs = logprobs[size:]
    return [by_id[samples[0].trajectory_id] for samples in trajectories]


def _with_old(samples: TrajectorySamples, logprobs: np.ndarray) -> TrajectorySamples:
    """The samples with the log-probs of their sampled tokens, one sample after the other."""
    changed = []
    ends = np.cumsum([sample.sampled for sample in samples])
    for sample, sampled in zip(samples, np.split(logprobs, ends[:-1]), strict=True):
        old = np.zeros(len(sample), dtype=np.float32)
        old[sample.ratio_mask] = sampled
        changed.append(replace(sample, old_logprobs=old))
    return tuple(changed)
