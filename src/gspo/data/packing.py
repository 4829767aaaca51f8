"""Samples -> microbatches: no padding, a token budget, whole trajectories, shared prompts once.

The plan is made in numpy on the host; nothing here touches a device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gspo.core.errors import DataError
from gspo.core.timing import span
from gspo.data.best_fit import plan_microbatches
from gspo.data.expert_choices import padded_expert_choices
from gspo.data.sample import Sample
from gspo.data.shared_prompts import SharedPrompts

LEAST = 768
"""Tokens below which a microbatch is not split for a second worker: threads that each call many
small operations wait for one another (measured: two microbatches of 518 tokens take 1.2 x one of
1,036, two of 996 take 0.64 x one of 1,992)."""
_GROWTH = 1.2  # from one size of microbatches that is tried to the next

Unit: TypeAlias = Literal["trajectory", "turn"]
Plan: TypeAlias = list[tuple[list[int], int]]
"""For each microbatch its trajectories and its tokens. These may turn out fewer, if trajectories of
several groups share a prompt."""


@dataclass(frozen=True)
class Microbatch:
    """B samples of S trajectories for one forward pass; M of their U tokens were sampled.

    All samples of a trajectory are in the same microbatch, so that sums over a sequence meet. What
    samples share may be in it once: then it has T < U tokens, and each sample is a path through
    them. What is said of sampled tokens is said for each sample separately.

    Attributes:
        tokens: [1, T] depth first: each sample adds what no sample before it has.
        positions: [1, T] position of each token in its samples, from 0.
        lengths: tokens of each sample, B numbers that add up to U.
        shared: for each sample, how many of its first tokens another sample put there.
        index: [U] place among the T of each token of the samples, one sample after the other.
        targets: [M] place of each sampled token (never the first of its sample).
        sources: [M] place of the token before it, from which it is predicted.
        sequence_ids: [M] sequence (trajectory, or turn of one) of each sampled token, in 0..S-1.
        old_logprobs, sampling_logprobs, temperatures: [M] float32.
        advantages: [S] float32; of a sequence whose turns have advantages of their own, the mean
            over its sampled tokens.
        token_advantages: [M] float32 if turns of one sequence may have different advantages.
        trajectory_ids: of each of the S sequences, its trajectory's number in the rollout batch.
        expert_choices: [U, N, K] experts of each sample's tokens, -1 if unknown; None if no sample
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
    old_logprobs: Float[Tensor, " M"]
    sampling_logprobs: Float[Tensor, " M"]
    temperatures: Float[Tensor, " M"]
    advantages: Float[Tensor, " S"]
    trajectory_ids: tuple[int, ...]
    token_advantages: Float[Tensor, " M"] | None = None
    expert_choices: Int[Tensor, "U N K"] | None = None

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
        """How many samples each token stands for."""
        return self.index.bincount(minlength=self.token_count)

    @property
    def with_advantage(self) -> Bool[Tensor, " S"]:
        """Sequences of which any token has an advantage."""
        if self.token_advantages is None:
            return self.advantages != 0
        signal = self.sequence_ids[self.token_advantages != 0]
        return signal.bincount(minlength=len(self.advantages)) > 0

    def replayed_choices(self) -> Int[Tensor, "T N K"]:
        """`expert_choices` of the T tokens, as they are replayed.

        Raises:
            DataError: there are none.
            ValueError: samples that share a token have different choices for it (see `pack`).
        """
        chosen = self.expert_choices
        if chosen is None:
            raise DataError("a microbatch without expert choices in a step that replays them")
        replayed = chosen.new_empty(self.token_count, *chosen.shape[1:])
        replayed[self.index] = chosen
        if not torch.equal(replayed[self.index], chosen):
            raise ValueError(
                "samples share tokens of different expert choices: pack with replay=True"
            )
        return replayed


@span("packing")
def pack(
    samples: Sequence[Sample],
    budget: int,
    unit: Unit = "trajectory",
    *,
    share: bool = False,
    replay: bool = False,
    workers: int = 1,
) -> list[Microbatch]:
    """Pack samples into microbatches of about `budget` tokens, whole trajectories together.

    Args:
        samples: in any order.
        budget: tokens of a microbatch. A trajectory that is larger has one to itself.
        unit: what a sequence is.
        share: what samples of a microbatch share stands in it once. Then whole groups are kept
            together; one that is larger than the budget takes several microbatches.
        replay: expert choices will be replayed: tokens are shared only if theirs are the same.
        workers: how many microbatches are computed side by side; each gets about as many tokens.

    >>> from gspo.data.sample import sample_of
    >>> from gspo.data.turn import Turn
    >>> turns = [Turn([1, 2], [sampled], [-0.5]) for sampled in (3, 4)]
    >>> (one,) = pack([sample_of([turn], trajectory_id=t) for t, turn in enumerate(turns)], 8)
    >>> one.tokens.tolist(), one.positions.tolist(), one.targets.tolist(), one.sources.tolist()
    ([[1, 2, 3, 1, 2, 4]], [[0, 1, 2, 0, 1, 2]], [2, 5], [1, 4])
    """
    packer = _Packer(samples, share, replay)
    plan = packer.plan(budget)
    if workers > 1:
        plan = _evened(packer, plan, budget, workers)
    return [packer.microbatch(trajectories, unit) for trajectories, _ in plan]


class _Packer:
    """What `pack` knows of the samples before a budget is given; see there."""

    def __init__(self, samples: Sequence[Sample], share: bool, replay: bool):
        self._samples = samples
        self._shared = SharedPrompts(samples, replay) if share else None
        members: dict[int, list[int]] = {}
        for number, sample in enumerate(samples):
            members.setdefault(sample.trajectory_id, []).append(number)
        self._members = list(members.values())  # of each trajectory, the numbers of its samples

    def plan(self, budget: int) -> Plan:
        units = list(self._units(budget))
        return [
            (sorted(t for u in items for t in units[u][0]), sum(units[u][1] for u in items))
            for items in plan_microbatches([size for _, size in units], budget)
        ]

    def _units(self, budget: int) -> Iterator[tuple[list[int], int]]:
        """Trajectories that are packed together, and how many tokens they take: one, or a group
        that shares its prompt. A group that is larger than the budget is cut into parts in which
        those that share most are neighbours."""
        members, shared = self._members, self._shared
        if shared is None:
            for t, numbers in enumerate(members):
                yield [t], sum(len(self._samples[number]) for number in numbers)
            return
        groups: dict[int, list[int]] = {}
        for t, numbers in enumerate(members):
            groups.setdefault(self._samples[numbers[0]].group_id, []).append(t)
        for group in groups.values():
            numbers = [number for t in group for number in members[t]]
            size = shared.grow([], sorted(numbers, key=shared.rank.__getitem__))
            if size <= budget:
                yield group, size
                continue
            together: list[int] = []
            size, ranks = 0, []
            for t in sorted(group, key=lambda t: shared.rank[members[t][0]]):
                added = shared.grow(ranks, members[t])
                if together and size + added > budget:
                    yield together, size
                    together, size, ranks = [], 0, []
                    added = shared.grow(ranks, members[t])
                together.append(t)
                size += added
            yield together, size

    def microbatch(self, trajectories: Sequence[int], unit: Unit) -> Microbatch:
        """The samples of some trajectories, one trajectory after the other."""
        numbers = [number for t in trajectories for number in self._members[t]]
        samples = [self._samples[number] for number in numbers]
        lengths = [len(sample) for sample in samples]
        ends = np.cumsum(lengths)
        if self._shared is None:
            index, shared = np.arange(ends[-1]), (0,) * len(samples)
        else:
            index, shared = self._shared.layout(numbers)
        masks = np.concatenate([sample.ratio_mask for sample in samples])
        # A turn's number is the same in whichever of its trajectory's samples it lies.
        turns = np.concatenate([sample.turn_ids for sample in samples])[masks] * (unit == "turn")
        counts = [len(self._members[t]) for t in trajectories]
        owner = np.repeat(np.repeat(np.arange(len(counts)), counts), lengths)[masks]
        stride = int(turns.max(initial=0)) + 1
        present, sequence = np.unique(owner * stride + turns, return_inverse=True)
        sequence = sequence.reshape(-1)
        first = np.cumsum(counts) - counts  # sample of each trajectory
        owners = [samples[i] for i in first[present // stride].tolist()]
        chosen = padded_expert_choices([sample.expert_choices for sample in samples], lengths)

        def placed(values: np.ndarray) -> Int[Tensor, "1 T"]:
            out = np.empty(ends[-1] - sum(shared), dtype=np.int64)
            out[index] = values
            return torch.from_numpy(out)[None]

        def sampled(name: str) -> Tensor:
            return torch.from_numpy(np.concatenate([getattr(s, name) for s in samples])[masks])

        of_tokens = sampled("token_advantages")
        several = unit == "trajectory" and any(sample.turn_advantages for sample in samples)
        # Exact where all tokens of a sequence have the same: float64 holds the sums of float32.
        means = np.bincount(sequence, of_tokens.numpy()) / np.bincount(sequence)
        return Microbatch(
            tokens=placed(np.concatenate([sample.tokens for sample in samples])),
            positions=placed(np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)),
            lengths=tuple(lengths),
            shared=shared,
            index=torch.from_numpy(index),
            targets=torch.from_numpy(index[masks]),
            sources=torch.from_numpy(index[np.flatnonzero(masks) - 1]),
            sequence_ids=torch.from_numpy(sequence),
            old_logprobs=sampled("old_logprobs"),
            sampling_logprobs=sampled("sampling_logprobs"),
            temperatures=sampled("temperatures"),
            advantages=torch.from_numpy(means).float(),
            trajectory_ids=tuple(sample.trajectory_id for sample in owners),
            token_advantages=of_tokens if several else None,
            expert_choices=None if chosen is None else torch.from_numpy(np.concatenate(chosen)),
        )


def _evened(packer: _Packer, plan: Plan, budget: int, workers: int) -> Plan:
    """The plan, or one of smaller microbatches by which the workers end sooner.

    If prompts are shared, microbatches that are cut in two both hold what they share: a group of
    16 x 64 tokens behind 1,024 makes one of 2,048, or two of 1,536, or sixteen of 1,088.
    """
    tokens = sum(size for _, size in plan)
    turns = math.ceil(len(plan) / workers)
    if len(plan) == turns * workers or tokens < LEAST * workers:
        return plan
    best, largest = plan, max(size for _, size in plan)
    limit = 1.05 * tokens / (turns * workers)
    while limit < min(budget, largest):
        best = min(best, packer.plan(math.ceil(limit)), key=lambda tried: _span(tried, workers))
        if _span(best, workers) * workers <= 1.05 * tokens:
            break  # nothing is computed twice, and nobody waits
        limit *= _GROWTH
    return sorted(best, key=lambda entry: -entry[1])


def _span(plan: Plan, workers: int) -> int:
    """Tokens one after the other, if each turn of the workers lasts as long as its largest one.

    >>> _span([([0], 5), ([1], 2), ([2], 4)], workers=2)
    7
    """
    return sum(sorted((size for _, size in plan), reverse=True)[::workers])
