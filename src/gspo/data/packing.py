"""Samples -> packed rows: no padding, a token budget, no trajectory torn apart, prompts once."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gspo.core.timing import timed
from gspo.data.expert_choices import pack_routes
from gspo.data.sample import Sample
from gspo.data.shared_prompts import Layout, Prefixes


@dataclass(frozen=True)
class Microbatch:
    """One microbatch: B samples of S trajectories in one row, M of their U tokens sampled.

    All samples of a trajectory are in the same row, so that sums over a sequence meet. A prefix
    that samples have in common may stand in the row once: then it has T < U tokens, and each sample
    is a path through it. What is said of sampled tokens is said of each sample's own.

    Attributes:
        tokens: [1, T] the row, depth first: each sample adds what no sample before it has.
        positions: [1, T] position of each token in its samples, from 0.
        lengths: tokens of each sample, B numbers that add up to U.
        shared: of each sample, how many of its first tokens another sample put into the row.
        index: [U] place in the row of every token of the samples, one sample after the other.
        targets: [M] place in the row of each sampled token (never the first of its sample).
        sources: [M] place in the row of the token before it, from which it is predicted.
        sequence_ids: [M] sequence (trajectory, or turn of one) of each sampled token, in 0..S-1.
        loss_mask: [M] sampled tokens that are trained on.
        old_logprobs, sampling_logprobs, temperatures: [M] float32.
        advantages: [S] float32.
        trajectory_ids: the batch's number of the trajectory of each of the S sequences.
        routes: [U, N, K] experts of each sample's tokens, -1 where unknown; None where no sample
            has any.
    """

    tokens: Int[Tensor, "1 T"]
    positions: Int[Tensor, "1 T"]
    lengths: tuple[int, ...]
    shared: tuple[int, ...]
    index: Int[Tensor, " U"]
    targets: Int[Tensor, " M"]
    sources: Int[Tensor, " M"]
    sequence_ids: Int[Tensor, " M"]
    loss_mask: Bool[Tensor, " M"]
    old_logprobs: Float[Tensor, " M"]
    sampling_logprobs: Float[Tensor, " M"]
    temperatures: Float[Tensor, " M"]
    advantages: Float[Tensor, " S"]
    trajectory_ids: tuple[int, ...]
    routes: Int[Tensor, "U N K"] | None = None

    def __post_init__(self) -> None:
        for name in ("old_logprobs", "sampling_logprobs", "temperatures", "advantages"):
            if (dtype := getattr(self, name).dtype) != torch.float32:
                raise TypeError(f"{name} are {dtype}: l_i needs float32")

    @property
    def token_count(self) -> int:
        """T."""
        return self.tokens.shape[1]

    @property
    def sample_tokens(self) -> int:
        """U: what T would be if nothing were shared."""
        return self.index.shape[0]

    @property
    def copies(self) -> Int[Tensor, " T"]:
        """How many samples each token of the row stands for."""
        return self.index.bincount(minlength=self.token_count)

    def row_routes(self) -> Int[Tensor, "T N K"] | None:
        """`routes` of the row's tokens, as they are replayed.

        Raises:
            ValueError: samples that share a token have different routes of it (see `pack`).
        """
        if self.routes is None or self.token_count == self.sample_tokens:
            return self.routes
        out = self.routes.new_empty(self.token_count, *self.routes.shape[1:])
        out[self.index] = self.routes
        if not torch.equal(out[self.index], self.routes):
            raise ValueError("a row that shares tokens of different routes: pack with routed=True")
        return out


def plan_rows(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Which items share a row of at most `budget` tokens. A larger item gets its own.

    Best-fit (largest first, each into the fullest row that still has room) says how many rows there
    are; where the items also fit into that many when spread evenly, they are. Indices inside a row
    ascend.

    >>> plan_rows([6, 3, 5, 2], budget=8)
    [[0, 3], [1, 2]]
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    rows = _best_fit(sizes, order, budget)
    return sorted(sorted(row) for row in _spread(sizes, order, budget, len(rows)) or rows)


def _best_fit(sizes: Sequence[int], order: Sequence[int], budget: int) -> list[list[int]]:
    rows: list[list[int]] = []
    free: list[int] = []  # distinct numbers of free tokens, ascending
    having: dict[int, list[int]] = {}  # rows with that many
    for item in order:
        size = sizes[item]
        at = bisect.bisect_left(free, size)
        if at < len(free):
            left = free[at]
            row = having[left].pop()
            if not having[left]:
                del having[left], free[at]
        else:
            left, row = max(budget, size), len(rows)
            rows.append([])
        rows[row].append(item)
        left -= size
        if left not in having:
            bisect.insort(free, left)
        having.setdefault(left, []).append(row)
    return rows


def _spread(
    sizes: Sequence[int], order: Sequence[int], budget: int, count: int
) -> list[list[int]] | None:
    """Largest first, each into the emptiest of `count` rows; None where one overflows."""
    rows: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, row) for row in range(count)]
    for item in order:
        load, row = loads[0]
        if load and load + sizes[item] > budget:
            return None
        rows[row].append(item)
        heapq.heapreplace(loads, (load + sizes[item], row))
    return rows


@timed("packing")
def pack(
    samples: Sequence[Sample],
    budget: int,
    unit: Literal["trajectory", "turn"] = "trajectory",
    *,
    share: bool = False,
    routed: bool = False,
) -> list[Microbatch]:
    """Pack samples into rows of about `budget` tokens, whole trajectories together.

    Args:
        samples: in any order.
        budget: tokens of a row. A trajectory that is larger has a row of its own.
        unit: what a sequence is.
        share: a prefix that samples of a row have in common stands in it once. Then whole groups
            are kept together; one that is larger than the budget takes several rows.
        routed: routes will be replayed: tokens are shared only where their routes are the same.
    """
    packer = Packer(samples, share=share, routed=routed)
    return [packer.row(members, unit) for members, _ in packer.plan(budget)]


class Packer:
    """What `pack` knows of the samples before a budget is given; see there."""

    def __init__(self, samples: Sequence[Sample], *, share: bool = False, routed: bool = False):
        self._samples = samples
        self._lengths = [len(sample.tokens) for sample in samples]
        self._prefixes = Prefixes(samples, routed) if share else None
        # Arrays and not a list for each trajectory: of 10^5 lists Python's garbage collector would
        # take more time than the packing.
        numbers: dict[int, int] = {}
        self._owner = np.array(
            [numbers.setdefault(sample.trajectory_id, len(numbers)) for sample in samples],
            dtype=np.int64,
        )
        self._order = np.argsort(self._owner, kind="stable")
        self._ends = np.cumsum(np.bincount(self._owner, minlength=len(numbers)))

    def _members(self, trajectory: int) -> list[int]:
        """Its samples."""
        start = self._ends[trajectory - 1] if trajectory else 0
        return self._order[start : self._ends[trajectory]].tolist()

    def plan(self, budget: int) -> list[tuple[list[int], int]]:
        """Of each row: its trajectories, and its tokens, which may turn out fewer where what is
        packed as several groups has a prefix in common."""
        if self._prefixes is None:
            sizes = np.bincount(self._owner, self._lengths).astype(np.int64).tolist()
            return [(row, sum(sizes[t] for t in row)) for row in plan_rows(sizes, budget)]
        own = [self._members(t) for t in range(len(self._ends))]
        units = list(_groups(self._samples, own, self._prefixes, budget))
        return [
            (sorted(t for u in row for t in units[u][0]), sum(units[u][1] for u in row))
            for row in plan_rows([size for _, size in units], budget)
        ]

    def row(self, trajectories: Sequence[int], unit: Literal["trajectory", "turn"]) -> Microbatch:
        """The row of one entry of the plan."""
        own = [self._members(t) for t in trajectories]
        members = [i for part in own for i in part]
        lengths = [self._lengths[i] for i in members]
        if self._prefixes is None:
            layout = Layout(np.arange(sum(lengths)), (0,) * len(lengths), sum(lengths))
        else:
            layout = self._prefixes.layout(members)
        parts = [len(part) for part in own]
        return _row([self._samples[i] for i in members], lengths, parts, unit, layout)


def _groups(
    samples: Sequence[Sample], own: Sequence[Sequence[int]], prefixes: Prefixes, budget: int
) -> Iterator[tuple[list[int], int]]:
    """Trajectories that are packed together, and how many tokens they take: groups, or where one is
    larger than the budget, parts of it in which those with most in common are neighbours."""
    groups: dict[int, list[int]] = {}
    for trajectory, members in enumerate(own):
        groups.setdefault(samples[members[0]].group_id, []).append(trajectory)
    for group in groups.values():
        size = prefixes.layout([i for t in group for i in own[t]]).size
        if size <= budget:
            yield group, size
            continue
        part: list[int] = []
        size, ranks = 0, []
        for t in sorted(group, key=lambda t: prefixes.rank[own[t][0]]):
            added = prefixes.grow(ranks, own[t])
            if part and size + added > budget:
                yield part, size
                part, size, ranks = [], 0, []
                added = prefixes.grow(ranks, own[t])
            part.append(t)
            size += added
        yield part, size


def _row(
    samples: Sequence[Sample],
    lengths: Sequence[int],
    parts: Sequence[int],
    unit: str,
    layout: Layout,
) -> Microbatch:
    """A row of samples, `parts` of them one trajectory after the other."""
    masks = np.concatenate([sample.ratio_mask for sample in samples])
    sampled_at = np.flatnonzero(masks)
    # A turn's number is the same in whichever of its trajectory's samples it lies.
    turns = np.concatenate([sample.turn_ids for sample in samples])[masks] * (unit == "turn")
    owner = np.repeat(np.repeat(np.arange(len(parts)), parts), lengths)[masks]
    stride = int(turns.max(initial=0)) + 1
    present, sequence = np.unique(owner * stride + turns, return_inverse=True)
    first = np.cumsum(parts) - parts  # sample of each trajectory
    owners = [samples[i] for i in first[present // stride].tolist()]
    ends = np.cumsum(lengths)

    def in_row(parts: Sequence[np.ndarray]) -> Tensor:
        row = np.empty(layout.size, dtype=np.int64)
        row[layout.index] = np.concatenate(parts)
        return torch.from_numpy(row)[None]

    def sampled(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(s, name) for s in samples])[masks])

    return Microbatch(
        tokens=in_row([sample.tokens for sample in samples]),
        positions=in_row([np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)]),
        lengths=tuple(lengths),
        shared=layout.shared,
        index=torch.from_numpy(layout.index),
        targets=torch.from_numpy(layout.index[sampled_at]),
        sources=torch.from_numpy(layout.index[sampled_at - 1]),
        sequence_ids=torch.from_numpy(sequence.reshape(-1)),
        loss_mask=sampled("loss_mask"),
        old_logprobs=sampled("old_logprobs"),
        sampling_logprobs=sampled("sampling_logprobs"),
        temperatures=sampled("temperatures"),
        advantages=torch.tensor([sample.advantage for sample in owners], dtype=torch.float32),
        trajectory_ids=tuple(sample.trajectory_id for sample in owners),
        routes=pack_routes([s.routes for s in samples], tuple(lengths)),
    )
