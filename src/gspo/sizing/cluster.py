"""What fits on given GPUs, how long a step takes there, and how to share the GPUs out."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from gspo.core.errors import ConfigError
from gspo.sizing.memory import Training, most_tokens, training_bytes
from gspo.sizing.model_size import ModelSize
from gspo.sizing.step_time import (
    Gpu,
    Rates,
    Rollouts,
    publish_seconds,
    rollout_seconds,
    training_seconds,
)

USABLE = 0.92
"""Share of a GPU's memory that tensors get; the rest is CUDA's, and gaps between tensors."""
_WEIGHTS_SHARE = 0.6
"""Most of a server's memory that weights may take, so that keys and values find room."""


@dataclass(frozen=True)
class Fit:
    """Whether one way of training finds room.

    Attributes:
        how: weights are trained.
        gpus: the state is spread over.
        parts: bytes of one GPU at the microbatch that the longest sample needs.
        most_tokens: of a microbatch; 0 where not even the weights find room.
        fits: the longest sample does; a sample is never cut.
    """

    how: Training
    gpus: int
    parts: dict[str, float]
    most_tokens: int
    fits: bool


@dataclass(frozen=True)
class Layout:
    """How the GPUs are shared out, and the seconds of a step.

    Attributes:
        training_gpus, rollout_gpus: their numbers; the same GPUs where `overlapped` is False.
        per_server: GPUs that one rollout server needs.
        overlapped: rollouts of the next step go on while this one trains.
        parts: seconds by what is done.
        seconds: of a step.
    """

    training_gpus: int
    rollout_gpus: int
    per_server: int
    overlapped: bool
    parts: dict[str, float]
    seconds: float


def fits(size: ModelSize, rollouts: Rollouts, gpu: Gpu, gpus: int, lora: int) -> list[Fit]:
    """Try all weights and LoRA, with and without checkpointing; what trains more comes first."""
    found = []
    for rank, checkpointing in itertools.product((None, lora), (False, True)):
        how = Training(rank, checkpointing=checkpointing)
        most = most_tokens(size, how, gpus, gpu.memory * USABLE)
        parts = training_bytes(size, how, rollouts.prompt + rollouts.longest, gpus)
        found.append(Fit(how, gpus, parts, most, sum(parts.values()) <= gpu.memory * USABLE))
    return found


def layouts(
    size: ModelSize, how: Training, rollouts: Rollouts, gpu: Gpu, gpus: int, rates: Rates
) -> list[Layout]:
    """Each sharing of the GPUs on which training and a server find room, the fastest first.

    Raises:
        ConfigError: no sharing has room.
    """
    per_server, longest = server_gpus(size, gpu), rollouts.prompt + rollouts.longest
    shared = [(gpus, gpus // per_server * per_server)]
    shared += [(gpus - rolling, rolling) for rolling in range(per_server, gpus, per_server)]
    made = []
    for training, rolling in shared:
        needed = sum(training_bytes(size, how, longest, training).values())
        if needed > gpu.memory * USABLE or not rolling:
            continue
        apart = training + rolling <= gpus
        parts = {"rollouts": rollout_seconds(size, rollouts, gpu, rolling, per_server, rates)}
        parts |= training_seconds(size, how, rollouts, gpu, training, rates)
        trained = parts["scoring"] + parts["training"]
        together = max(parts["rollouts"], trained) if apart else parts["rollouts"] + trained
        parts["publication"] = publish_seconds(size, per_server, rates)
        seconds = together + parts["publication"]
        made.append(Layout(training, rolling, per_server, apart, parts, seconds))
    if not made:
        raise ConfigError(
            f"gpus = {gpus}: no room for {how.about()} and a rollout server, which needs "
            f"{per_server} GPUs of {gpu.memory / 1e9:.0f} GB: take more or larger GPUs"
        )
    return sorted(made, key=lambda layout: layout.seconds)


def server_gpus(size: ModelSize, gpu: Gpu) -> int:
    """GPUs of one rollout server: the smallest power of two whose memory takes the weights."""
    count = 1
    while 2 * size.parameters > _WEIGHTS_SHARE * gpu.memory * count:
        count *= 2
    return count
