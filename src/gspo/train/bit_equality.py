"""In exact mode, on the weights that sampled: the trainer's log-probs are the engine's bits."""

from __future__ import annotations

import torch
from torch import Tensor

from gspo.core.errors import NumericsError
from gspo.data.packing import Microbatch


def check_exact(logprobs: Tensor, microbatch: Microbatch) -> None:
    """Refuse log-probs that are not the engine's to the bit, on the weights that it sampled with.

    Raises:
        NumericsError: how many tokens differ, by how much, and of which trajectory.
    """
    sampled = microbatch.sampling_logprobs
    logprobs = logprobs.detach().cpu()
    if torch.equal(logprobs, sampled):
        return
    different = logprobs != sampled
    first = int(microbatch.sequence_ids[different][0])
    raise NumericsError(
        f"{int(different.sum())} of {len(sampled)} log-probs differ from the engine's, by up to "
        f"{(logprobs - sampled).abs().max():.3g} nats, on the weights that sampled them (first in "
        f"trajectory {microbatch.trajectory_ids[first]}). In exact mode they are equal to the bit: "
        "were the log-probs or tokens changed, or sampled by another model, engine or process? "
        "Without `policy_version` in their Choices, or with InternalModelConfig(exact=False), they "
        "are trained on without this check"
    )
