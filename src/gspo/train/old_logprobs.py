"""Old log-probs of the trainer: log pi_old at the start of a rollout batch, before any update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch

from gspo.data.packing import Microbatch
from gspo.data.sample import Sample, TrajectorySamples, flat
from gspo.policy.policy import Policy
from gspo.train.minibatches import microbatches
from gspo.train.settings import Settings


def with_trainer_logprobs(
    policy: Policy, trajectories: Sequence[TrajectorySamples], settings: Settings
) -> list[TrajectorySamples]:
    """The same samples, in their order, with `old_logprobs` under the policy as it is now.

    Called once per rollout batch: computed from the weights under update, every ratio would be 1
    and the clip would never act. Expert choices are replayed if training will replay them.
    """
    replay = settings.routing_replay != "none"

    def score(microbatch: Microbatch, samples: Sequence[Sample]) -> np.ndarray:
        with policy.routers.watch(microbatch.replayed_choices() if replay else None):
            scored = policy.logprobs(microbatch, settings.logprob_calculation_chunk_size)
        old = np.zeros(microbatch.sample_tokens, dtype=np.float32)
        old[np.concatenate([s.ratio_mask for s in samples])] = scored.logprobs.cpu().numpy()
        return old

    return rescored(policy, trajectories, settings, "old_logprobs", score, replay=replay)


def rescored(
    policy: Policy,
    trajectories: Sequence[TrajectorySamples],
    settings: Settings,
    field: str,
    score: Callable[[Microbatch, Sequence[Sample]], np.ndarray],
    *,
    replay: bool = False,
) -> list[TrajectorySamples]:
    """The same samples after a forward pass without gradient that computes one of their fields.

    Args:
        policy, trajectories, settings: see `with_trainer_logprobs`.
        field: of `Sample`.
        score: its values for the tokens of a microbatch's samples, one sample after the other.
        replay: see `microbatches`.
    """
    by_id = {samples[0].trajectory_id: samples for samples in trajectories}

    def run(microbatch: Microbatch) -> list[Sample]:
        samples = flat(by_id[number] for number in dict.fromkeys(microbatch.trajectory_ids))
        with torch.no_grad():
            values = score(microbatch, samples)
        parts = np.split(values, np.cumsum(microbatch.lengths)[:-1])
        return [replace(s, **{field: part}) for s, part in zip(samples, parts, strict=True)]

    packed = microbatches(policy, trajectories, settings, replay=replay)
    scored: defaultdict[int, list[Sample]] = defaultdict(list)
    for sample in chain(*policy.workers.map(run, packed)):
        scored[sample.trajectory_id].append(sample)
    return [tuple(scored[samples[0].trajectory_id]) for samples in trajectories]
