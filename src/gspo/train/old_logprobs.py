"""Old log-probs of the trainer: log pi_old at the start of a rollout batch, before any update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from gspo.data.packing import Microbatch, pack
from gspo.data.sample import Sample, TrajectorySamples, flat
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
        replay: go through the samples' expert choices, as training will.
        share: compute prompts that samples share once.
    """

    def score(microbatch: Microbatch, samples: Sequence[Sample]) -> list[Sample]:
        replayed = microbatch.replayed_choices() if replay else None
        with policy.routers.watch(replayed):
            logprobs = policy.logprobs(microbatch, chunk).logprobs.cpu().numpy()
        old = np.zeros(microbatch.sample_tokens, dtype=np.float32)
        old[np.concatenate([sample.ratio_mask for sample in samples])] = logprobs
        by_sample = np.split(old, np.cumsum(microbatch.lengths)[:-1])
        return [replace(s, old_logprobs=o) for s, o in zip(samples, by_sample, strict=True)]

    return scored_samples(policy, trajectories, budget, score, replay=replay, share=share)


def scored_samples(
    policy: Policy,
    trajectories: Sequence[TrajectorySamples],
    budget: int,
    score: Callable[[Microbatch, Sequence[Sample]], list[Sample]],
    *,
    replay: bool = False,
    share: bool = False,
) -> list[TrajectorySamples]:
    """The same trajectories after a forward pass without gradient, which changes their samples.

    Args:
        policy, trajectories, budget, replay, share: see `with_trainer_logprobs`.
        score: makes the new samples of a microbatch from its samples, in their order.
    """
    by_id = {samples[0].trajectory_id: samples for samples in trajectories}

    def run(microbatch: Microbatch) -> list[Sample]:
        whole = [by_id[number] for number in microbatch.trajectory_ids]
        with torch.no_grad():
            return score(microbatch, flat(whole))

    count = policy.workers.count
    microbatches = pack(flat(trajectories), budget, share=share, replay=replay, workers=count)
    scored: defaultdict[int, list[Sample]] = defaultdict(list)
    for samples in policy.workers.map(run, microbatches):
        for sample in samples:
            scored[sample.trajectory_id].append(sample)
    return [tuple(scored[samples[0].trajectory_id]) for samples in trajectories]
