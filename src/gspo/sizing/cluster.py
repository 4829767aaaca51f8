"""Seconds of one RL step (rollouts, training, publication), what fits on given GPUs, and how to
share them out: from counts and stated rates."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from gspo.core.errors import ConfigError, check_whole
from gspo.sizing.model_size import ModelSize, Training, most_tokens, training_bytes

USABLE = 0.92
"""Share of a GPU's memory that tensors get; the rest is CUDA's, and gaps between tensors."""
_WEIGHTS_SHARE = 0.6
"""Most of a server's memory that weights may take, so that keys and values find room."""
_PIECES = 64
"""Into which the decoding of a rollout batch is cut."""
KV_SHARE = 0.85
"""Of a server's memory beside the weights, what keys and values may take."""


@dataclass(frozen=True)
class Gpu:
    """A data sheet.

    Attributes:
        flops: bfloat16 FLOP/s, dense.
        bytes_per_s: of its memory.
        memory: in bytes.
        node: GPUs that share a fast link.
    """

    flops: float
    bytes_per_s: float
    memory: float
    node: int = 8


GPUS = {  # NVIDIA's data sheets, SXM
    "a100-40gb": Gpu(312e12, 1.555e12, 40e9),
    "a100-80gb": Gpu(312e12, 2.039e12, 80e9),
    "h100": Gpu(989e12, 3.35e12, 80e9),
    "h200": Gpu(989e12, 4.8e12, 141e9),
    "b200": Gpu(2250e12, 8.0e12, 180e9),
    "l40s": Gpu(362e12, 0.864e12, 48e9),
}


@dataclass(frozen=True)
class Rates:
    """What hardware is taken to reach; every number is an assumption that a user can replace.

    Attributes:
        mfu: share of `Gpu.flops` that training and scoring reach; None: 0.25 for a dense model and
            0.06 for a Mixture of Experts (published runs: 0.11 to 0.36, and 0.03 to 0.16).
        decode_bytes, decode_flops: shares of the data sheet that decoding reaches.
        layer_s: seconds of a layer for one decoded token, however few completions there are.
        moe_layer_s: the same of a layer with experts.
        node_s, network_s: what the layer's two sums over GPUs add, in a node and across nodes.
        link: bytes/s at which a server gets new weights, for each of its GPUs.
    """

    mfu: float | None = None
    decode_bytes: float = 0.5
    decode_flops: float = 0.4
    layer_s: float = 50e-6
    moe_layer_s: float = 100e-6
    node_s: float = 40e-6
    network_s: float = 200e-6
    link: float = 2e9

    def training(self, size: ModelSize) -> float:
        """The mfu that holds for this model."""
        return self.mfu or (0.06 if size.experts else 0.25)


@dataclass(frozen=True)
class Rollouts:
    """A rollout batch.

    Attributes:
        completions: of one step.
        prompt: tokens of a prompt.
        mean: tokens of a completion.
        longest: tokens of the longest completion.

    Raises:
        ConfigError: no completion, or lengths that contradict one another.
    """

    completions: int
    prompt: int
    mean: float
    longest: int

    def __post_init__(self) -> None:
        check_whole("completions", self.completions, 1)
        if self.longest < self.mean:
            raise ConfigError(
                f"longest = {self.longest} is less than the mean length {self.mean:.0f}: give the "
                "longest completion, max_tokens, that a run allows"
            )

    @property
    def tokens(self) -> float:
        """That are trained on, prompts of each completion included."""
        return self.completions * (self.prompt + self.mean)

    def running(self, share: float) -> float:
        """Completions still running when the longest has `share` of its tokens.

        They end so that their mean length is `mean`: completions x (1 - share)^(longest/mean - 1).
        """
        return self.completions * (1 - share) ** max(self.longest / self.mean - 1, 0.01)


def pass_flops(size: ModelSize, rollouts: Rollouts) -> float:
    """FLOPs of one forward pass over the rollout batch; a backward pass takes twice as many."""
    length = rollouts.prompt + rollouts.mean
    attention = 4 * size.query_width * size.attention_layers * length / 2
    return rollouts.tokens * (2 * (size.active + size.head) + attention)


def training_seconds(
    size: ModelSize, how: Training, rollouts: Rollouts, gpu: Gpu, gpus: int, rates: Rates
) -> dict[str, float]:
    """Seconds of scoring (old log-probs) and of training. LoRA needs no gradient of the base.
    A sample is never cut, so no more GPUs have work than there are completions."""
    busy = min(gpus, rollouts.completions)
    forward = pass_flops(size, rollouts) / (busy * gpu.flops * rates.training(size))
    passes = (3 if how.lora is None else 2) + how.checkpointing
    return {"scoring": forward, "training": passes * forward}


def rollout_seconds(
    size: ModelSize, rollouts: Rollouts, gpu: Gpu, gpus: int, per_server: int, rates: Rates
) -> float:
    """Seconds until the longest completion is there, on gpus / per_server servers.

    Where the keys and values of all running completions find no room, they run in waves.
    """
    servers = gpus // per_server
    layer = rates.moe_layer_s if size.experts else rates.layer_s
    if per_server > 1:
        layer += rates.network_s if per_server > gpu.node else rates.node_s
    seconds = 0.0
    for piece in range(_PIECES):
        share = (piece + 0.5) / _PIECES
        running = max(rollouts.running(share) / servers, 1)
        context = rollouts.prompt + share * rollouts.longest
        token = 2 * size.kv_width * size.attention_layers
        room = (gpu.memory * per_server - 2 * size.parameters) * KV_SHARE / (token * context)
        waves = max(running / max(room, 1), 1)
        running = running / waves
        cache = running * context * token
        read = (weight_bytes(size, running) + cache) / (gpu.bytes_per_s * rates.decode_bytes)
        computed = 2 * (size.active + size.head) * running / (gpu.flops * rates.decode_flops)
        step = max(read, computed) / per_server + layer * size.layers
        seconds += waves * step * rollouts.longest / _PIECES
    return seconds


def weight_bytes(size: ModelSize, completions: float) -> float:
    """Bytes of bfloat16 weights that one decoded position reads: experts that any token chose."""
    chosen = size.experts_per_token / size.experts if size.experts else 0
    others = size.active - size.expert * chosen + size.head
    return 2 * (others + size.expert * (1 - (1 - chosen) ** completions))


def publish_seconds(size: ModelSize, per_server: int, rates: Rates) -> float:
    """Seconds until every server has the new bfloat16 weights: all at once."""
    return 2 * size.parameters / (per_server * rates.link)


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
        seconds = parts["publication"] = publish_seconds(size, per_server, rates)
        seconds += max(parts["rollouts"], trained) if apart else parts["rollouts"] + trained
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
