"""What an optimizer step made of each sequence, token by token: for reports, not for training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gspo.data.packing import Microbatch
from gspo.objective import LossOutput
from gspo.train.epsilon import Observed


@dataclass(frozen=True)
class Trace(Observed):
    """A sequence of one optimizer step.

    Attributes:
        trajectory_id: of the batch.
        update: the optimizer step of the call, from 0.
        trained_tokens, clipped_tokens: in the loss; of those, how many the range acts on.
        token_log_ratios: [L_i] float32 d_t, in the order of sampling.
    """

    trajectory_id: int
    update: int
    trained_tokens: int
    clipped_tokens: int
    token_log_ratios: np.ndarray


def traces(microbatch: Microbatch, logprobs: Tensor, out: LossOutput, update: int) -> list[Trace]:
    """The S sequences of a microbatch.

    Args:
        microbatch: scored by `logprobs`.
        logprobs: [M] of its sampled tokens under the policy of this step.
        out: the loss of the microbatch.
        update: the optimizer step of the call.
    """
    d = (logprobs.detach().cpu() - microbatch.old_logprobs).numpy()
    ids = microbatch.sequence_ids.numpy()
    counts = np.bincount(ids, minlength=len(microbatch.advantages))
    by_sequence = np.split(d[np.argsort(ids, kind="stable")], np.cumsum(counts)[:-1])
    log_ratios, lengths = out.log_ratio.tolist(), out.lengths.tolist()
    trained, clipped = out.loss_tokens.int().tolist(), out.clipped_tokens.int().tolist()
    return [
        Trace(
            log_ratio=log_ratios[s],
            advantage=advantage,
            length=lengths[s],
            trajectory_id=microbatch.trajectory_ids[s],
            update=update,
            trained_tokens=trained[s],
            clipped_tokens=clipped[s],
            token_log_ratios=by_sequence[s],
        )
        for s, advantage in enumerate(microbatch.advantages.tolist())
    ]


def by_trajectory(found: Iterable[Trace]) -> dict[int, list[Trace]]:
    """The sequences of each trajectory in the order of its turns, of its last optimizer step."""
    out: dict[int, list[Trace]] = {}
    for trace in found:
        known = out.setdefault(trace.trajectory_id, [])
        if known and known[0].update < trace.update:
            known.clear()
        known.append(trace)
    return out
