"""Samples -> packed rows: no padding, a token budget, and no trajectory torn apart."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gspo.batch.routes import pack_routes
from gspo.batch.sample import Sample
from gspo.timing import timed


@dataclass(frozen=True)
class PackedBatch:
    """One microbatch: B samples of S trajectories in one row of T tokens, M of them sampled.

    All samples of a trajectory are in the same row, so that sums over a sequence meet.

    Attributes:
        tokens: [1, T] the samples one after the other.
        positions: [1, T] position of each token in its own sample, from 0.
        lengths: tokens of each sample, B numbers that add up to T.
        targets: [M] index in the row of each sampled token (never the first of its sample).
        sequence_ids: [M] sequence (trajectory, or turn of one) of each sampled token, in 0..S-1.
        loss_mask: [M] sampled tokens that are trained on.
        old_logprobs, sampling_logprobs, temperatures: [M] float32.
        advantages: [S] float32.
        trajectory_ids: the batch's number of the trajectory of each of the S sequences.
        routes: [T, N, K] experts of each token, -1 where unknown; None where no sample has any.
    """

    tokens: Int[Tensor, "1 T"]
    positions: Int[Tensor, "1 T"]
    lengths: tuple[int, ...]
    targets: Int[Tensor, " M"]
    sequence_ids: Int[Tensor, " M"]
    loss_mask: Bool[Tensor, " M"]
    old_logprobs: Float[Tensor, " M"]
    sampling_logprobs: Float[Tensor, " M"]
    temperatures: Float[Tensor, " M"]
    advantages: Float[Tensor, " S"]
    trajectory_ids: tuple[int, ...]
    routes: Int[Tensor, "T N K"] | None = None

    def __post_init__(self) -> None:
        for name in ("old_logprobs", "sampling_logprobs", "temperatures", "advantages"):
            if (dtype := getattr(self, name).dtype) != torch.float32:
                raise TypeError(f"{name} are {dtype}: l_i needs float32")

    @property
    def token_count(self) -> int:
        """T."""
        return self.tokens.shape[1]


def plan_rows(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit: which items share a row of at most `budget` tokens. A larger item gets its own.

    Largest first, each into the fullest row that still has room; indices inside a row ascend.

    >>> plan_rows([6, 3, 5, 2], budget=8)
    [[0, 3], [1, 2]]
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect.bisect_left(room, (sizes[item], -1))
        if at < len(room):
            free, row = room.pop(at)
        else:
            free, row = max(budget, sizes[item]), len(rows)
            rows.append([])
        rows[row].append(item)
        bisect.insort(room, (free - sizes[item], row))
    return sorted(sorted(row) for row in rows)


@timed("packing")
def pack(
    samples: Sequence[Sample], budget: int, unit: Literal["trajectory", "turn"] = "trajectory"
) -> list[PackedBatch]:
    """Pack samples into rows of about `budget` tokens, whole trajectories together."""
    by_trajectory: dict[int, list[Sample]] = {}
    for sample in samples:
        by_trajectory.setdefault(sample.trajectory_id, []).append(sample)
    units = list(by_trajectory.values())
    sizes = [sum(len(sample) for sample in unit) for unit in units]
    return [_row([units[i] for i in row], unit) for row in plan_rows(sizes, budget)]


def _row(units: Sequence[Sequence[Sample]], unit: str) -> PackedBatch:
    samples = [sample for own in units for sample in own]
    masks = np.concatenate([sample.ratio_mask for sample in samples])
    # A turn's number is the same in whichever of its trajectory's samples it lies.
    turns = np.concatenate([sample.turn_ids for sample in samples])[masks] * (unit == "turn")
    owner = np.concatenate(
        [np.full(sample.sampled, u) for u, own in enumerate(units) for sample in own]
    )
    stride = int(turns.max(initial=0)) + 1
    present, sequence = np.unique(owner * stride + turns, return_inverse=True)
    owners = [units[key // stride] for key in present]

    def sampled(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(s, name) for s in samples])[masks])

    return PackedBatch(
        tokens=torch.from_numpy(np.concatenate([s.tokens for s in samples]))[None],
        positions=torch.from_numpy(np.concatenate([np.arange(len(s)) for s in samples]))[None],
        lengths=tuple(len(sample) for sample in samples),
        targets=torch.from_numpy(np.flatnonzero(masks)),
        sequence_ids=torch.from_numpy(sequence.reshape(-1)),
        loss_mask=sampled("loss_mask"),
        old_logprobs=sampled("old_logprobs"),
        sampling_logprobs=sampled("sampling_logprobs"),
        temperatures=sampled("temperatures"),
        advantages=torch.tensor([own[0].advantage for own in owners], dtype=torch.float32),
        trajectory_ids=tuple(own[0].trajectory_id for own in owners),
        routes=pack_routes([s.routes for s in samples], [len(s) for s in samples]),
    )
